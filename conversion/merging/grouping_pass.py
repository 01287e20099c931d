"""The first pass of a conversion: every channel's rows are compared and grouped, and every matrix is laid out.

Shapes: N experts, C channels of one chunk, O channels, I inputs, R rows, K groups at most.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from tqdm import tqdm

from conversion.channels.budget import allocate_rows
from conversion.channels.grouping import (
    equal_rows,
    gram_matrices,
    group_by_number,
    group_channels,
    partition_costs,
)
from conversion.channels.magnitude_threshold import MagnitudeThreshold
from conversion.channels.row_layout import RowLayout, layout_present, layout_rows
from conversion.checkpoints.architecture import channel_parameters
from conversion.io.journal import Journal
from conversion.io.row_reader import check_tensor_finite, check_tied_head
from conversion.merging.block_reader import Block, BlockReader
from conversion.merging.channel_costs import ChannelCosts, MeanMetric
from conversion.merging.grouped_module import LOSSES, GroupedModule, ModuleChoices, ModuleGroups, ModuleRows
from conversion.merging.plan import Plan
from conversion.merging.workers import Workers

Result = TypeVar("Result")


def group_modules(
    plan: Plan, costs: ChannelCosts | None, blocks: BlockReader, workers: Workers, journal: Journal, bar: tqdm
) -> dict[str, GroupedModule]:
    """Group every channel module that stores rows of its own, by path. Modules of the journal are grouped already.

    With a budget it takes two steps: what every number of groups would cost in every module, then, once all that is
    known, the groups.

    Args:
        costs: of a calibration; None: the deltas themselves are compared, and all experts count alike.
    """
    for path, module in plan.modules.channel.items():
        if module.tied_to is not None:
            for reader in (plan.base_reader, *plan.readers):
                check_tied_head(reader, f"{path}.weight", f"{module.tied_to}.weight", blocks.chunks(path))
    files = journal_files(plan, journal, "groups")
    if plan.budget_parameters is not None:
        choices = weigh_modules(plan, costs, blocks, workers, journal, bar)
        num_groups = spend_budget(plan, choices)

    def group(path: str) -> GroupedModule:
        if journal.finished(path):
            groups = ModuleGroups.load(files[path])
            if plan.budget_parameters is None:
                bar.update(blocks.module_bytes(path))
        else:
            if plan.budget_parameters is None:
                groups = group_module(plan, costs, blocks, path, bar)
            else:
                groups = choose_groups(plan, path, choices[path], num_groups[path])
            journal.save(path, files[path], groups.tensors())
        return ModuleRows(groups).summary(files[path])

    return for_each_module(plan, workers, group)


def weigh_modules(
    plan: Plan, costs: ChannelCosts | None, blocks: BlockReader, workers: Workers, journal: Journal, bar: tqdm
) -> dict[str, Path]:
    """The files with every module's `ModuleChoices`. Modules of the journal have theirs already."""
    files = journal_files(plan, journal, "choices")

    def weigh(path: str) -> Path:
        part = f"choices of {path}"
        if journal.finished(part):
            bar.update(blocks.module_bytes(path))
        else:
            journal.save(part, files[path], weigh_module(plan, costs, blocks, path, bar).tensors())
        return files[path]

    return for_each_module(plan, workers, weigh)


def journal_files(plan: Plan, journal: Journal, kind: str) -> dict[str, Path]:
    """A file for each module that stores rows of its own, by path."""
    return {path: journal.folder / f"{kind}-{number:05d}.safetensors" for number, path in enumerate(plan.own_modules)}


def for_each_module(plan: Plan, workers: Workers, function: Callable[[str], Result]) -> dict[str, Result]:
    """`function` of each module that stores rows of its own, by path; the longest work comes first."""
    own = plan.own_modules
    longest_first = sorted(own, key=lambda path: math.prod(plan.shapes[f"{path}.weight"]), reverse=True)
    results = dict(zip(longest_first, workers.for_each(function, longest_first), strict=True))
    return {path: results[path] for path in own}


def group_module(plan: Plan, costs: ChannelCosts | None, blocks: BlockReader, path: str, bar: tqdm) -> ModuleGroups:
    """Decide the groups of every channel of one module from the Gram matrices of its deltas."""
    grouping = plan.recipe.grouping
    trims = new_trims(plan, channel_parameters(plan.modules, path))
    labels, distinct, squares, losses = [], [], [], []
    for chunk in compared_chunks(plan, costs, blocks, path, trims, bar):
        groups = group_channels(
            chunk.gram,
            chunk.distinct,
            num_groups=grouping.num_groups,
            similarity=grouping.similarity,
            weights=chunk.weights,
        )
        squares.append(chunk.squares)
        distinct.append(chunk.distinct.to("cpu", torch.int8))
        labels.append(groups.to("cpu", torch.int8))
        if costs is not None:
            both = [partition_costs(chunk.gram, part, weights=chunk.weights) for part in (groups, 0 * groups)]
            losses.append(torch.stack(both).sum(1).cpu())
    distinct, present = torch.cat(distinct, dim=1), plan.present(path)
    layout, copied = lay_out(torch.cat(labels, dim=1), distinct, present)
    return ModuleGroups(
        channel_index=layout.channel_index,
        copied=copied,
        num_distinct=count_distinct(distinct, present),
        has_fallback=plan.has_fallback(path),
        delta_squares=sum_present(torch.cat(squares, dim=1), present),
        thresholds={} if copied.all() else find_thresholds(blocks, path, trims),
        **(dict(zip(LOSSES, sum(losses).tolist(), strict=True)) if losses else {}),
    )


def weigh_module(plan: Plan, costs: ChannelCosts | None, blocks: BlockReader, path: str, bar: tqdm) -> ModuleChoices:
    """The groups of every channel of one module for each number of groups, and what they cost."""
    trims = new_trims(plan, channel_parameters(plan.modules, path))
    channels, most = plan.modules.channel[path].out_features, plan.row_bounds(path)[1]
    labels = torch.empty(most, plan.num_experts, channels, dtype=torch.int8)
    distinct = torch.empty(plan.num_experts, channels, dtype=torch.int8)
    group_costs = torch.empty(most, channels, dtype=torch.float64)
    squares = torch.empty(plan.num_experts, channels, dtype=torch.float64)
    for chunk in compared_chunks(plan, costs, blocks, path, trims, bar):
        here = slice(chunk.start, chunk.stop)
        labels[..., here], group_costs[:, here] = group_by_number(
            chunk.gram, chunk.distinct, most_groups=most, weights=chunk.weights
        )
        distinct[:, here], squares[:, here] = chunk.distinct, chunk.squares
    return ModuleChoices(
        labels=labels,
        costs=group_costs,
        distinct=distinct,
        delta_squares=sum_present(squares, plan.present(path)),
        thresholds={} if not distinct.any() else find_thresholds(blocks, path, trims),
    )


def spend_budget(plan: Plan, choices: dict[str, Path]) -> dict[str, torch.Tensor]:
    """The number of groups of every channel, (O,) by module, that makes the most of the recipe's budget."""
    num_groups = max(plan.row_bounds(path)[1] for path in choices)
    costs, sizes, least, most = [], [], [], []
    for path, file in choices.items():
        module, bounds = ModuleChoices.load(file), plan.row_bounds(path)
        num_distinct = distinct_rows(module.distinct).sum(0)
        # One cost for each number of groups, also where the module's bound allows less.
        more = module.costs[-1:].expand(num_groups - len(module.costs), -1)
        costs.append(torch.cat([module.costs, more]))
        most.append(num_distinct.clamp(max=bounds[1]))
        least.append(num_distinct.clamp(max=bounds[0]))
        present = plan.present(path)
        sizes.append(torch.full_like(num_distinct, plan.row_size(path)))
        if present is not None:
            sizes[-1] *= present.any(0)  # a token that nobody has takes no room
    counts = allocate_rows(
        torch.cat(costs, dim=1),
        torch.cat(sizes),
        torch.cat(least),
        torch.cat(most),
        plan.budget_parameters - plan.fixed_parameters,
    )
    return dict(zip(choices, counts.split([len(part) for part in sizes]), strict=True))


def choose_groups(plan: Plan, path: str, choices: Path, num_groups: torch.Tensor) -> ModuleGroups:
    """The groups of one module with the number of groups (O,) that each of its channels has."""
    module, present = ModuleChoices.load(choices), plan.present(path)
    chosen = num_groups[None] - 1
    labels = module.labels.gather(0, chosen[:, None].expand(1, *module.distinct.shape))[0]
    layout, copied = lay_out(labels, module.distinct, present)
    return ModuleGroups(
        channel_index=layout.channel_index,
        copied=copied,
        num_distinct=count_distinct(module.distinct, present),
        has_fallback=plan.has_fallback(path),
        delta_squares=module.delta_squares,
        thresholds={} if copied.all() else module.thresholds,
        predicted_loss=module.costs.gather(0, chosen).sum().item(),
        one_row_loss=module.costs[0].sum().item(),
    )


class ComparedChunk(NamedTuple):
    """Some channels of one module, compared over all experts."""

    start: int
    stop: int
    gram: torch.Tensor  # (C, N, N) float64, of the deltas in the module's metric
    distinct: torch.Tensor  # (N, C) int64: the first expert with the same row
    weights: (
        torch.Tensor | None
    )  # how much each expert's loss counts: (N, C), 0 for a channel it lacks; None: all alike
    squares: torch.Tensor  # (N, C) float64 on the CPU: squared norm of each delta


def compared_chunks(
    plan: Plan,
    costs: ChannelCosts | None,
    blocks: BlockReader,
    path: str,
    trims: dict[str, list[MagnitudeThreshold]],
    bar: tqdm,
) -> Iterator[ComparedChunk]:
    """Read a module once, compare its rows chunk by chunk, and show its deltas to the trims."""
    metric = None if costs is None else costs.mean_metric(path)
    weights = plan.present(path) if costs is None else costs.weights(path)
    for parameters in blocks.blocks(path):
        deltas = [block.deltas() for block in parameters]
        rows = [block.rows(plan.dtype) for block in parameters]
        plain = sum(gram_matrices(part) for part in deltas)
        check_finite(plan, parameters, rows, plain)
        first = parameters[0]
        yield ComparedChunk(
            first.start,
            first.stop,
            plain if metric is None else metric_gram(deltas, metric),
            equal_rows(rows[0], rows[1] if len(rows) > 1 else None),
            None if weights is None else weights[:, first.start : first.stop].to(blocks.device),
            plain.diagonal(dim1=1, dim2=2).T.to("cpu", copy=True),
        )
        update_trims(trims, deltas, first.present)
        bar.update(sum(block.num_bytes for block in parameters))


def metric_gram(deltas: list[torch.Tensor], metric: MeanMetric) -> torch.Tensor:
    """Gram matrices (C, N, N) of the deltas of a weight (N, C, I), and of a bias (N, C, 1), in a metric."""
    weight, *biases = deltas
    return gram_matrices(weight @ metric.factor) + sum(metric.bias_weight * gram_matrices(bias) for bias in biases)


def sum_present(squares: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
    """Sum over the channels (N, O) that each expert has: (N,)."""
    return squares.sum(1) if present is None else (squares * present).sum(1)


def find_thresholds(
    blocks: BlockReader, path: str, trims: dict[str, list[MagnitudeThreshold]]
) -> dict[str, torch.Tensor]:
    """Read a module again until its trims, which have seen it once, know their thresholds: (N,) by parameter."""
    while not all(trim.complete for parts in trims.values() for trim in parts):
        for parameters in blocks.blocks(path):
            update_trims(trims, [block.deltas() for block in parameters], parameters[0].present)
    return {name: torch.tensor([trim.value for trim in parts]) for name, parts in trims.items()}


def count_distinct(distinct: torch.Tensor, present: torch.Tensor | None) -> int:
    """Rows that differ from each other, over all channels that anyone has."""
    firsts = distinct_rows(distinct)
    return int((firsts if present is None else firsts[:, present.any(0)]).sum())


def distinct_rows(distinct: torch.Tensor) -> torch.Tensor:
    """Whether each row is the first of its like: (N, O) bool, from the first expert with the same row (N, O)."""
    return distinct == torch.arange(len(distinct), dtype=distinct.dtype)[:, None]


def new_trims(plan: Plan, names: list[str]) -> dict[str, list[MagnitudeThreshold]]:
    """One trim threshold to be found for each expert's tensors of these names, if the method trims."""
    method = plan.recipe.method()
    if not method.needs_threshold:
        return {}
    trims = {}
    for name in names:
        path = name.rpartition(".")[0]
        channels, present = plan.modules.channel[path].out_features, plan.present(path)
        counts = [channels] * plan.num_experts if present is None else present.sum(1).tolist()
        width = plan.readers[0].tensors[name].numel // channels
        trims[name] = [MagnitudeThreshold(count * width, method.density) for count in counts]
    return trims


def update_trims(
    trims: dict[str, list[MagnitudeThreshold]], deltas: list[torch.Tensor], present: torch.Tensor | None
) -> None:
    """Show the trims, if there are any, the next chunk's deltas: (N, C, I) per parameter, of `present` (N, C) ones."""
    for parts, part in zip(trims.values(), deltas, strict=False):
        for expert, trim in enumerate(parts):
            trim.update(part[expert] if present is None else part[expert][present[expert]])


def lay_out(
    labels: torch.Tensor, distinct: torch.Tensor, present: torch.Tensor | None = None
) -> tuple[RowLayout, torch.Tensor]:
    """Rows of one matrix in their final order.

    Args:
        labels: (N, O) the group of each expert.
        distinct: (N, O) the first expert with the same row.
        present: (N, O) bool, which experts have which channels; None: all have all.

    Returns:
        The layout, and whether all owners of a row store the same one: (R,) bool.
    """
    layout = layout_rows(labels) if present is None else layout_present(labels, present)
    copied = torch.ones(len(layout.row_owners), dtype=torch.bool)
    first = torch.full(copied.shape, -1, dtype=distinct.dtype)  # `distinct` of each row's lowest owner
    for expert, same_as in enumerate(distinct):
        owned = ((layout.row_owners >> expert) & 1).bool()
        here = same_as[layout.row_channel]
        copied &= ~owned | (first < 0) | (first == here)
        first = torch.where(owned & (first < 0), here, first)
    return layout, copied


def check_finite(plan: Plan, parameters: list[Block], rows: list[torch.Tensor], gram: torch.Tensor) -> None:
    """ValueError naming the tensor that holds NaN or infinity, or that the output dtype cannot hold."""
    narrowed = plan.dtype == torch.float16 and not all(bool(part.isfinite().all()) for part in rows)
    if gram.isfinite().all() and not narrowed:
        return
    for block in parameters:
        for reader, tensor in zip((plan.base_reader, *plan.readers), (block.base, *block.experts), strict=True):
            check_tensor_finite(reader.name, block.name, tensor, plan.dtype)
    raise ValueError(f"{parameters[0].name}: the experts are too far from the base for float32 arithmetic")
