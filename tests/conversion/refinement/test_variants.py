import pytest

from conversion.refinement.variants import vary_prompts
from conversion.vocabulary.calibration_texts import CalibrationText

TEXTS = [CalibrationText(1, [0, *range(10 * row, 10 * row + 9), 0, 99, 98], 11) for row in range(1, 6)]


def test_prompts_change_by_the_share():
    """Tokens come from other prompts of the expert, never from answers; special ones stay where they are."""
    variants = vary_prompts(TEXTS, 40, 0.25, frozenset({0}), 3)
    assert len(variants) == 200
    pool = {token for text in TEXTS for token in text.input_ids[1:10]}
    changed = 0
    for number, variant in enumerate(variants):
        prompt = TEXTS[number % 5].input_ids[:11]
        assert len(variant) == 11 and variant[0] == variant[-1] == 0 and set(variant[1:-1]) <= pool
        changed += sum(new != old for new, old in zip(variant, prompt))
    assert changed / (200 * 9) == pytest.approx(0.25 * 44 / 45, abs=0.04)


def test_variants_depend_on_the_seed_and_the_expert():
    first = vary_prompts(TEXTS, 2, 0.5, frozenset(), 0)
    assert first == vary_prompts(TEXTS, 2, 0.5, frozenset(), 0) != vary_prompts(TEXTS, 2, 0.5, frozenset(), 1)
    others = [CalibrationText(2, text.input_ids, text.answer_start) for text in TEXTS]
    assert vary_prompts(others, 2, 0.5, frozenset(), 0) != first
