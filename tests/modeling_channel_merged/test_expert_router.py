"""Pooling sees tokens and nothing but tokens; the head starts untrained."""

import pytest
import torch

from modeling_channel_merged.expert_router import ExpertRouter, pool


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pooling, side):
    torch.manual_seed(0)
    tokens, padding = torch.randn(2, 5, 16), torch.full((2, 3, 16), float("nan"))
    ones, zeros = torch.ones(2, 5), torch.zeros(2, 3)
    parts = [(padding, zeros), (tokens, ones)] if side == "left" else [(tokens, ones), (padding, zeros)]
    padded, mask = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    # Padding moves the terms of the sum, so its rounding may differ.
    torch.testing.assert_close(pool(padded, mask, pooling), pool(tokens, ones, pooling), rtol=1e-6, atol=1e-6)


def test_values():
    hidden_states = torch.tensor([[[1.0], [2.0], [6.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden_states, mask, "mean").tolist() == [[1.5]]
    assert pool(hidden_states, mask, "last").tolist() == [[2.0]]


def test_query_without_tokens_gives_zeros():
    assert pool(torch.randn(1, 3, 4), torch.zeros(1, 3), "mean").tolist() == [[0.0] * 4]
    assert pool(torch.randn(1, 3, 4), torch.zeros(1, 3), "last").tolist() == [[0.0] * 4]


def test_half_precision_features_are_pooled_in_float32():
    hidden_states = torch.full((1, 3000, 1), 1.001, dtype=torch.bfloat16)
    assert pool(hidden_states, torch.ones(1, 3000), "mean").dtype == torch.float32
    assert pool(hidden_states, torch.ones(1, 3000), "mean").item() == pytest.approx(hidden_states[0, 0, 0].item())


def test_trained_once_the_head_is_not_zero():
    router = ExpertRouter(8, 3, "mean")
    assert not router.is_trained
    assert router(torch.randn(2, 4, 8), torch.ones(2, 4)).abs().max() == 0
    router.head.bias.data[0] = 1.0
    assert not router.is_trained
    router.head.weight.data[0, 0] = 1e-3
    assert router.is_trained
