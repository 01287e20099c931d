"""Conversion in two passes over the checkpoints, in row chunks.

The first pass groups the experts' rows of every channel and lays out every matrix; with that the headers of the output
are known. The second pass reads again and writes the merged rows to their final places. Memory is bounded by the
chunk, and no result depends on its size. Modules are worked on side by side, one thread each: that uses several cores
better than splitting the small operations of one module.

Shapes: N experts, C channels of one chunk, O channels, I inputs, R rows, M members of a group.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from conversion.channel_grouping import equal_rows, gram_matrices, group_channels
from conversion.expert_reader import ExpertReader
from conversion.hub_folder import conversion_report, write_hub_files
from conversion.merge_methods import MagnitudeThreshold, MergeMethod, keep_mask, merge_rows
from conversion.plan import Plan, make_plan
from conversion.recipe import Recipe, load_recipe
from conversion.shard_writer import ShardWriter, StagedFolder, TensorSpec, parse_size
from modeling_channel_merged.channel_ops import RowLayout, layout_rows

logger = logging.getLogger(__name__)

CHUNK_BYTES = 16 * 2**20  # of float32 rows of the base and all experts, for each thread
MAX_THREADS = 8


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: where it is, and what conversion_report.json says."""

    folder: Path
    report: dict[str, Any]


@dataclass(frozen=True)
class Block:
    """One parameter of a channel module in the rows of one chunk, as it is stored: (C, I), or (C,) of a bias."""

    name: str  # the parameter's, in the base architecture
    start: int
    stop: int
    base: torch.Tensor
    experts: list[torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.base, *self.experts))

    def deltas(self) -> torch.Tensor:
        """Differences from the base in float32: (N, C, I); a bias is a matrix of one input."""
        deltas = torch.empty(len(self.experts), *self.base.shape)
        for delta, rows in zip(deltas, self.experts, strict=True):
            delta.copy_(rows)
        return deltas.sub_(self.base.float()).view(*deltas.shape[:2], -1)

    def rows(self, dtype: torch.dtype) -> torch.Tensor:
        """The experts' rows as a merged checkpoint stores them: (N, C, I), or (N, C) of a bias."""
        return torch.stack([rows.to(dtype) for rows in self.experts])


@dataclass(frozen=True)
class OwnerSegment:
    """Consecutive rows of one matrix that have the same owners."""

    members: tuple[int, ...]  # the owners, ascending
    start: int
    stop: int


@dataclass(frozen=True)
class GroupedModule:
    """What the first pass decides about one channel module."""

    layout: RowLayout
    segments: tuple[OwnerSegment, ...]
    copied: torch.Tensor  # (R,) bool: all owners store the same row, it is copied and not merged
    num_distinct: int  # rows that differ from each other, over all channels
    thresholds: dict[str, torch.Tensor]  # parameter name -> (N,) trim thresholds, float32

    @property
    def num_rows(self) -> int:
        return len(self.copied)

    def owner_counts(self, names: list[str]) -> dict[str, int]:
        """Rows by the names of their owners."""
        return {"+".join(names[e] for e in part.members): part.stop - part.start for part in self.segments}


def convert(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    overwrite: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> Conversion:
    """Merge the experts of a recipe into one channel-merged checkpoint.

    Args:
        recipe: a recipe, or the path of its YAML file.
        out: the folder to make. It appears only when it is complete.
        overwrite: replace a model folder that is there.
        chunk_bytes: bytes of float32 rows that a thread holds at a time; no result depends on it.
        max_shard_size: largest safetensors file, bytes or a size such as "5GB".
        progress: show a progress bar.

    Raises:
        ValueError: the recipe, the checkpoints or the output folder are not as they must be.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    out = Path(out)
    parse_size(max_shard_size)
    plan = make_plan(recipe, out, overwrite=overwrite)
    with contextlib.ExitStack() as stack:
        staged = stack.enter_context(StagedFolder(out, overwrite))
        for reader in (plan.base_reader, *plan.readers):
            stack.callback(reader.close)
        bar = stack.enter_context(
            tqdm(total=2 * plan.bytes_to_read, unit="B", unit_scale=True, disable=not progress, dynamic_ncols=True)
        )
        blocks = BlockReader(plan, chunk_bytes)
        bar.set_description("grouping channels")
        grouped = group_modules(plan, blocks, bar)
        report = conversion_report(plan, grouped)
        bar.set_description("merging rows")
        writer = ShardWriter(staged.path, output_tensors(plan, grouped), max_shard_size)
        stack.callback(writer.close)
        write_modules(plan, blocks, grouped, writer, bar)
        writer.finish({"total_parameters": report["parameters"]["stored"]})
        bar.set_description("writing files")
        rows = {path: module.num_rows for path, module in all_modules(plan, grouped).items()}
        staged.publish(write_hub_files(staged.path, plan, rows, report))
    return Conversion(out, report)


def all_modules(plan: Plan, grouped: dict[str, GroupedModule]) -> dict[str, GroupedModule]:
    """Every channel module's grouping: a tied head has its embedding's."""
    return {path: grouped[module.tied_to or path] for path, module in plan.modules.channel.items()}


class BlockReader:
    """Reads the parameters of a module from all checkpoints, chunk by chunk."""

    def __init__(self, plan: Plan, chunk_bytes: int):
        self._plan = plan
        self._chunk_bytes = chunk_bytes

    def chunks(self, path: str) -> list[tuple[int, int]]:
        """Row ranges of a module; a row is never split."""
        module = self._plan.modules.channel[path]
        row_bytes = 4 * module.in_features * (self._plan.num_experts + 1)
        count = max(1, self._chunk_bytes // row_bytes)
        return [(start, min(start + count, module.out_features)) for start in range(0, module.out_features, count)]

    def blocks(self, path: str) -> Iterator[list[Block]]:
        """For every chunk of a module its parameters' blocks: the weight, and the bias if it has one."""
        names = self._plan.channel_parameters(path)
        return ([self._read(name, start, stop) for name in names] for start, stop in self.chunks(path))

    def _read(self, name: str, start: int, stop: int) -> Block:
        base, *experts = (
            reader.read_rows(name, start, stop) for reader in (self._plan.base_reader, *self._plan.readers)
        )
        return Block(name, start, stop, base, experts)


def for_each(function: Callable, items: Iterable) -> list:
    """`function` of every item, in the items' order, computed by one thread per core that work on one item each.

    The threads' own tensor operations are not split further; the caller's number of threads is the number of threads
    here. The first error stops the rest.
    """
    items = list(items)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(min(threads, MAX_THREADS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(threads)
    return [future.result() for future in futures]


# The first pass


def group_modules(plan: Plan, blocks: BlockReader, bar: tqdm) -> dict[str, GroupedModule]:
    """Group every channel module that stores rows of its own, by path."""
    own = []
    for path, module in plan.modules.channel.items():
        if module.tied_to is None:
            own.append(path)
            continue
        for reader in (plan.base_reader, *plan.readers):
            check_tied_head(reader, f"{path}.weight", f"{module.tied_to}.weight", blocks.chunks(path))
    own.sort(key=lambda path: math.prod(plan.shapes[f"{path}.weight"]), reverse=True)  # the longest work first
    grouped = dict(zip(own, for_each(lambda path: group_module(plan, blocks, path, bar), own), strict=True))
    return {path: grouped[path] for path in plan.modules.channel if path in grouped}


def group_module(plan: Plan, blocks: BlockReader, path: str, bar: tqdm) -> GroupedModule:
    """Decide the groups of every channel of one module from the Gram matrices of its deltas."""
    grouping = plan.recipe.grouping
    trims = new_trims(plan, plan.channel_parameters(path))
    labels, distinct = [], []
    for parameters in blocks.blocks(path):
        deltas = [block.deltas() for block in parameters]
        rows = [block.rows(plan.dtype) for block in parameters]
        gram = sum(gram_matrices(part) for part in deltas)
        check_finite(plan, parameters, rows, gram)
        distinct.append(equal_rows(rows[0], rows[1] if len(rows) > 1 else None))
        labels.append(
            group_channels(gram, distinct[-1], num_groups=grouping.num_groups, similarity=grouping.similarity)
        )
        update_trims(trims, deltas)
        bar.update(sum(block.num_bytes for block in parameters))
    layout, segments, copied = lay_out(torch.cat(labels, dim=1), torch.cat(distinct, dim=1))
    while not (copied.all() or all(trim.complete for parts in trims.values() for trim in parts)):
        for parameters in blocks.blocks(path):
            update_trims(trims, [block.deltas() for block in parameters])
    return GroupedModule(
        layout=layout,
        segments=segments,
        copied=copied,
        num_distinct=sum(int((part == torch.arange(len(part))[:, None]).sum()) for part in distinct),
        thresholds={
            name: torch.tensor([trim.value for trim in parts]) for name, parts in trims.items() if not copied.all()
        },
    )


def new_trims(plan: Plan, names: list[str]) -> dict[str, list[MagnitudeThreshold]]:
    """One trim threshold to be found for each expert's tensors of these names, if the method trims."""
    method = plan.recipe.method()
    if not method.needs_threshold:
        return {}
    sizes = {name: plan.readers[0].tensors[name].numel for name in names}
    return {name: [MagnitudeThreshold(size, method.density) for _ in plan.readers] for name, size in sizes.items()}


def update_trims(trims: dict[str, list[MagnitudeThreshold]], deltas: list[torch.Tensor]) -> None:
    """Show the trims, if there are any, the next chunk's deltas: (N, C, I) per parameter."""
    for parts, part in zip(trims.values(), deltas, strict=False):
        for trim, delta in zip(parts, part, strict=True):
            trim.update(delta)


def lay_out(labels: torch.Tensor, distinct: torch.Tensor) -> tuple[RowLayout, tuple[OwnerSegment, ...], torch.Tensor]:
    """Rows of one matrix in their final order.

    Args:
        labels: (N, O) the group of each expert.
        distinct: (N, O) the first expert with the same row.

    Returns:
        The layout; its segments; (R,) bool, whether all owners of a row store the same.
    """
    layout = layout_rows(labels)
    owners = layout.row_owners
    edges = [0, *(owners.diff().nonzero()[:, 0] + 1).tolist(), len(owners)]
    segments = []
    copied = torch.ones(len(owners), dtype=torch.bool)
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        members = tuple(expert for expert in range(len(labels)) if int(owners[start]) >> expert & 1)
        segments.append(OwnerSegment(members, start, stop))
        first, *others = distinct[list(members)][:, layout.row_channel[start:stop]]
        for other in others:
            copied[start:stop] &= other == first
    return layout, tuple(segments), copied


def check_tied_head(reader: ExpertReader, head: str, embedding: str, chunks: list[tuple[int, int]]) -> None:
    """A checkpoint of a tied architecture may hold its head too, if that is the embedding."""
    if head not in reader.tensors:
        return
    for start, stop in chunks:
        if not torch.equal(reader.read_rows(head, start, stop), reader.read_rows(embedding, start, stop)):
            raise ValueError(
                f"{reader.name}: {head} differs from {embedding} between rows {start} and {stop}, "
                "but the config ties them (tie_word_embeddings)"
            )


def check_finite(plan: Plan, parameters: list[Block], rows: list[torch.Tensor], gram: torch.Tensor) -> None:
    """ValueError naming the tensor that holds NaN or infinity, or that the output dtype cannot hold."""
    narrowed = plan.dtype == torch.float16 and not all(bool(part.isfinite().all()) for part in rows)
    if gram.isfinite().all() and not narrowed:
        return
    for block in parameters:
        for reader, tensor in zip((plan.base_reader, *plan.readers), (block.base, *block.experts), strict=True):
            check_tensor_finite(reader.name, block.name, tensor, plan.dtype)
    raise ValueError(f"{parameters[0].name}: the experts are too far from the base for float32 arithmetic")


def check_tensor_finite(owner: str, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """ValueError if a tensor holds NaN or infinity as it is stored, or will in the output dtype."""
    if not tensor.isfinite().all():
        raise ValueError(f"{owner}: {name} holds NaN or infinity")
    if not tensor.to(dtype).isfinite().all():
        raise ValueError(f"{owner}: {name} holds {float(tensor.abs().max()):g}, which {dtype} cannot hold")


# The second pass


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
    hidden_size = plan.text_config.hidden_size
    tensors.append(TensorSpec("router.head.weight", (plan.num_experts, hidden_size), torch.float32))
    tensors.append(TensorSpec("router.head.bias", (plan.num_experts,), torch.float32))
    return tensors


def write_modules(
    plan: Plan, blocks: BlockReader, grouped: dict[str, GroupedModule], writer: ShardWriter, bar: tqdm
) -> None:
    """Write every tensor of the merged checkpoint."""
    for path, module in all_modules(plan, grouped).items():
        writer.write(f"model.{path}.channel_index", module.layout.channel_index)
    merger = RowMerger(plan)

    def write_rows(path: str) -> None:
        for parameters in blocks.blocks(path):
            for block in parameters:
                kind = block.name.removeprefix(f"{path}.")
                for start, rows in merger.merged_rows(block, grouped[path]):
                    writer.write(f"model.{path}.rows.{kind}", rows, start)
            bar.update(sum(block.num_bytes for block in parameters))

    for_each(write_rows, sorted(grouped, key=lambda path: grouped[path].layout.row_channel.numel(), reverse=True))
    write_per_expert(plan, writer, bar)
    writer.write("router.head.weight", torch.zeros(plan.num_experts, plan.text_config.hidden_size))
    writer.write("router.head.bias", torch.zeros(plan.num_experts))


def write_per_expert(plan: Plan, writer: ShardWriter, bar: tqdm) -> None:
    """Copy the parameters that have no channels, one exact copy per expert."""
    for path, names in plan.modules.per_expert.items():
        for name in names:
            for expert, reader in enumerate(plan.readers):
                tensor = reader.read(f"{path}.{name}")
                check_tensor_finite(reader.name, f"{path}.{name}", tensor, plan.dtype)
                writer.write(f"model.{path}.experts.{expert}.{name}", tensor.to(plan.dtype))
                bar.update(2 * tensor.nbytes)  # the first pass has no need of it


class RowMerger:
    """Turns the experts' rows of one chunk into the merged rows, with the recipe's method."""

    def __init__(self, plan: Plan):
        self._method: MergeMethod = plan.recipe.method()
        self._weights = torch.tensor([expert.weight for expert in plan.recipe.experts], dtype=torch.float32)
        self._names = plan.expert_names
        self._seed = plan.recipe.seed
        self._dtype = plan.dtype

    def merged_rows(self, block: Block, module: GroupedModule) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows of one parameter that belong to a chunk's channels.

        Args:
            block: the parameter in the chunk, (C, I) or (C,).
            module: the groups of its module.

        Yields:
            The place of the first row, and consecutive rows (rows, I) or (rows,) in the output dtype.
        """
        chunk = torch.tensor([block.start, block.stop])
        thresholds = module.thresholds.get(block.name)
        masks = None
        if self._method.needs_mask:
            masks = RandomMasks(self._seed, self._names, block, self._method.density)
        for segment in module.segments:
            channels = module.layout.row_channel[segment.start : segment.stop]  # ascending
            first, last = torch.searchsorted(channels, chunk).tolist()
            if first == last:
                continue
            local = channels[first:last] - block.start
            merged = (~module.copied[segment.start + first : segment.start + last]).nonzero()[:, 0]
            if len(merged) == len(local):
                rows = self._merge(block, segment.members, local, thresholds, masks)
            else:
                rows = block.experts[segment.members[0]][local].to(self._dtype)
                if len(merged):
                    rows[merged] = self._merge(block, segment.members, local[merged], thresholds, masks)
            yield segment.start + first, rows

    def _merge(
        self,
        block: Block,
        members: tuple[int, ...],
        channels: torch.Tensor,
        thresholds: torch.Tensor | None,
        masks: "RandomMasks | None",
    ) -> torch.Tensor:
        """Merge the members' rows of some channels of a chunk: (channels, I) or (channels,) in the output dtype."""
        base = block.base[channels]
        rows = gather_rows([block.experts[member] for member in members], channels)
        merged = merge_rows(
            base.view(len(channels), -1),
            rows.view(len(members), len(channels), -1),
            self._weights[list(members)],
            self._method,
            thresholds=None if thresholds is None else thresholds[list(members)],
            keep=None if masks is None else masks.rows(members, channels),
        )
        stored = merged.view(base.shape).to(self._dtype)
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
        self._masks: dict[int, torch.Tensor] = {}

    def rows(self, members: tuple[int, ...], channels: torch.Tensor) -> torch.Tensor:
        """(M, channels, I) bool."""
        return torch.stack([self._mask(member)[channels] for member in members])

    def _mask(self, expert: int) -> torch.Tensor:
        """(C, I) bool."""
        if expert not in self._masks:
            mask = keep_mask(self._seed, self._names[expert], self._parameter, self._start, self._count, self._density)
            self._masks[expert] = mask.view(-1, self._width)
        return self._masks[expert]


def gather_rows(experts: list[torch.Tensor], channels: torch.Tensor) -> torch.Tensor:
    """Some rows of each of M tensors (C, *): (M, channels, *) in their dtype, in float32 where they have several."""
    dtypes = {rows.dtype for rows in experts}
    gathered = torch.empty(
        len(experts), len(channels), *experts[0].shape[1:], dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32
    )
    for out, rows in zip(gathered, experts, strict=True):
        if rows.dtype == out.dtype:
            torch.index_select(rows, 0, channels, out=out)
        else:
            out.copy_(rows[channels])
    return gathered
