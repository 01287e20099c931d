"""Which experts share a row of each channel: Gram matrices of the deltas to set partitions of the experts.

Merging a set S of rows with weights f loses the weighted squared distance to their weighted mean, and that follows
from the channel's N x N Gram matrix G of deltas alone:

    d_ij    = G_ii + G_jj - 2 G_ij                            squared distance of two deltas
    cost(S) = sum_{i < j in S} f_i f_j d_ij / sum_S f         0 for one row and for equal rows

(the usual sum_S f G_ii - sum_ij f_i f_j G_ij / sum_S f without its cancellation). A partition costs the sum over its
groups. For up to `MAX_ENUMERATED` experts every partition is tried, so that the grouping is the global optimum;
beyond, a batched clustering (the best of three starts, refined by single moves) works on the same numbers. Cosine
similarity is the same on deltas scaled to length one.

Everything is float64 and summed in an order that depends on neither chunks nor threads. Another device may round
differently, by far less than `TIE_TOLERANCE`.

Shapes: N experts, C channels, I inputs, K groups, P partitions. Inside, channels are the last dimension.
"""

from functools import cache

import torch

# 4140 partitions for 8 experts; 21147 for 9.
MAX_ENUMERATED = 8

# Costs closer than this part of the channel's total are equal, and the first partition in canonical order wins.
TIE_TOLERANCE = 1e-9

# Elements of one working block: small enough for the cache, large enough to hide the cost of a call.
GRAM_BLOCK = 1 << 16
COST_BLOCK = 1 << 20

# torch.sum never splits a row of up to this many elements over threads.
UNSPLIT_WIDTH = 1 << 13

# Leading columns that tell most unequal rows apart before a whole row is compared.
PROBE_COLUMNS = 16

BIT_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def gram_matrices(deltas: torch.Tensor) -> torch.Tensor:
    """Inner products of the experts' deltas, channel by channel.

    Args:
        deltas: (N, C, I), any float dtype.

    Returns:
        (C, N, N) float64; a channel's numbers depend on its own deltas only, to the last bit.
    """
    num_experts, num_channels, width = deltas.shape
    gram = torch.zeros((num_channels, num_experts, num_experts), dtype=torch.float64, device=deltas.device)
    step = max(1, GRAM_BLOCK // max(1, width))
    for start in range(0, num_channels, step):
        part = deltas[:, start : start + step].double()  # (N, c, I)
        block = gram[start : start + step]
        for gap in range(num_experts):
            dots = _fold_sum(part[: num_experts - gap] * part[gap:]).T  # (c, N - gap)
            block.diagonal(gap, 1, 2).copy_(dots)
            block.diagonal(-gap, 1, 2).copy_(dots)
    return gram


def _fold_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension; overwrites `values`.

    `torch.sum` splits a long single row over the threads, which would change its rounding. So the second half of a
    long row is first folded onto the first, until the row is too short to be split.
    """
    width = values.shape[-1]
    while width > UNSPLIT_WIDTH:
        half = (width + 1) // 2
        values[..., : width - half] += values[..., half:width]
        width = half
    return values[..., :width].sum(-1)


def equal_rows(rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Find rows that are the same bit for bit (so NaN equals itself, and 0.0 differs from -0.0).

    Args:
        rows: (N, C, I).
        bias: (N, C) or None; one more column of each row.

    Returns:
        (N, C) int64, the first expert with the same row.
    """
    num_experts, num_channels, _ = rows.shape
    rows = rows.contiguous().view(BIT_VIEWS[rows.element_size()])
    bias = None if bias is None else bias.contiguous().view(BIT_VIEWS[bias.element_size()])
    first = torch.arange(num_experts, device=rows.device)[:, None].repeat(1, num_channels)
    for later in range(1, num_experts):
        for earlier in range(later):
            maybe = (first[earlier] == earlier) & (first[later] == later)
            maybe &= (rows[earlier, :, :PROBE_COLUMNS] == rows[later, :, :PROBE_COLUMNS]).all(-1)
            if bias is not None:
                maybe &= bias[earlier] == bias[later]
            channels = maybe.nonzero()[:, 0]
            same = _rows_match(rows[earlier], rows[later], channels)
            first[later, channels[same]] = earlier
    return first


def _rows_match(left: torch.Tensor, right: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Whether row `channels[k]` is the same in `left` and `right` (C, I): (k,) bool, compared block by block."""
    same = torch.ones(len(channels), dtype=torch.bool, device=left.device)
    step = max(1, COST_BLOCK // max(1, left.shape[1]))
    for start in range(0, len(channels), step):
        some = channels[start : start + step]
        same[start : start + step] = (left[some] == right[some]).all(-1)
    return same


@cache
def set_partitions(num_experts: int) -> torch.Tensor:
    """All ways to split the experts into groups, in the canonical order: more groups first, then lexicographic.

    Returns:
        (P, N) int64 restricted-growth labels: the first expert has label 0, and a new label is one above those before.
        The tensor is shared by all callers.
    """
    if num_experts < 1:
        raise ValueError(f"expected at least 1 expert to partition, got {num_experts}")
    labels = [(0,)]
    for _ in range(num_experts - 1):
        labels = [head + (label,) for head in labels for label in range(max(head) + 2)]
    labels.sort(key=lambda label: (-max(label), label))
    return torch.tensor(labels, dtype=torch.int64)


@cache
def _grouped_partitions(num_experts: int, num_groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partitions into exactly K groups: labels (P, N), bit masks of their groups (P, K), pairs kept together (P,)."""
    labels = set_partitions(num_experts)
    labels = labels[labels.amax(1) == num_groups - 1]
    bits = 1 << torch.arange(num_experts)
    subsets = torch.stack([((labels == group) * bits).sum(1) for group in range(num_groups)], 1)
    return labels, subsets, _pair_bits(labels.T)


def _pair_bits(labels: torch.Tensor) -> torch.Tensor:
    """Bit mask of the pairs of experts with the same label: (N, *) to (*) int64."""
    pairs = torch.zeros(labels.shape[1:], dtype=torch.int64, device=labels.device)
    position = 0
    for later in range(1, len(labels)):
        for earlier in range(later):
            pairs |= (labels[earlier] == labels[later]).long() << position
            position += 1
    return pairs


def group_channels(
    gram: torch.Tensor,
    distinct: torch.Tensor,
    *,
    num_groups: int,
    similarity: str = "l2",
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Split the experts of every channel into at most K groups at the least cost, never splitting equal rows.

    A channel with at most K distinct rows keeps them all. Any other channel gets exactly K groups: splitting a group
    never costs more, so nothing with fewer groups is better.

    Args:
        gram: (C, N, N) float64, from `gram_matrices`.
        distinct: (N, C) int64, from `equal_rows`.
        num_groups: K.
        similarity: "l2", or "cosine" for deltas scaled to length one (a zero delta stays zero).
        weights: how much each expert's loss counts, (N,) or (N, C), not negative; None: all the same.

    Returns:
        (N, C) int64; the lowest expert of each expert's group.
    """
    num_channels, num_experts, _ = gram.shape
    if distinct.shape != (num_experts, num_channels):
        raise ValueError(f"distinct has shape {tuple(distinct.shape)}, expected {(num_experts, num_channels)}")
    if num_groups < 1:
        raise ValueError(f"num_groups is {num_groups}, expected at least 1")
    _check_finite(gram)
    groups = distinct.clone()
    experts = torch.arange(num_experts, device=gram.device)[:, None]
    crowded = ((distinct == experts).sum(0) > num_groups).nonzero()[:, 0]
    if len(crowded) == 0:
        return groups
    weights = _expert_weights(weights, num_experts, num_channels, gram)
    for channels in crowded.split(_channels_per_block(num_experts, num_groups)):
        some_weights = weights if weights.shape[1] == 1 else weights[:, channels]
        links, total = _links(_similarity_gram(gram[channels], similarity), some_weights)
        solve = _enumerate if num_experts <= MAX_ENUMERATED else _approximate
        labels = solve(links, some_weights.expand(-1, len(channels)), total, distinct[:, channels], num_groups)
        groups[:, channels] = lowest_members(labels)
    return groups


def partition_costs(
    gram: torch.Tensor,
    labels: torch.Tensor,
    *,
    similarity: str = "l2",
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """What given groups cost.

    Args:
        gram: (C, N, N) float64.
        labels: (N, C) integers; experts with the same label are one group.
        similarity, weights: as in `group_channels`.

    Returns:
        (C,) float64.
    """
    num_channels, num_experts, _ = gram.shape
    weights = _expert_weights(weights, num_experts, num_channels, gram).expand(-1, num_channels)
    links, _ = _links(_similarity_gram(gram, similarity), weights)
    costs = torch.zeros(num_channels, dtype=torch.float64, device=gram.device)
    for expert in range(num_experts):
        together = labels == labels[expert]  # (N, C)
        leads = together[:expert].sum(0) == 0
        link_sum, weight_sum = torch.zeros_like(costs), torch.zeros_like(costs)
        for later in range(num_experts):
            weight_sum += weights[later] * together[later]
            for earlier in range(later):
                link_sum += links[earlier, later] * (together[earlier] & together[later])
        costs += _ratio(link_sum, weight_sum) * leads
    return costs


def group_by_number(
    gram: torch.Tensor,
    distinct: torch.Tensor,
    *,
    most_groups: int,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The groups of every channel for each number of groups, and what they cost.

    Args:
        most_groups: K.
        gram, distinct, weights: as in `group_channels`.

    Returns:
        Labels (K, N, C) int8 of at most 1, 2, ..., K groups, and their costs (K, C) float64.
    """
    num_channels, num_experts, _ = gram.shape
    labels = torch.empty((most_groups, num_experts, num_channels), dtype=torch.int8, device=gram.device)
    costs = torch.empty((most_groups, num_channels), dtype=torch.float64, device=gram.device)
    for number, (groups, cost) in enumerate(zip(labels, costs, strict=True), start=1):
        found = group_channels(gram, distinct, num_groups=number, weights=weights)
        groups.copy_(found)
        cost.copy_(partition_costs(gram, found, weights=weights))
    return labels, costs


def group_by_costs(
    group_costs: torch.Tensor, distinct: torch.Tensor, *, most_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `group_by_number`, from what each group of up to `MAX_ENUMERATED` experts costs.

    Args:
        group_costs: (2^N, C) float64, by the bit mask of the group.
        distinct: (N, C) int64, from `equal_rows`.
        most_groups: K.
    """
    num_experts, num_channels = distinct.shape
    total = group_costs[-1]
    labels = distinct.to(torch.int8).repeat(most_groups, 1, 1)
    costs = torch.zeros((most_groups, num_channels), dtype=torch.float64, device=distinct.device)
    experts = torch.arange(num_experts, device=distinct.device)[:, None]
    num_distinct = (distinct == experts).sum(0)
    for number in range(1, most_groups + 1):
        crowded = (num_distinct > number).nonzero()[:, 0]
        for channels in crowded.split(_channels_per_block(num_experts, number)):
            found = _best_partition(group_costs[:, channels], total[channels], distinct[:, channels], number)
            labels[number - 1][:, channels] = lowest_members(found).to(torch.int8)
            costs[number - 1, channels] = _costs_of(group_costs[:, channels], found)
    return labels, costs


def _costs_of(group_costs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the costs (2^N, C) of the groups that have one label (N, C): (C,)."""
    bits = 1 << torch.arange(len(labels), device=labels.device)[:, None]
    total = torch.zeros_like(group_costs[0])
    for expert, label in enumerate(labels):
        together = labels == label
        leads = ~together[:expert].any(0)
        total += group_costs.gather(0, (together * bits).sum(0, keepdim=True))[0] * leads
    return total


def lowest_members(labels: torch.Tensor) -> torch.Tensor:
    """Rename groups after their lowest expert: (N, C) any labels to (N, C) int64."""
    lowest = torch.empty(labels.shape, dtype=torch.int64, device=labels.device)
    for expert in reversed(range(len(labels))):
        lowest.masked_fill_(labels == labels[expert], expert)
    return lowest


def _channels_per_block(num_experts: int, num_groups: int) -> int:
    """Channels whose working tensors together hold about `COST_BLOCK` numbers."""
    if num_experts > MAX_ENUMERATED:
        return max(1, COST_BLOCK // num_experts**2)
    subsets = _grouped_partitions(num_experts, num_groups)[1]
    return max(1, COST_BLOCK // max(len(subsets), 1 << num_experts))


def _check_finite(gram: torch.Tensor) -> None:
    bad = (~gram.isfinite()).any(-1).nonzero()
    if len(bad):
        channel, expert = bad[0].tolist()
        raise ValueError(f"the delta of expert {expert} in channel {channel} is not finite")


def _expert_weights(
    weights: torch.Tensor | None, num_experts: int, num_channels: int, gram: torch.Tensor
) -> torch.Tensor:
    """(N, 1) or (N, C) float64 weights on the device of `gram`."""
    if weights is None:
        return torch.ones((num_experts, 1), dtype=torch.float64, device=gram.device)
    weights = weights.to(gram)
    if weights.shape not in ((num_experts,), (num_experts, num_channels)):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}, expected {(num_experts,)} or {(num_experts, num_channels)}"
        )
    if not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(f"weights must be finite and not negative, got a minimum of {weights.min().item()}")
    return weights.reshape(num_experts, -1)


def _similarity_gram(gram: torch.Tensor, similarity: str) -> torch.Tensor:
    """The Gram matrix that the costs are taken from, (C, N, N)."""
    if similarity == "l2":
        return gram
    if similarity != "cosine":
        raise ValueError(f"similarity is {similarity!r}, expected 'cosine' or 'l2'")
    norms = gram.diagonal(0, 1, 2).sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0)
    return gram * scale[:, :, None] * scale[:, None, :]


def _links(gram: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted squared distances f_i f_j d_ij (N, N, C) and the weighted squared norm of each channel (C,)."""
    gram = gram.permute(1, 2, 0).contiguous()
    norms = gram.diagonal(0, 0, 1).T  # (N, C)
    links = ((norms[:, None] + norms[None]) - 2 * gram).clamp_(min=0)
    links *= weights[:, None] * weights[None]
    total = torch.zeros_like(norms[0])
    for norm, weight in zip(norms, weights, strict=True):
        total += norm * weight
    return links, total


def _ratio(link_sum: torch.Tensor, weight_sum: torch.Tensor) -> torch.Tensor:
    """`link_sum / weight_sum`, 0 where nothing has weight."""
    return torch.where(weight_sum > 0, link_sum / weight_sum, 0)


def _subset_costs(links: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cost of merging each subset of experts: (2^N, C), indexed by bit mask."""
    num_experts, num_channels = weights.shape
    link_sums = links.new_zeros((1 << num_experts, num_channels))
    weight_sums = links.new_zeros((1 << num_experts, num_channels))
    to_top = links.new_zeros((1 << num_experts >> 1, num_channels))  # links from each subset of lower experts to `top`
    for top in range(num_experts):
        size = 1 << top
        for lower in range(top):
            torch.add(to_top[: 1 << lower], links[lower, top], out=to_top[1 << lower : 2 << lower])
        torch.add(link_sums[:size], to_top[:size], out=link_sums[size : 2 * size])
        torch.add(weight_sums[:size], weights[top], out=weight_sums[size : 2 * size])
    return _ratio(link_sums, weight_sums)


def _enumerate(
    links: torch.Tensor, weights: torch.Tensor, total: torch.Tensor, distinct: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Labels (N, C) of the best partition into K groups, by trying all of them."""
    return _best_partition(_subset_costs(links, weights), total, distinct, num_groups)


def _best_partition(
    subset_costs: torch.Tensor, total: torch.Tensor, distinct: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Labels (N, C) of the partition into K groups whose subsets, (2^N, C), cost least."""
    labels, subsets, kept_pairs = (t.to(distinct.device) for t in _grouped_partitions(len(distinct), num_groups))
    costs = subset_costs.index_select(0, subsets[:, 0])  # (P, C)
    for group in range(1, num_groups):
        costs += subset_costs.index_select(0, subsets[:, group])
    equal_pairs = _pair_bits(distinct)
    for channel_pairs in equal_pairs.unique().tolist():
        if channel_pairs:
            splits = (kept_pairs & channel_pairs) != channel_pairs
            costs.masked_fill_(splits[:, None] & (equal_pairs == channel_pairs), torch.inf)
    within = costs <= costs.amin(0) + TIE_TOLERANCE * total
    return labels[within.to(torch.uint8).argmax(0)].T


def _approximate(
    links: torch.Tensor, weights: torch.Tensor, total: torch.Tensor, distinct: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Labels (N, C) of a good partition into K groups: the best of three starts, refined by single moves."""
    links, weights = _join_equal(links, weights, distinct)
    real = distinct == torch.arange(len(weights), device=links.device)[:, None]
    best = best_costs = None
    for start in (
        _ward(links, weights, distinct, num_groups),
        _nearest_seed(links, weights, distinct, num_groups, outermost=True),
        _nearest_seed(links, weights, distinct, num_groups, outermost=False),
    ):
        labels, costs = _refine(links, weights, total, real, start, num_groups)
        if best is None:
            best, best_costs = labels, costs
        else:
            better = costs < best_costs - TIE_TOLERANCE * total
            best, best_costs = torch.where(better, labels, best), torch.where(better, costs, best_costs)
    return best.gather(0, distinct)


def _join_equal(
    links: torch.Tensor, weights: torch.Tensor, distinct: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the weight and the links of equal rows to the first of them; the others keep none."""
    weights = torch.zeros_like(weights).scatter_add_(0, distinct, weights)
    columns = torch.zeros_like(links).scatter_add_(1, distinct[None].expand_as(links), links)
    links = torch.zeros_like(links).scatter_add_(0, distinct[:, None].expand_as(links), columns)
    return links, weights


def _ward(links: torch.Tensor, weights: torch.Tensor, distinct: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Merge the two clusters that cost least until K are left. Labels (N, C): the lowest expert of each cluster."""
    num_experts, num_channels = weights.shape
    experts = torch.arange(num_experts, device=links.device)
    labels = distinct.clone()
    between = links.clone()  # (N, N, C) sums of links between clusters
    inside, weight_sums = torch.zeros_like(weights), weights.clone()
    alive = distinct == experts[:, None]
    ordered = (experts[:, None] < experts[None])[:, :, None]
    for _ in range(num_experts - num_groups):
        costs = _ratio(inside, weight_sums)
        increase = _ratio(inside[:, None] + inside[None] + between, weight_sums[:, None] + weight_sums[None])
        increase -= costs[:, None] + costs[None]
        increase.masked_fill_(~(ordered & alive[:, None] & alive[None]), torch.inf)
        best = increase.view(-1, num_channels).argmin(0)
        channels = (alive.sum(0) > num_groups).nonzero()[:, 0]
        kept, gone = (best // num_experts)[channels], (best % num_experts)[channels]
        inside[kept, channels] += inside[gone, channels] + between[kept, gone, channels]
        weight_sums[kept, channels] += weight_sums[gone, channels]
        between[kept, :, channels] += between[gone, :, channels]
        between[:, kept, channels] += between[:, gone, channels]
        alive[gone, channels] = False
        merged = labels[:, channels]
        labels[:, channels] = torch.where(merged == gone, kept, merged)
    return labels


def _nearest_seed(
    links: torch.Tensor, weights: torch.Tensor, distinct: torch.Tensor, num_groups: int, *, outermost: bool
) -> torch.Tensor:
    """Choose K rows far from one another, the first the outermost or the innermost; every row joins the nearest.

    Labels (N, C): the lowest expert of each cluster.
    """
    experts = torch.arange(len(weights), device=links.device)[:, None]
    channels = torch.arange(weights.shape[1], device=links.device)
    apart = _ratio(links, weights[:, None] + weights[None])  # (N, N, C) cost of joining two rows
    spread = torch.zeros_like(weights)
    for row in apart:
        spread += row if outermost else -row
    taken = distinct != experts  # rows that cannot be seeds: seeds already, or another row stands for them
    seed = spread.masked_fill(taken, -torch.inf).argmax(0)
    labels = torch.zeros_like(distinct)
    nearest = apart[seed, :, channels].T  # (N, C)
    for group in range(1, num_groups):
        taken = taken | (experts == seed)
        seed = nearest.masked_fill(taken, -torch.inf).argmax(0)
        distance = apart[seed, :, channels].T
        joins = ((distance < nearest) & ~taken) | (experts == seed)
        labels = torch.where(joins, group, labels)
        nearest = torch.where(joins, distance, nearest)
    return lowest_members(labels.gather(0, distinct))


def _refine(
    links: torch.Tensor,
    weights: torch.Tensor,
    total: torch.Tensor,
    real: torch.Tensor,
    labels: torch.Tensor,
    num_groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move one row at a time to another group, the best move first, until no move pays.

    Args:
        real: (N, C) bool; False for rows that another row stands for.
        labels: (N, C) the lowest expert of each group.

    Returns:
        labels 0..K-1 (N, C) and costs (C,).
    """
    num_experts, num_channels = weights.shape
    experts = torch.arange(num_experts, device=links.device)[:, None]
    slots = (labels == experts).cumsum(0) - 1  # place of each group among the channel's groups
    labels = slots.gather(0, labels)
    active = torch.arange(num_channels, device=links.device)
    for _ in range(4 * num_experts):
        gains = _move_gains(links[..., active], weights[:, active], labels[:, active], num_groups)
        gains.masked_fill_(~real[None, :, active], -torch.inf)
        gain, move = gains.view(-1, len(active)).max(0)
        paying = gain > TIE_TOLERANCE * total[active]
        active, move = active[paying], move[paying]
        if len(active) == 0:
            break
        labels[move % num_experts, active] = move // num_experts
    inside, weight_sums, _ = _group_sums(links, weights, labels, num_groups)
    costs = torch.zeros_like(total)
    for group_costs in _ratio(inside, weight_sums)[:, 0]:
        costs += group_costs
    return labels, costs


def _group_sums(
    links: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Links inside each group (K, 1, C), its weight (K, 1, C), and the links from each row to it (K, N, C)."""
    groups = torch.arange(num_groups, device=links.device)[:, None, None]
    member = (labels[None] == groups).to(links.dtype)  # (K, N, C)
    to_group = torch.zeros_like(member)
    inside, weight_sums = torch.zeros_like(member[:, :1]), torch.zeros_like(member[:, :1])
    for expert in range(len(weights)):
        # Only lower experts are in `to_group` yet, so that each pair counts once.
        inside += member[:, expert : expert + 1] * to_group[:, expert : expert + 1]
        weight_sums += member[:, expert : expert + 1] * weights[expert]
        to_group += member[:, expert : expert + 1] * links[expert]
    return inside, weight_sums, to_group


def _move_gains(links: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor, num_groups: int) -> torch.Tensor:
    """What moving each row to each group saves: (K, N, C)."""
    inside, weight_sums, to_group = _group_sums(links, weights, labels, num_groups)
    costs = _ratio(inside, weight_sums)
    without = costs - _ratio((inside - to_group).clamp_(min=0), weight_sums - weights)
    joined = _ratio(inside + to_group, weight_sums + weights) - costs
    own = labels[None]
    return without.gather(0, own) - joined.scatter_(0, own, torch.inf)
