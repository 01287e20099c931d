"""Rows by budget against every possible assignment, on sizes where all of them can be tried."""

import itertools

import pytest
import torch

from conversion.channels.budget import allocate_rows


def problem(seed: int, num_channels: int = 6, num_groups: int = 4):
    """Falling costs that are not convex, rows of three sizes, and bounds."""
    generator = torch.Generator().manual_seed(seed)
    gains = torch.rand(num_groups - 1, num_channels, generator=generator, dtype=torch.float64) ** 3
    gains[torch.rand(gains.shape, generator=generator) < 0.2] = 0
    costs = torch.cat([gains.flip(0).cumsum(0).flip(0), torch.zeros(1, num_channels, dtype=torch.float64)])
    sizes = torch.tensor([3, 5, 8])[torch.randint(0, 3, (num_channels,), generator=generator)]
    least = 1 + (torch.rand(num_channels, generator=generator) < 0.2).long()
    most = least.maximum(torch.randint(1, num_groups + 1, (num_channels,), generator=generator))
    return costs, sizes, least, most


def total_cost(costs: torch.Tensor, counts: torch.Tensor) -> float:
    return costs.gather(0, counts[None] - 1).sum().item()


def every_choice(costs, sizes, least, most) -> list[tuple[int, float]]:
    """Parameters and cost of every assignment."""
    choices = itertools.product(*(range(low, high + 1) for low, high in zip(least.tolist(), most.tolist())))
    counts = torch.tensor(list(choices)).T
    channels = torch.arange(len(sizes))[:, None]
    return list(zip((counts * sizes[:, None]).sum(0).tolist(), costs[counts - 1, channels].sum(0).tolist()))


@pytest.mark.parametrize("seed", range(12))
def test_no_assignment_is_better_than_by_one_edge(seed):
    """Never worse than the best assignment that has one channel's largest step less room, and never over the room."""
    costs, sizes, least, most = problem(seed)
    choices = every_choice(costs, sizes, least, most)
    edge = int(((most - least) * sizes).max())
    before = None
    for room in range(int((least * sizes).sum()), int((most * sizes).sum()) + 4):
        counts = allocate_rows(costs, sizes, least, most, room)
        used, cost = int((counts * sizes).sum()), total_cost(costs, counts)
        assert (least <= counts).all() and (counts <= most).all() and used <= room
        assert cost <= min((c for size, c in choices if size <= room - edge), default=torch.inf) + 1e-6
        assert before is None or cost <= before + 1e-6, "more room cost more"
        before = cost
        can_grow = counts < most
        assert not can_grow.any() or room - used < sizes[can_grow].min(), "room is left for a row"
    assert torch.equal(counts, most)


@pytest.mark.parametrize("seed", range(12))
def test_where_an_edge_ends_the_choice_is_the_best(seed):
    """The Lagrangian is exact where the room ends with an edge of the hull: these rooms are found by trying all."""
    costs, sizes, least, most = problem(seed)
    choices = every_choice(costs, sizes, least, most)
    exact = 0
    for price in torch.linspace(0, 0.4, 60, dtype=torch.float64).tolist():
        size, cost = min(choices, key=lambda choice: (choice[1] + price * choice[0], choice[0]))
        counts = allocate_rows(costs, sizes, least, most, size)
        assert total_cost(costs, counts) == pytest.approx(cost, abs=1e-6)
        exact += int((counts * sizes).sum()) == size
    assert exact


def test_equal_channels_are_served_in_order():
    costs = torch.tensor([[2.0, 1.0, 0.0]]).T.double().expand(3, 5)
    counts = allocate_rows(costs, torch.full((5,), 4), torch.ones(5).long(), torch.full((5,), 3), 4 * 8)
    assert counts.tolist() == [3, 2, 1, 1, 1]


def test_rows_that_gain_nothing_are_kept_where_there_is_room():
    """Rows of the same loss are still rows of their own: exactness first, if it can be had."""
    costs = torch.zeros(3, 4, dtype=torch.float64)
    sizes, least, most = torch.full((4,), 2), torch.ones(4).long(), torch.tensor([3, 1, 2, 3])
    assert allocate_rows(costs, sizes, least, most, 100).tolist() == [3, 1, 2, 3]


def test_more_rows_that_cost_more_are_not_bought():
    """A clustering by approximation may find worse groups for more rows."""
    costs = torch.tensor([[4.0, 4.0], [5.0, 1.0], [0.0, 0.0]]).double()
    sizes, ones = torch.ones(2).long(), torch.ones(2).long()
    assert allocate_rows(costs, sizes, ones, 3 * ones, 3).tolist() == [1, 2]


def test_channels_of_nobody_need_no_room():
    """Their rows have no size."""
    costs = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]).double()
    counts = allocate_rows(costs, torch.tensor([3, 0, 3]), torch.ones(3).long(), torch.tensor([2, 1, 2]), 9)
    assert counts.tolist() == [2, 1, 1]


def test_too_little_room_is_an_error():
    ones = torch.ones(3).long()
    with pytest.raises(ValueError, match="15 parameters at least, expected no more than 14"):
        allocate_rows(torch.zeros(2, 3).double(), 5 * ones, ones, ones, 14)


def test_blocks_change_nothing(monkeypatch):
    costs, sizes, least, most = problem(0, num_channels=500)
    expected = allocate_rows(costs, sizes, least, most, 4000)
    monkeypatch.setattr("conversion.channels.budget.BLOCK_CHANNELS", 7)
    assert torch.equal(allocate_rows(costs, sizes, least, most, 4000), expected)
