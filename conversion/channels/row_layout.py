"""The order in which a channel-merged matrix stores its rows.

Any order gives the same outputs; the order decides the speed. Rows lie by owner set (the experts that read a row, as a
bit mask), and the owner sets along a path on which few experts change from one to the next, so that the rows of one
expert form few runs of consecutive rows.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

# Up to so many experts, all Gray paths are tried; up to so many owner sets, a path is improved by turning stretches.
MAX_ENUMERATED_EXPERTS = 4
MAX_IMPROVED_SETS = 256


@cache
def gray_paths(num_experts: int) -> torch.LongTensor:
    """All paths (P, 2^N - 1) through the non-empty owner sets that change one expert a step, from one to one expert.

    Each gives the experts 2^(N-1) runs together, the fewest that there can be where every owner set occurs. A path is
    listed in one direction only.
    """
    singles = [1 << expert for expert in range(num_experts)]
    paths = []

    def extend(path: tuple[int, ...], left: frozenset[int]):
        if not left:
            if path[-1] in singles and path[0] <= path[-1]:
                paths.append(path)
            return
        for single in singles:
            if (step := path[-1] ^ single) in left:
                extend((*path, step), left - {step})

    everything = frozenset(range(1, 1 << num_experts))
    for single in singles:
        extend((single,), everything - {single})
    return torch.tensor(paths)


def reflected_gray_rank(owner_sets: torch.LongTensor, num_experts: int) -> torch.LongTensor:
    """Place of each owner set along the reflected Gray code: the inverse of the code, an xor of all right shifts."""
    rank, shift = owner_sets.clone(), 1
    while shift < num_experts:
        rank = rank ^ (rank >> shift)
        shift *= 2
    return rank


def turn_stretches(sets: list[int]) -> list[int]:
    """Fewer runs by 2-opt: reverse the stretch of the path that saves most changes of an expert, until none does.

    The path starts and ends at the empty set, so each expert's runs are half of its changes.
    """
    path = torch.tensor([0, *sets, 0])
    bits = (path[:, None] >> torch.arange(max(sets).bit_length())) & 1
    distance = (bits[:, None] != bits).sum(-1)  # (n + 2, n + 2)
    order = torch.arange(len(path))
    while True:
        steps = distance[order[:-1], order[1:]]  # to each place from the one before
        ordered = distance[order][:, order]
        # Reversing places i..j replaces the steps into i and out of j.
        saved = steps[:, None] + steps[None, :] - ordered[:-1, :-1] - ordered[1:, 1:]
        saved = saved.triu(1)
        best = int(saved.argmax())
        first, last = divmod(best, saved.shape[1])
        if saved.flatten()[best] <= 0:
            return path[order[1:-1]].tolist()
        order[first + 1 : last + 1] = order[first + 1 : last + 1].flip(0)


def reading_cost(paths: torch.LongTensor, sizes: torch.LongTensor, num_experts: int) -> torch.LongTensor:
    """What the experts pay to read their rows along each path: the sum of their squared costs, so that all pay alike.

    A gap inside an expert's rows costs its rows (it is read over), at most an eighth of the matrix (one more product).

    Args:
        paths: (P, S) owner sets in the order of each path.
        sizes: (P, S) rows of each.

    Returns:
        (P,) int64.
    """
    call = sizes.sum(-1, keepdim=True) // 8
    experts = torch.arange(num_experts)
    gap = torch.zeros(len(paths), num_experts, dtype=torch.int64)
    began = torch.zeros_like(gap, dtype=torch.bool)
    cost = torch.zeros_like(gap)
    for owners, size in zip(paths.unbind(-1), sizes.unbind(-1), strict=True):
        reads = ((owners[:, None] >> experts) & 1).bool() & (size > 0)[:, None]
        cost += torch.where(reads & began, gap.minimum(call), 0)
        gap = torch.where(reads, 0, gap + size[:, None])
        began |= reads
    return (cost**2).sum(-1)


def order_owner_sets(owner_sets: torch.LongTensor, sizes: torch.LongTensor, num_experts: int) -> torch.LongTensor:
    """The owner sets in the order in which their rows are stored, so that experts have few runs with short gaps.

    Args:
        owner_sets: (S,) bit masks of experts, ascending, all different.
        sizes: (S,) rows of each.

    Returns:
        (S,) the same sets, ordered.
    """
    if num_experts <= MAX_ENUMERATED_EXPERTS:
        of_set = torch.zeros(1 << num_experts, dtype=torch.int64).index_copy(0, owner_sets, sizes)
        paths = gray_paths(num_experts)
        best = paths[reading_cost(paths, of_set[paths], num_experts).argmin()]
        return best[of_set[best] > 0]
    gray = owner_sets[reflected_gray_rank(owner_sets, num_experts).argsort()]
    if len(owner_sets) > MAX_IMPROVED_SETS:
        return gray
    paths = torch.stack([gray, torch.tensor(turn_stretches(gray.tolist()))])
    return paths[reading_cost(paths, sizes[torch.searchsorted(owner_sets, paths)], num_experts).argmin()]


class RowLayout(NamedTuple):
    """Stored form of one matrix: who owns each row, where it comes from, and which row each channel reads."""

    channel_index: torch.IntTensor  # (N, O) row numbers
    row_channel: torch.LongTensor  # (R,) the channel that each row belongs to
    row_owners: torch.LongTensor  # (R,) bit mask of the experts that read the row


def owner_names(owners: int, names: Sequence[str]) -> list[str]:
    """The experts of a bit mask, by their names in the order of their numbers."""
    return [name for expert, name in enumerate(names) if owners >> expert & 1]


def layout_rows(groups: torch.Tensor) -> RowLayout:
    """Lay out one matrix in run order from the groups of its channels.

    Args:
        groups: (N, O) integers; experts with the same value in a column share one row there.

    Returns:
        The layout: rows ordered by owner set as `order_owner_sets` has it, then by channel.
    """
    num_experts, num_channels = groups.shape
    if num_experts > 62:
        raise ValueError(f"at most 62 experts fit the owner bit mask, got {num_experts}")
    bits = torch.ones(num_experts, dtype=torch.int64, device=groups.device) << torch.arange(
        num_experts, device=groups.device
    )
    owners = torch.zeros(groups.shape, dtype=torch.int64, device=groups.device)
    for expert, bit in enumerate(bits):  # one after the other: N x N x O would be large
        owners |= (groups == groups[expert]) * bit  # (N, O) owner set of the row that expert e reads
    # The lowest member of an owner set speaks for its row.
    leads = (owners & -owners) == bits[:, None]  # (N, O)
    row_channel = leads.nonzero()[:, 1]
    row_owners = owners[leads]
    # A stable sort by owner set keeps channels ascending only if they come in ascending.
    by_channel = torch.argsort(row_channel, stable=True)
    row_channel, row_owners = row_channel[by_channel], row_owners[by_channel]
    owner_sets, kind, sizes = row_owners.cpu().unique(return_inverse=True, return_counts=True)
    ordered = order_owner_sets(owner_sets, sizes, num_experts)
    place = torch.empty_like(ordered).index_copy(
        0, torch.searchsorted(owner_sets, ordered), torch.arange(len(ordered))
    )
    order = torch.argsort(place[kind].to(groups.device), stable=True)
    row_channel, row_owners = row_channel[order], row_owners[order]
    channel_index = torch.empty((num_experts, num_channels), dtype=torch.int32, device=groups.device)
    for expert in range(num_experts):
        owned = ((row_owners >> expert) & 1).nonzero()[:, 0]
        channel_index[expert, row_channel[owned]] = owned.to(torch.int32)
    return RowLayout(channel_index, row_channel, row_owners)


def layout_present(labels: torch.Tensor, present: torch.Tensor) -> RowLayout:
    """`layout_rows` of channels that not all experts have.

    Args:
        labels: (N, O) groups.
        present: (N, O) bool; labels elsewhere mean nothing.

    Returns:
        The layout; `channel_index` is -1 where an expert has no such channel.
    """
    experts = torch.arange(len(labels))[:, None]
    layout = layout_rows(torch.where(present, labels, len(labels) + experts))
    lead = (layout.row_owners & -layout.row_owners).double().log2().long()  # the lowest owner
    kept = present[lead, layout.row_channel]
    number = kept.cumsum(0) - 1
    index = torch.where(present, number[layout.channel_index.long()], -1)
    return RowLayout(index.to(torch.int32), layout.row_channel[kept], layout.row_owners[kept])
