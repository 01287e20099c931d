"""Variants of queries keep what the query asks, and depend on the query and the seed alone."""

import pytest

from conversion.router.augmentation import CHANGES, augment

TEXTS = ["What is 2 + 2?", "def f(x):\n    return {}", "下列说法正确的是（ ）\nA. 一  B. 二", " x "]


def test_same_text_and_seed_give_the_same_variant():
    assert [augment(text, 3) for text in TEXTS] == [augment(text, 3) for text in reversed(TEXTS)][::-1]
    assert len({augment(TEXTS[0], seed) for seed in range(30)}) > 5


@pytest.mark.parametrize("text", TEXTS)
def test_no_variant_loses_the_query(text):
    """Each change keeps at least half of the words' characters in their order, and none gives an empty query."""
    for seed in range(60):
        variant = augment(text, seed)
        assert variant.strip()
        start = "".join(text.lower().split())[: len("".join(text.split())) // 3 or 1]
        assert start in "".join(variant.lower().split())


def test_all_changes_occur():
    variants = [augment("What Is\nThis?", seed) for seed in range(200)]
    assert any(variant.endswith("### Response:") for variant in variants)
    assert "what is\nthis?" in variants and "What Is This?" in variants
    assert any(variant != "What Is\nThis?" and "What Is\nThis?".startswith(variant) for variant in variants)
    assert len(CHANGES) == 7
