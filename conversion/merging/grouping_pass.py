"""The first pass of a conversion: every channel's rows are compared and grouped, and every matrix is laid out.

Shapes: N experts, C channels of one chunk, O channels, I inputs, R rows.
"""

import math

import torch
from tqdm import tqdm

from conversion.channels.grouping import equal_rows, gram_matrices, group_channels
from conversion.channels.magnitude_threshold import MagnitudeThreshold
from conversion.channels.row_layout import RowLayout, layout_present, layout_rows
from conversion.checkpoints.architecture import channel_parameters
from conversion.io.journal import Journal
from conversion.io.row_reader import check_tensor_finite, check_tied_head
from conversion.merging.block_reader import Block, BlockReader
from conversion.merging.grouped_module import GroupedModule, ModuleGroups, ModuleRows
from conversion.merging.memory_budget import own_modules
from conversion.merging.plan import Plan
from conversion.merging.workers import Workers


def group_modules(
    plan: Plan, blocks: BlockReader, workers: Workers, journal: Journal, bar: tqdm
) -> dict[str, GroupedModule]:
    """Group every channel module that stores rows of its own, by path. Modules of the journal are grouped already."""
    for path, module in plan.modules.channel.items():
        if module.tied_to is not None:
            for reader in (plan.base_reader, *plan.readers):
                check_tied_head(reader, f"{path}.weight", f"{module.tied_to}.weight", blocks.chunks(path))
    own = own_modules(plan)
    files = {path: journal.folder / f"groups-{number:05d}.safetensors" for number, path in enumerate(own)}

    def group(path: str) -> GroupedModule:
        if journal.finished(path):
            groups = ModuleGroups.load(files[path])
            bar.update(blocks.module_bytes(path))
        else:
            groups = group_module(plan, blocks, path, bar)
            journal.save(path, files[path], groups.tensors())
        return ModuleRows(groups).summary(files[path])

    longest_first = sorted(own, key=lambda path: math.prod(plan.shapes[f"{path}.weight"]), reverse=True)
    grouped = dict(zip(longest_first, workers.for_each(group, longest_first), strict=True))
    return {path: grouped[path] for path in own}


def group_module(plan: Plan, blocks: BlockReader, path: str, bar: tqdm) -> ModuleGroups:
    """Decide the groups of every channel of one module from the Gram matrices of its deltas."""
    grouping = plan.recipe.grouping
    trims = new_trims(plan, channel_parameters(plan.modules, path))
    labels, distinct, squares = [], [], []
    for parameters in blocks.blocks(path):
        deltas = [block.deltas() for block in parameters]
        rows = [block.rows(plan.dtype) for block in parameters]
        gram = sum(gram_matrices(part) for part in deltas)
        check_finite(plan, parameters, rows, gram)
        present = parameters[0].present
        same = equal_rows(rows[0], rows[1] if len(rows) > 1 else None)
        groups = group_channels(
            gram, same, num_groups=grouping.num_groups, similarity=grouping.similarity, weights=present
        )
        squares.append(gram.diagonal(dim1=1, dim2=2).to("cpu", copy=True))
        distinct.append(same.to("cpu", torch.int8))
        labels.append(groups.to("cpu", torch.int8))
        update_trims(trims, deltas, present)
        bar.update(sum(block.num_bytes for block in parameters))
    distinct, squares, present = torch.cat(distinct, dim=1), torch.cat(squares).T, plan.present(path)
    layout, copied = lay_out(torch.cat(labels, dim=1), distinct, present)
    is_embedding = plan.modules.channel[path].kind == "embedding"
    return ModuleGroups(
        channel_index=layout.channel_index,
        copied=copied,
        num_distinct=count_distinct(distinct, present),
        has_fallback=is_embedding and bool((layout.channel_index < 0).any()),
        delta_squares=squares.sum(1) if present is None else (squares * present).sum(1),
        thresholds={} if copied.all() else find_thresholds(blocks, path, trims),
    )


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
    firsts = distinct == torch.arange(len(distinct))[:, None]
    return int((firsts if present is None else firsts[:, present.any(0)]).sum())


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
