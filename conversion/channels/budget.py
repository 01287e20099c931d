"""How many rows each channel gets when the rows of a whole model share one budget.

    minimise  sum_c cost_c(k_c)   where   sum_c k_c size_c <= room   and   least_c <= k_c <= most_c

At a price of lambda a parameter, the Lagrange multiplier of the room, channel c takes the k with the least
cost_c(k) + lambda k size_c, a corner of the lower convex hull of its costs. As the price falls the channel walks along
its hull, past each edge when the price falls below the edge's gain per parameter. So the edges of all channels are
taken by falling gain per parameter until one does not fit: the multiplier is that edge's, and the choice is the best
that there is for what it uses. The rest of the room, smaller than that edge, goes to the rows with the most gain per
parameter that fit. More room never costs more.

Gains per parameter are compared in float32 (what two devices round differently is a tie), and a tie goes to the lower
channel.

Shapes: C channels, K the most rows of a channel.
"""

import torch

# Channels of one working block.
BLOCK_CHANNELS = 1 << 18


def allocate_rows(
    costs: torch.Tensor, row_sizes: torch.Tensor, least: torch.Tensor, most: torch.Tensor, room: int
) -> torch.Tensor:
    """Choose the number of rows of every channel at the least cost that the room allows.

    Args:
        costs: (K, C) float64, of a channel with 1, 2, ..., K rows. Where more rows cost more, they count as useless.
        row_sizes: (C,) int64, parameters of one row.
        least: (C,) int64, at least 1.
        most: (C,) int64, from `least` to K.
        room: parameters of all rows together.

    Returns:
        (C,) int64.

    Raises:
        ValueError: the least rows do not fit.
    """
    needed = int((least * row_sizes).sum())
    if needed > room:
        raise ValueError(f"the rows have {needed} parameters at least, expected no more than {room}")
    costs = costs.cummin(0).values
    channels, rows, gains = hull_edges(costs, row_sizes, least, most)
    order = gains.argsort(descending=True, stable=True)
    used = needed + (rows * row_sizes[channels])[order].cumsum(0)
    taken = order[: int((used <= room).sum())]
    counts = least.index_add(0, channels[taken], rows[taken])
    if len(taken) < len(order):
        spend_rest(counts, costs, row_sizes, most, room - int((counts * row_sizes).sum()))
    return counts


def hull_edges(
    costs: torch.Tensor, row_sizes: torch.Tensor, least: torch.Tensor, most: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The edges of every channel's lower convex hull, as `allocate_rows` takes costs; never rising.

    Returns:
        Of E edges, those of a channel in their order: channel (E,) int64, rows (E,) int64, gain per parameter (E,)
        float32.
    """
    parts = []
    for channels in torch.arange(costs.shape[1]).split(BLOCK_CHANNELS):
        some, place, end = costs[:, channels], least[channels], most[channels]
        while len(channels):
            gain, corner = steepest(some, place, end)
            left = corner > place
            channels, some, end = channels[left], some[:, left], end[left]
            rows, gain, place = (corner - place)[left], gain[left], corner[left]
            parts.append((channels, rows, (gain / row_sizes[channels]).float()))
    channels, rows, gains = map(torch.cat, zip(*parts, strict=True))
    return channels, rows, gains


def steepest(costs: torch.Tensor, place: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The step to more rows, up to `end` (C,), with the most gain per row; of equal ones the longest.

    Returns:
        Gain per row (C,) float64, and the number of rows after the step (C,): `place` where there is none.
    """
    here = costs.gather(0, place[None] - 1)[0]
    best, corner = torch.full_like(here, -1.0), place.clone()
    for rows, cost in enumerate(costs[1:], start=2):
        gain = (here - cost) / (rows - place)
        better = (rows > place) & (rows <= end) & (gain >= best)
        best, corner = torch.where(better, gain, best), torch.where(better, rows, corner)
    return best, corner


def spend_rest(
    counts: torch.Tensor, costs: torch.Tensor, row_sizes: torch.Tensor, most: torch.Tensor, room: int
) -> None:
    """Raise `counts` in place, step by step by the most gain per parameter of those that fit into `room`."""
    while True:
        end = most.minimum(counts + room // row_sizes.clamp(min=1))
        gain, corner = steepest(costs, counts, end)
        best = torch.where(corner > counts, (gain / row_sizes.clamp(min=1)).float(), -1).argmax()
        rows = int(corner[best] - counts[best])
        if not rows:
            return
        counts[best] += rows
        room -= rows * int(row_sizes[best])
