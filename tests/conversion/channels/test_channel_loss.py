"""The loss of merging rows by what they do: costs, metrics and minimising rows against plain dense arithmetic."""

import pytest
import torch

from conversion.channels.channel_loss import (
    DAMPING,
    FLOOR,
    POWER,
    GroupSolver,
    channel_weights,
    damp_covariances,
    metric_factor,
    weighted_mean,
)
from conversion.channels.grouping import gram_matrices, partition_costs


def covariances(num_experts: int, width: int, seed: int = 0) -> torch.Tensor:
    """Of few inputs, so that they are singular, and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_experts, width // 2, width, generator=generator, dtype=torch.float64)
    inputs *= torch.arange(1, num_experts + 1)[:, None, None]
    return (inputs.mT @ inputs / (width // 2)).float()


def test_damped_covariances_have_a_mean_diagonal_of_one():
    raw = covariances(3, 17)
    damped = raw.clone()
    scales = damp_covariances(damped)
    for before, after, scale in zip(raw.double(), damped.double(), scales):
        assert scale == pytest.approx(before.trace().item() / 17)
        expected = (1 - DAMPING) * before / scale + DAMPING * torch.eye(17)
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)
        assert after.trace() == pytest.approx(17, rel=1e-6)
        assert torch.linalg.eigvalsh(after).min() > DAMPING / 2


def test_an_expert_without_inputs_has_the_identity():
    raw = torch.zeros(1, 5, 5)
    assert damp_covariances(raw).tolist() == [1]
    assert torch.equal(raw[0], torch.eye(5))


def test_weights_are_the_same_for_an_expert_with_larger_losses():
    squares = torch.rand(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = squares.mean(1)
    weights = channel_weights(squares, means)
    torch.testing.assert_close(channel_weights(7 * squares, 7 * means), weights)
    plain = (squares / means[:, None]) ** POWER
    torch.testing.assert_close(weights, plain + FLOOR * plain.mean())
    assert (channel_weights(torch.zeros(2, 4).double(), torch.ones(2).double()) > 0).all()


@pytest.mark.parametrize(("members", "width"), [(2, 9), (4, 33), (3, 64)])
def test_the_merged_row_is_the_minimiser(members, width, monkeypatch):
    """Against a plain solve, and no other row costs less; columns are widened in several steps."""
    monkeypatch.setattr("conversion.channels.channel_loss.TILE", 10)
    generator = torch.Generator().manual_seed(1)
    metric = covariances(members, width)
    damp_covariances(metric)
    deltas = torch.randn(members, 7, width, generator=generator)
    weights = [0.3 + member for member in range(members)]
    merged = GroupSolver(metric, weights).solve(deltas)
    left = sum(weight * h.double() for weight, h in zip(weights, metric))
    right = sum(weight * h.double() @ row.double().T for weight, h, row in zip(weights, metric, deltas))
    torch.testing.assert_close(merged, torch.linalg.solve(left, right).T, rtol=1e-8, atol=1e-10)

    def cost(rows: torch.Tensor) -> torch.Tensor:
        return sum(
            weight * torch.einsum("ci,ij,cj->c", d - rows, h.double(), d - rows)
            for weight, h, d in zip(weights, metric, deltas.double())
        )

    for _ in range(5):
        assert (cost(merged) <= cost(merged + 0.01 * torch.randn(merged.shape, generator=generator))).all()


def test_with_the_identity_the_row_is_the_weighted_mean():
    rows = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.5, 1.0, 2.0])
    merged = GroupSolver(torch.eye(8).expand(3, 8, 8), weights.tolist()).solve(rows)
    torch.testing.assert_close(merged, weighted_mean(rows, weights[:, None].expand(3, 5)), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(merged, (rows * weights[:, None, None]).double().sum(0) / 3.5, rtol=1e-6, atol=1e-7)


def test_the_gram_matrix_in_the_metric_costs_what_the_groups_lose():
    """One metric for all experts: the closed form against the loss of the weighted means, row by row."""
    generator = torch.Generator().manual_seed(2)
    deltas = torch.randn(3, 6, 12, generator=generator)
    metric = covariances(3, 12)
    damp_covariances(metric)
    weights = torch.rand(3, 6, generator=generator, dtype=torch.float64) + 0.1
    labels = torch.tensor([[0], [0], [2]]).expand(3, 6)
    gram = gram_matrices(deltas @ metric_factor(metric))
    mean = metric.double().mean(0)
    pair = deltas[:2].double()
    away = pair - (weights[:2, :, None] * pair).sum(0) / weights[:2].sum(0)[:, None]
    expected = (weights[:2] * torch.einsum("nci,ij,ncj->nc", away, mean, away)).sum(0)
    torch.testing.assert_close(partition_costs(gram, labels, weights=weights), expected, rtol=1e-5, atol=1e-6)


def test_a_covariance_that_cannot_be_inverted_is_refused():
    with pytest.raises(ValueError, match="a covariance of 4 inputs is not positive definite"):
        GroupSolver(-torch.eye(4)[None], [1.0])
