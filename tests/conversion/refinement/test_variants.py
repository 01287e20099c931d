import random

import pytest

from conversion.refinement.variants import ANY_SHARE, PromptTokens, vary_prompts
from conversion.vocabulary.calibration_texts import CalibrationText

TEXTS = [CalibrationText(1, [0, *range(10 * row, 10 * row + 9), 0, 99, 98], 11) for row in range(1, 6)]
PROMPTS = [text.input_ids[:11] for text in TEXTS]


def test_prompts_alone_are_varied():
    """As many rounds as asked for; tokens come from prompts of the expert, never from answers."""
    variants = vary_prompts(TEXTS, 6, frozenset({0}), 3)
    assert len(variants) == 30 and {token for variant in variants for token in variant} <= set(sum(PROMPTS, []))
    assert sum(variant != PROMPTS[number % 5] for number, variant in enumerate(variants)) > 10


def test_any_tokens_are_exchanged_by_the_share():
    """Special ones stay where they are."""
    generator, pool = random.Random(0), PromptTokens(PROMPTS, frozenset({0}))
    changed = 0
    for _ in range(200):
        for prompt in PROMPTS:
            variant = pool.exchange(prompt, generator)
            assert len(variant) == 11 and variant[0] == variant[-1] == 0 and 0 not in variant[1:-1]
            changed += sum(new != old for new, old in zip(variant, prompt))
    assert changed / (1000 * 9) == pytest.approx(ANY_SHARE * 44 / 45, abs=0.02)


def test_likely_tokens_have_been_at_such_a_place():
    """Between the same neighbours where several have been, else behind the same one; the first has none."""
    prompts = [[1, 5, 2, 7], [1, 6, 2, 8], [9, 4, 3, 7]]
    pool, generator = PromptTokens(prompts, frozenset()), random.Random(0)
    variants = [pool.exchange_likely(prompts[0], generator) for _ in range(300)]
    assert {variant[0] for variant in variants} == {1} and {variant[1] for variant in variants} == {5, 6}
    assert {variant[2] for variant in variants} == {2} and {variant[3] for variant in variants} == {7, 8}
    assert {tuple(pool.exchange_likely(prompts[2], generator)) for _ in range(50)} == {(9, 4, 3, 7)}


def test_prompts_cross_at_a_token_that_both_have(monkeypatch):
    monkeypatch.setattr("conversion.refinement.variants.CROSSED_SHARE", 0.0)
    prompts = [[1, 2, 3, 4], [5, 3, 6], [7, 7, 7, 7, 3, 8]]
    pool, generator = PromptTokens(prompts, frozenset()), random.Random(0)
    crossed = {tuple(pool.cross(prompts[0], generator)) for _ in range(200)}
    assert crossed == {(1, 2, 3, 4), (1, 2, 3, 6), (1, 2, 3, 8)}
    assert max(len(pool.cross(prompt, generator)) for prompt in prompts for _ in range(50)) == 6


def test_variants_depend_on_the_seed_and_the_expert():
    first = vary_prompts(TEXTS, 3, frozenset(), 0)
    assert first == vary_prompts(TEXTS, 3, frozenset(), 0) != vary_prompts(TEXTS, 3, frozenset(), 1)
    others = [CalibrationText(2, text.input_ids, text.answer_start) for text in TEXTS]
    assert vary_prompts(others, 3, frozenset(), 0) != first
