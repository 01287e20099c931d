"""Texts of different lengths in one batch, and batches of texts of about the same length."""

from collections.abc import Iterator, Sequence

import torch


def pad(texts: Sequence[Sequence[int]], left: bool = False) -> tuple[torch.LongTensor, torch.LongTensor]:
    """`input_ids` and `attention_mask` of B texts, padded on the right, or the left, to T tokens: both (B, T)."""
    input_ids, attention_mask = torch.zeros(2, len(texts), max(map(len, texts)), dtype=torch.int64)
    for place, text in enumerate(texts):
        own = slice(-len(text), None) if left else slice(len(text))
        input_ids[place, own] = torch.tensor(text)
        attention_mask[place, own] = 1
    return input_ids, attention_mask


def batches(texts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """The numbers of all texts in batches, the longest texts first."""
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
