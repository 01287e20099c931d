"""The loss of merging rows by what they do: costs, metrics and minimising rows against plain dense arithmetic."""

import pytest
import torch

from conversion.channels.channel_loss import (
    DAMPING,
    FLOOR,
    GroupSolver,
    Use,
    channel_weights,
    damp_covariances,
    mean_metric,
    times_inputs,
    weighted_mean,
)
from conversion.channels.grouping import gram_matrices, partition_costs


def covariances(num_experts: int, width: int, seed: int = 0) -> torch.Tensor:
    """Of few inputs, so that they are singular, and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_experts, width // 2, width, generator=generator, dtype=torch.float64)
    inputs *= torch.arange(1, num_experts + 1)[:, None, None]
    return (inputs.mT @ inputs / (width // 2)).float()


def random_use(num_experts: int, channels: int, width: int, seed: int = 0) -> Use:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(num_experts, channels, generator=generator, dtype=torch.float64) + 0.1
    return Use(weights, damp_covariances(covariances(num_experts, width, seed)))


def dense_metric(uses: list[Use], expert: int, channel: int | None = None) -> torch.Tensor:
    """What an expert's H add up to with the weights of a channel, or their mean: (I, I) float64."""
    width = next(use.covariances.shape[1] for use in uses if use.covariances is not None)
    total = torch.zeros(width, width, dtype=torch.float64)
    for use in uses:
        weight = use.weights[expert].mean() if channel is None else use.weights[expert, channel]
        total += weight * (
            torch.eye(width, dtype=torch.float64) if use.covariances is None else use.covariances[expert].double()
        )
    return total


def test_damped_covariances_can_be_inverted():
    raw = covariances(3, 17)
    damped = damp_covariances(raw.clone())
    for before, after in zip(raw.double(), damped.double()):
        expected = before + DAMPING * before.trace() / 17 * torch.eye(17)
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)
        assert torch.linalg.eigvalsh(after).min() > DAMPING / 2 * before.trace() / 17


def test_an_expert_without_inputs_has_the_identity():
    assert torch.equal(damp_covariances(torch.zeros(1, 5, 5))[0], torch.eye(5))


def test_weights_are_the_same_for_an_expert_with_larger_losses():
    squares = torch.rand(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = squares.mean(1)
    weights = channel_weights(squares, means)
    torch.testing.assert_close(channel_weights(7 * squares, 7 * means), weights)
    plain = squares / means[:, None]
    torch.testing.assert_close(weights, plain + FLOOR * plain.mean())
    assert (channel_weights(torch.zeros(2, 4).double(), torch.ones(2).double()) > 0).all()


@pytest.mark.parametrize(("members", "width"), [((0, 1), 9), ((0, 2, 3, 4), 33), ((1, 2, 4), 64)], ids=str)
@pytest.mark.parametrize("two_uses", [False, True])
def test_the_merged_row_is_the_minimiser(members, width, two_uses, monkeypatch):
    """Against a plain solve, and no other row costs less; columns are widened in several steps."""
    monkeypatch.setattr("conversion.channels.channel_loss.TILE", 10)
    uses = [random_use(5, 7, width)]
    if two_uses:
        uses.insert(0, Use(random_use(5, 7, width, 1).weights, None))
    generator = torch.Generator().manual_seed(1)
    deltas, channels = torch.randn(len(members), 7, width, generator=generator), torch.arange(7)
    solver = GroupSolver(uses, members)
    products = times_inputs(uses, deltas, members)
    merged = solver.solve(deltas, products, channels)
    left = sum(dense_metric(uses, member) for member in members)
    right = sum(dense_metric(uses, member) @ row.double().T for member, row in zip(members, deltas))
    torch.testing.assert_close(merged, torch.linalg.solve(left, right).T, rtol=1e-8, atol=1e-10)

    def cost(rows: torch.Tensor) -> torch.Tensor:
        """With the weights averaged over the channels, for which the row is the best."""
        return sum(
            torch.einsum("ci,ij,cj->c", own - rows, dense_metric(uses, member), own - rows)
            for member, own in zip(members, deltas.double())
        )

    for _ in range(5):
        assert (cost(merged) <= cost(merged + 0.01 * torch.randn(merged.shape, generator=generator))).all()
    expected = torch.stack(
        [
            sum(
                (own[c] - merged[c]) @ dense_metric(uses, member, c) @ (own[c] - merged[c])
                for member, own in zip(members, deltas.double())
            )
            for c in range(7)
        ]
    )
    torch.testing.assert_close(solver.costs([deltas], products, channels), expected, rtol=1e-5, atol=1e-6)


def test_a_bias_is_the_weight_of_one_more_input():
    use = random_use(2, 6, 5)
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(2, 4, 5, generator=generator), torch.randn(2, 4, 1, generator=generator)
    channels = torch.tensor([0, 2, 3, 5])
    solver = GroupSolver([use], [0, 1])
    g = use.weights.mean(1)
    mean = (g[0] * bias[0].double() + g[1] * bias[1].double()) / g.sum()
    torch.testing.assert_close(solver.bias(bias), mean)
    more = (use.weights[:, channels] * (bias.double() - mean).square()[..., 0]).sum(0)
    products = times_inputs([use], weight, [0, 1])
    without = solver.costs([weight], products, channels)
    torch.testing.assert_close(solver.costs([weight, bias], products, channels), without + more)


def test_with_the_identity_the_row_is_the_weighted_mean():
    rows = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[:, None].expand(3, 5)
    for identity in (torch.eye(8).expand(3, 8, 8), None):
        uses = [Use(weights, identity)]
        merged = GroupSolver(uses, [0, 1, 2]).solve(rows, times_inputs(uses, rows, range(3)), torch.arange(5))
        torch.testing.assert_close(merged, weighted_mean(rows, weights), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(merged, (rows * weights[:, :, None]).sum(0) / 3.5, rtol=1e-6, atol=1e-7)


def test_one_metric_for_all_experts_costs_what_the_groups_lose():
    """The closed form against the loss of the weighted means, row by row, with two uses."""
    generator = torch.Generator().manual_seed(2)
    deltas = torch.randn(3, 6, 12, generator=generator)
    uses = [random_use(3, 6, 12), Use(random_use(3, 6, 12, 1).weights, None)]
    weights, factor = mean_metric(uses)
    torch.testing.assert_close(weights, uses[0].weights + uses[1].weights)
    metric = factor.double() @ factor.double().T
    parts = [use.weights.sum() / weights.sum() for use in uses]
    expected = parts[0] * uses[0].covariances.double().mean(0) + parts[1] * torch.eye(12)
    torch.testing.assert_close(metric, expected, rtol=1e-5, atol=1e-5)
    labels = torch.tensor([[0], [0], [2]]).expand(3, 6)
    pair = deltas[:2].double()
    away = pair - (weights[:2, :, None] * pair).sum(0) / weights[:2].sum(0)[:, None]
    expected = (weights[:2] * torch.einsum("nci,ij,ncj->nc", away, metric, away)).sum(0)
    costs = partition_costs(gram_matrices(deltas @ factor), labels, weights=weights)
    torch.testing.assert_close(costs, expected, rtol=1e-5, atol=1e-6)


def test_a_covariance_that_cannot_be_inverted_is_refused():
    with pytest.raises(ValueError, match="a covariance of 4 inputs is not positive definite"):
        GroupSolver([Use(torch.ones(1, 3).double(), -torch.eye(4)[None])], [0])
