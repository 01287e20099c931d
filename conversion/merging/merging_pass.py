"""The second pass of a conversion: the rows of every group are merged and written to their final places.

Shapes: N experts, C channels of one chunk, I inputs, R rows, M members of a group.
"""

import math
from collections.abc import Iterator

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from conversion.channels.delta_errors import DeltaErrors
from conversion.channels.keep_masks import keep_mask
from conversion.channels.merge_methods import MergeMethod, merge_rows
from conversion.checkpoints.architecture import channel_parameters
from conversion.checkpoints.merged_checkpoint import stored_name
from conversion.io.journal import Journal
from conversion.io.row_reader import RowReader, check_tensor_finite
from conversion.io.shard_writer import ShardWriter, TensorSpec
from conversion.merging.block_reader import Block, BlockReader, gather_rows
from conversion.merging.channel_costs import ChannelCosts
from conversion.merging.grouped_module import GroupedModule, ModuleRows, all_modules
from conversion.merging.plan import Plan
from conversion.merging.regmean import RegMean
from conversion.merging.workers import Workers


def output_tensors(plan: Plan, grouped: dict[str, GroupedModule]) -> list[TensorSpec]:
    """Every tensor of the merged checkpoint, in the order of the base architecture."""
    tensors = []
    modules = all_modules(plan, grouped)
    for path, module in plan.modules.channel.items():
        rows = modules[path].num_rows
        if not module.tied_to:
            tensors.append(TensorSpec(f"model.{path}.rows.weight", (rows, module.in_features), plan.dtype))
            if module.bias:
                tensors.append(TensorSpec(f"model.{path}.rows.bias", (rows,), plan.dtype))
        tensors.append(TensorSpec(f"model.{path}.channel_index", (plan.num_experts, module.out_features), torch.int32))
    for path, names in plan.modules.per_expert.items():
        for expert in range(plan.num_experts):
            tensors += [
                TensorSpec(f"model.{path}.experts.{expert}.{name}", plan.shapes[f"{path}.{name}"], plan.dtype)
                for name in names
            ]
    return tensors + [TensorSpec(name, shape, torch.float32) for name, shape in router_shapes(plan).items()]


def write_modules(
    plan: Plan,
    costs: ChannelCosts | None,
    blocks: BlockReader,
    workers: Workers,
    grouped: dict[str, GroupedModule],
    writer: ShardWriter,
    journal: Journal,
    bar: tqdm,
) -> DeltaErrors:
    """Write every tensor of the merged checkpoint that is not there yet.

    Shards are finished one after the other; within one the longest work comes first.

    Args:
        costs: of the calibration, if there is one.

    Returns:
        How far the merged rows are from the experts' own.
    """
    for path, module in all_modules(plan, grouped).items():
        name = f"model.{path}.channel_index"
        if not writer.is_written(name):
            writer.write(name, module.load().channel_index(plan.modules.channel[path].kind))
    errors = DeltaErrors(plan.num_experts)
    merger = RowMerger(plan, costs, errors, blocks.device)
    files = {path: journal.folder / f"errors-{number:05d}.safetensors" for number, path in enumerate(grouped)}

    def write_rows(path: str) -> None:
        names = channel_parameters(plan.modules, path)
        missing = {name for name in names if not writer.is_written(stored_name(path, name))}
        part = f"errors of {path}"
        if not missing and journal.finished(part):
            errors.restore(path, load_file(files[path])["squares"])
            bar.update(blocks.module_bytes(path))
            return
        write_merged(plan, blocks, path, grouped[path].load(), merger, writer, missing, bar)
        journal.save(part, files[path], {"squares": errors.finish(path)})

    order = sorted(grouped, key=lambda path: (writer.shard(f"model.{path}.rows.weight"), -grouped[path].num_rows))
    workers.for_each(write_rows, order)
    write_per_expert(plan, blocks, writer, bar)
    for name, shape in router_shapes(plan).items():
        if not writer.is_written(name):
            writer.write(name, torch.zeros(shape))
    return errors


def write_merged(
    plan: Plan,
    blocks: BlockReader,
    path: str,
    module: ModuleRows,
    merger: "RowMerger",
    writer: ShardWriter,
    missing: set[str],
    bar: tqdm,
) -> None:
    """Merge the rows of one module, and write those of its parameters that are `missing`."""
    merger.start(path)
    regmean = merger.regmean(path, module)
    num_passes = 1 if regmean is None else regmean.num_passes
    for number in range(num_passes):
        if regmean is not None:
            regmean.begin(number)
        for parameters in blocks.blocks(path):
            for block in parameters:
                for start, rows in merger.merged_rows(path, block, module, regmean):
                    if block.name in missing:
                        writer.write(stored_name(path, block.name), rows.cpu(), start)
            bar.update(sum(block.num_bytes for block in parameters) / num_passes)
    if module.groups.has_fallback and f"{path}.weight" in missing:
        row = plan.fallback_row(f"{path}.weight").to(plan.dtype)
        writer.write(stored_name(path, f"{path}.weight"), row, module.num_rows - 1)


def router_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The router's head, zero until it is trained."""
    return {
        "router.head.weight": (plan.num_experts, plan.text_config.hidden_size),
        "router.head.bias": (plan.num_experts,),
    }


def write_per_expert(plan: Plan, blocks: BlockReader, writer: ShardWriter, bar: tqdm) -> None:
    """Copy the parameters that have no channels, one exact copy per expert."""
    for path, names in plan.modules.per_expert.items():
        for name in names:
            for expert, reader in enumerate(plan.readers):
                stored = f"model.{path}.experts.{expert}.{name}"
                if not writer.is_written(stored):
                    write_copy(reader, f"{path}.{name}", writer, stored, plan.dtype, blocks.max_bytes)
                bar.update(2 * reader.tensors[f"{path}.{name}"].num_bytes)  # the first pass has no need of it


def write_copy(
    reader: RowReader, name: str, writer: ShardWriter, stored: str, dtype: torch.dtype, max_bytes: int
) -> None:
    """Copy one parameter in blocks of at most `max_bytes` of float32, or row by row."""
    length, *inner = reader.tensors[name].shape
    step = max(1, max_bytes // (4 * math.prod(inner)))
    for start in range(0, length, step):
        tensor = reader.read_rows(name, start, min(start + step, length))
        check_tensor_finite(reader.name, name, tensor, dtype)
        writer.write(stored, tensor.to(dtype), start)


class RowMerger:
    """Turns the experts' rows of one chunk into the merged rows, with the recipe's method."""

    def __init__(self, plan: Plan, costs: ChannelCosts | None, errors: DeltaErrors, device: torch.device):
        self._costs = costs
        self._errors = errors
        self._channels = {path: module.out_features for path, module in plan.modules.channel.items()}
        self._method: MergeMethod = plan.recipe.method()
        weights = [expert.weight for expert in plan.recipe.experts]
        self._weights = torch.tensor(weights, dtype=torch.float32, device=device)
        self._names = plan.expert_names
        self._seed = plan.recipe.seed
        self._dtype = plan.dtype

    def start(self, path: str) -> None:
        """Begin with a module: its error counts from zero."""
        self._errors.start(path, self._channels[path])

    def regmean(self, path: str, module: ModuleRows) -> RegMean | None:
        """What merges a module's groups by what was measured of them; None: another method does."""
        return RegMean(self._costs, path, module) if self._method.name == "regmean" else None

    def merged_rows(
        self, path: str, block: Block, module: ModuleRows, regmean: RegMean | None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows of one parameter that belong to a chunk's channels.

        Args:
            path: the module that the parameter is in.
            block: the parameter in the chunk, (C, I) or (C,).
            module: the rows of its module.
            regmean: from the method of that name; its pass decides which rows are due.

        Yields:
            The place of the first row, and consecutive rows (rows, I) or (rows,) in the output dtype.
        """
        thresholds = module.groups.thresholds.get(block.name)
        masks = None
        if self._method.needs_mask:
            masks = RandomMasks(self._seed, self._names, block, self._method.density)

        def merge(members: tuple[int, ...], channels: torch.Tensor) -> torch.Tensor:
            return self._merge(path, block, members, channels, thresholds, masks, regmean)

        for part in module.blocks(block.start, block.stop):
            if regmean is not None and not regmean.takes(part.members):
                continue
            channels = (part.channels - block.start).to(block.base.device)
            copied = module.groups.copied[part.start : part.start + len(channels)].to(block.base.device)
            merged = (~copied).nonzero()[:, 0]
            if len(merged) == len(channels):
                rows = merge(part.members, channels)
            else:
                rows = block.experts[part.members[0]][channels].to(self._dtype)
                if len(merged):
                    rows[merged] = merge(part.members, channels[merged])
            yield part.start, rows

    def _merge(
        self,
        path: str,
        block: Block,
        members: tuple[int, ...],
        channels: torch.Tensor,
        thresholds: torch.Tensor | None,
        masks: "RandomMasks | None",
        regmean: RegMean | None,
    ) -> torch.Tensor:
        """Merge the members' rows of some channels of a chunk: (channels, I) or (channels,) in the output dtype."""
        base = block.base[channels].view(len(channels), -1)
        rows = gather_rows([block.experts[member] for member in members], channels)
        rows = rows.view(len(members), len(channels), -1)
        if regmean is not None:
            merged = regmean.merge(block, members, channels, base, rows)
        else:
            merged = merge_rows(
                base,
                rows,
                self._weights[list(members)],
                self._method,
                thresholds=None if thresholds is None else thresholds[list(members)],
                keep=None if masks is None else masks.rows(members, channels),
            )
        self._errors.add(path, members, channels + block.start, rows, merged)
        stored = merged.view(-1, *block.base.shape[1:]).to(self._dtype)
        # A sum is much faster than a look at every number, and tells enough unless the dtype's range is narrow.
        if (self._dtype == torch.float16 or not merged.sum().isfinite()) and not stored.isfinite().all():
            owners = " and ".join(self._names[member] for member in members)
            raise ValueError(f"{block.name}: the merged rows of {owners} do not fit {self._dtype}: use a wider dtype")
        return stored


class RandomMasks:
    """What a random drop keeps of the experts' rows of one parameter in one chunk; made when first asked for."""

    def __init__(self, seed: int, expert_names: list[str], block: Block, density: float):
        self._seed, self._names, self._parameter, self._density = seed, expert_names, block.name, density
        self._count = block.base.numel()
        self._width = block.base[0].numel()
        self._start = block.start * self._width
        self._device = block.base.device
        self._masks: dict[int, torch.Tensor] = {}

    def rows(self, members: tuple[int, ...], channels: torch.Tensor) -> torch.Tensor:
        """(M, channels, I) bool."""
        return torch.stack([self._mask(member)[channels] for member in members])

    def _mask(self, expert: int) -> torch.Tensor:
        """(C, I) bool."""
        if expert not in self._masks:
            mask = keep_mask(
                self._seed, self._names[expert], self._parameter, self._start, self._count, self._density, self._device
            )
            self._masks[expert] = mask.view(-1, self._width)
        return self._masks[expert]
