"""The order of stored rows: canonical, complete, and with few runs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.channels.row_layout import (
    gray_paths,
    layout_present,
    layout_rows,
    order_owner_sets,
    owner_names,
    reading_cost,
    reflected_gray_rank,
    turn_stretches,
)

NUM_EXPERTS = [2, 3, 4, 5]


def partition_labels(num_experts):
    """All ways to split the experts into groups, as labels."""
    labels = [(0,)]
    for _ in range(num_experts - 1):
        labels = [head + (label,) for head in labels for label in range(max(head) + 2)]
    return labels


group_columns = st.integers(1, 6).flatmap(
    lambda num_experts: st.lists(
        st.lists(st.integers(0, num_experts - 1), min_size=num_experts, max_size=num_experts), min_size=1, max_size=40
    )
)


def place_of_rows(layout):
    """Place of each row's owner set along the row order: (R,)."""
    ordered = torch.unique_consecutive(layout.row_owners).tolist()
    assert len(set(ordered)) == len(ordered), "an owner set lies in two places"
    return [ordered.index(owners) for owners in layout.row_owners.tolist()]


def total_runs(ordered):
    """Runs of all experts together along a list of owner sets."""
    return sum((after & ~before).bit_count() for before, after in itertools.pairwise([0, *ordered]))


class TestRowOrder:
    @pytest.mark.parametrize("num_experts, count", [(1, 1), (2, 1), (3, 6), (4, 1344)])
    def test_gray_paths(self, num_experts, count):
        """Every owner set once, one expert a step, from one expert to one expert; no path in both directions."""
        paths = gray_paths(num_experts).tolist()
        assert len(paths) == len({tuple(path) for path in paths}) == count
        assert num_experts == 1 or not {tuple(path) for path in paths} & {tuple(path[::-1]) for path in paths}
        for path in paths:
            assert sorted(path) == list(range(1, 1 << num_experts))
            assert total_runs(path) == 2 ** (num_experts - 1)
            assert path[0].bit_count() == path[-1].bit_count() == 1

    @pytest.mark.parametrize("num_experts", range(1, 11))
    def test_reflected_gray_code(self, num_experts):
        owner_sets = torch.arange(1, 1 << num_experts)
        rank = reflected_gray_rank(owner_sets, num_experts)
        assert len(rank.unique()) == len(rank)
        assert owner_sets.tolist() == list(range(1, 1 << num_experts))
        ordered = owner_sets[rank.argsort()].tolist()
        assert all((a ^ b).bit_count() == 1 for a, b in itertools.pairwise(ordered))

    @settings(max_examples=100, deadline=None)
    @given(st.sets(st.integers(1, 255), min_size=1, max_size=40))
    def test_turning_stretches_never_adds_runs(self, sets):
        owner_sets = torch.tensor(sorted(sets))
        gray = owner_sets[reflected_gray_rank(owner_sets, 8).argsort()].tolist()
        turned = turn_stretches(gray)
        assert sorted(turned) == sorted(sets)
        assert total_runs(turned) <= total_runs(gray)

    def test_turning_stretches_helps_where_few_owner_sets_occur(self):
        generator = torch.Generator().manual_seed(0)
        owner_sets = torch.randint(1, 1 << 8, (40,), generator=generator).unique()
        gray = owner_sets[reflected_gray_rank(owner_sets, 8).argsort()].tolist()
        assert total_runs(turn_stretches(gray)) < 0.9 * total_runs(gray)

    def test_reading_cost(self):
        """A gap costs its rows, at most an eighth of the matrix, squared; by hand."""
        paths = torch.tensor([[1, 3, 2], [1, 2, 3]])
        sizes = torch.tensor([[10, 20, 50], [10, 50, 20]])
        assert reading_cost(paths, sizes, 2).tolist() == [0, 10**2]
        sizes = torch.tensor([[10, 20, 50], [10, 4, 66]])
        assert reading_cost(paths, sizes, 2).tolist() == [0, 4**2]

    def test_the_cheapest_gray_path_is_taken(self):
        """Of all orders of seven owner sets with the fewest runs, by brute force."""
        every = torch.tensor([path for path in itertools.permutations(range(1, 8)) if total_runs(path) == 4])
        differ = 0
        for seed in range(5):
            sizes = torch.randint(1, 100, (7,), generator=torch.Generator().manual_seed(seed)) ** 2
            costs = reading_cost(every, sizes[every - 1], 3)
            ordered = order_owner_sets(torch.arange(1, 8), sizes, 3)
            assert reading_cost(ordered[None], sizes[ordered - 1][None], 3) == costs.min()
            differ += bool(costs.min() < costs.max())
        assert differ > 1

    def test_no_expert_pays_for_the_others(self):
        """Where all owner sets are as large, each of four experts has two runs."""
        layout = layout_rows(torch.tensor(partition_labels(4)).T.repeat(1, 9))
        for index in layout.channel_index:
            assert (index.unique().diff() != 1).sum() == 1

    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 6), st.data())
    def test_keeps_the_owner_sets(self, num_experts, data):
        sets = data.draw(st.sets(st.integers(1, 2**num_experts - 1), min_size=1))
        sizes = data.draw(st.lists(st.integers(1, 99), min_size=len(sets), max_size=len(sets)))
        ordered = order_owner_sets(torch.tensor(sorted(sets)), torch.tensor(sizes), num_experts)
        assert sorted(ordered.tolist()) == sorted(sets)


def test_owners_by_name():
    assert owner_names(0b101, ["math", "code", "chinese"]) == ["math", "chinese"]
    assert owner_names(0, ["math", "code"]) == []


class TestLayoutRows:
    def test_example(self):
        """The two experts of the module's docstring."""
        layout = layout_rows(torch.tensor([[0, 1, 2], [3, 1, 4]]))
        assert layout.channel_index.dtype == torch.int32
        assert layout.channel_index.tolist() == [[0, 2, 1], [3, 2, 4]]
        assert layout.row_channel.tolist() == [0, 2, 1, 0, 2]
        assert layout.row_owners.tolist() == [1, 1, 3, 2, 2]

    @settings(max_examples=200, deadline=None)
    @given(group_columns)
    def test_every_channel_of_every_expert_finds_its_row(self, columns):
        """Experts share a row exactly where they are in one group, and every row belongs to its channel and owners."""
        groups = torch.tensor(columns).T
        num_experts, num_channels = groups.shape
        index, row_channel, row_owners = layout_rows(groups)
        assert index.shape == groups.shape and row_channel.shape == row_owners.shape
        assert len(row_channel) == sum(len(set(column)) for column in columns)
        assert torch.equal(torch.unique(index), torch.arange(len(row_channel)))
        for expert in range(num_experts):
            assert torch.equal(row_channel[index[expert].long()], torch.arange(num_channels))
            for other in range(num_experts):
                assert torch.equal(index[expert] == index[other], groups[expert] == groups[other])
                owned = (row_owners[index[expert].long()] >> other) & 1
                assert torch.equal(owned.bool(), groups[expert] == groups[other])

    @settings(max_examples=100, deadline=None)
    @given(group_columns)
    def test_rows_are_sorted(self, columns):
        """By place of their owner set, then by channel: the order is canonical."""
        layout = layout_rows(torch.tensor(columns).T)
        keys = list(zip(place_of_rows(layout), layout.row_channel.tolist(), strict=True))
        assert keys == sorted(set(keys))

    @settings(max_examples=100, deadline=None)
    @given(group_columns)
    def test_names_of_groups_do_not_matter(self, columns):
        groups = torch.tensor(columns).T
        layout, renamed = layout_rows(groups), layout_rows(7 - 3 * groups)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(layout, renamed, strict=True))

    @pytest.mark.parametrize("num_experts", NUM_EXPERTS)
    def test_extreme_groups(self, num_experts):
        """All shared: one dense matrix. Nothing shared: one slice per expert, in order."""
        shared = layout_rows(torch.zeros(num_experts, 63, dtype=torch.int64))
        assert torch.equal(shared.channel_index, torch.arange(63, dtype=torch.int32).expand(num_experts, 63))
        apart = layout_rows(torch.arange(num_experts)[:, None].expand(-1, 63))
        assert len(apart.row_channel) == num_experts * 63
        for index in apart.channel_index:
            assert (index.diff() == 1).all()

    def test_too_many_experts(self):
        with pytest.raises(ValueError, match="at most 62 experts fit the owner bit mask, got 63"):
            layout_rows(torch.zeros(63, 2, dtype=torch.int64))


def test_layout_of_channels_that_not_all_have():
    """As the layout of all channels, without the rows that nobody reads."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (4, 200), generator=generator)
    present = torch.rand(4, 200, generator=generator) < 0.6
    layout = layout_present(labels, present)
    assert torch.equal(layout.channel_index >= 0, present)
    assert len(layout.row_channel) == int(layout.channel_index.max()) + 1
    for expert in range(4):
        rows = layout.channel_index[expert][present[expert]].long()
        assert torch.equal(layout.row_channel[rows], present[expert].nonzero()[:, 0])
        assert ((layout.row_owners[rows] >> expert) & 1).all()
    for channel in range(200):
        for one in range(4):
            for other in range(4):
                if present[one, channel] and present[other, channel]:
                    same = layout.channel_index[one, channel] == layout.channel_index[other, channel]
                    assert same == (labels[one, channel] == labels[other, channel])
    everything = layout_present(labels, torch.ones_like(present))
    assert all(torch.equal(a, b) for a, b in zip(everything, layout_rows(labels)))
