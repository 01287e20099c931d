"""Conversion in two passes over the checkpoints, in row chunks.

The first pass groups the experts' rows of every channel and lays out every matrix; with that the headers of the output
are known. The second pass reads again and writes the merged rows to their final places. What the first pass decides
lies in files of the staging folder until the second reads it, module by module, so that memory is bounded by the
chunk; no result depends on its size. Modules are worked on side by side, one thread each: that uses several cores
better than splitting the small operations of one module.

A journal in the staging folder has the hashes of the first pass's files and of every finished shard. The same
conversion goes on from there after it was stopped, and gives the same bytes.

Shapes: N experts, C channels of one chunk, O channels, I inputs, R rows, M members of a group.
"""

import contextlib
import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import modeling_channel_merged
from conversion.channel_grouping import equal_rows, gram_matrices, group_channels
from conversion.delta_errors import DeltaErrors
from conversion.expert_reader import ExpertReader
from conversion.generate import find_device
from conversion.hub_folder import add_relative_errors, conversion_report, package_versions, write_hub_files
from conversion.journal import Journal, file_identity, fingerprint
from conversion.memory_budget import CHUNK_BYTES, own_modules, plan_memory, row_bytes
from conversion.merge_methods import MagnitudeThreshold, MergeMethod, keep_mask, merge_rows
from conversion.plan import Plan, make_plan
from conversion.recipe import Recipe, load_recipe
from conversion.row_layout import layout_rows
from conversion.shard_writer import ShardWriter, StagedFolder, TensorSpec, parse_size
from conversion.vocabulary import fill_missing_rows, layout_present

MAX_MEMORY = "2GB"
THRESHOLD_PREFIX = "thresholds."


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
    experts: list[torch.Tensor]  # where an expert has no such channel (token), another one's row
    present: torch.Tensor | None = None  # (N, C) bool: which experts have which channels; None: all have all

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.base, *self.experts))

    def deltas(self) -> torch.Tensor:
        """Differences from the base in float32: (N, C, I); a bias is a matrix of one input."""
        deltas = torch.empty(len(self.experts), *self.base.shape, device=self.base.device)
        for delta, rows in zip(deltas, self.experts, strict=True):
            delta.copy_(rows)
        return deltas.sub_(self.base.float()).view(*deltas.shape[:2], -1)

    def rows(self, dtype: torch.dtype) -> torch.Tensor:
        """The experts' rows as a merged checkpoint stores them: (N, C, I), or (N, C) of a bias."""
        return torch.stack([rows.to(dtype) for rows in self.experts])


@dataclass(frozen=True)
class GroupedModule:
    """What the first pass decides about one channel module: its numbers, and the file with the rest."""

    file: Path
    num_rows: int
    num_merged: int  # rows whose owners stored different rows; the others are copied
    num_distinct: int  # rows that differ from each other, over all channels
    delta_squares: torch.Tensor  # (N,) float64: squared norm of each expert's deltas
    rows_by_owners: dict[int, int]  # bit mask of the owners -> rows
    has_fallback: bool  # of an embedding: a last row that is read for tokens that an expert does not have

    def owner_counts(self, names: list[str]) -> dict[str, int]:
        """Rows by the names of their owners."""
        return {
            "+".join(name for e, name in enumerate(names) if owners >> e & 1): count
            for owners, count in self.rows_by_owners.items()
        }

    def load(self) -> "ModuleRows":
        return ModuleRows(load_file(self.file))


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of one matrix that have the same owners and whose channels are in one chunk."""

    members: tuple[int, ...]  # the owners, ascending
    start: int
    channels: torch.Tensor  # (rows,), ascending


class ModuleRows:
    """The rows of one matrix: owners, channels, and whether they are copied or merged.

    Args:
        tensors: channel_index (N, O) int32, -1 where an expert has no such channel; copied (R,) bool: all owners store
            the same row; num_distinct, a scalar; has_fallback, a scalar bool: there is one more row, which an
            embedding reads for tokens that an expert does not have; delta_squares (N,) float64;
            thresholds.<parameter> (N,) float32 where the method trims.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self._tensors = tensors
        self.copied = tensors["copied"]
        self.has_fallback = bool(tensors["has_fallback"])
        self.thresholds = {
            name.removeprefix(THRESHOLD_PREFIX): value
            for name, value in tensors.items()
            if name.startswith(THRESHOLD_PREFIX)
        }
        self._row_channel = torch.zeros(len(self.copied), dtype=torch.int64)
        self._row_owners = torch.zeros(len(self.copied), dtype=torch.int64)
        for expert, index in enumerate(tensors["channel_index"]):
            channels = (index >= 0).nonzero()[:, 0]
            rows = index[channels].long()
            self._row_channel[rows] = channels
            self._row_owners[rows] |= 1 << expert
        self._by_channel = torch.argsort(self._row_channel, stable=True)
        self._sorted_channels = self._row_channel[self._by_channel]

    @property
    def num_rows(self) -> int:
        return len(self.copied) + self.has_fallback

    def channel_index(self, kind: str) -> torch.Tensor:
        """The index of this module, or of a head tied to it, (N, O) int32: an embedding reads its last row for -1."""
        index = self._tensors["channel_index"]
        return torch.where(index < 0, self.num_rows - 1, index) if kind == "embedding" else index

    def summary(self, file: Path) -> GroupedModule:
        owners, counts = self._row_owners.unique_consecutive(return_counts=True)
        return GroupedModule(
            file=file,
            num_rows=self.num_rows,
            num_merged=int((~self.copied).sum()),
            num_distinct=int(self._tensors["num_distinct"]),
            delta_squares=self._tensors["delta_squares"],
            has_fallback=self.has_fallback,
            rows_by_owners=dict(zip(owners.tolist(), counts.tolist(), strict=True)),
        )

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        """The rows of channels `start` to `stop`: each block's rows are consecutive, for the channels ascend."""
        first, last = torch.searchsorted(self._sorted_channels, torch.tensor([start, stop])).tolist()
        rows = self._by_channel[first:last].sort().values
        owners = self._row_owners[rows]
        edges = [0, *(owners.diff().nonzero()[:, 0] + 1).tolist(), len(rows)] if len(rows) else []
        for begin, end in pairwise(edges):
            mask = int(owners[begin])
            members = tuple(expert for expert in range(mask.bit_length()) if mask >> expert & 1)
            yield RowBlock(members, int(rows[begin]), self._row_channel[rows[begin:end]])


def convert(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    overwrite: bool = False,
    max_memory: int | str = MAX_MEMORY,
    chunk_bytes: int = CHUNK_BYTES,
    max_shard_size: int | str = "5GB",
    device: str = "cpu",
    progress: bool = True,
) -> Conversion:
    """Merge the experts of a recipe into one channel-merged checkpoint.

    A conversion that is stopped from outside keeps its finished parts in a hidden folder beside `out`; the same call
    goes on from there. Changed inputs, another recipe or another version start afresh.

    Args:
        recipe: a recipe, or the path of its YAML file.
        out: the folder to make. It appears only when it is complete.
        overwrite: replace a model folder that is there.
        max_memory: memory that may be used beside the interpreter's own, bytes or a size such as "2GB"; no result
            depends on it, nor on the next.
        chunk_bytes: the most bytes of float32 rows that a thread takes at a time.
        max_shard_size: largest safetensors file, bytes or a size such as "5GB".
        device: where the arithmetic runs.
        progress: show a progress bar.

    Raises:
        ValueError: the recipe, the checkpoints, the output folder or the budget are not as they must be.
        OSError: a file cannot be read or written.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    out = Path(out)
    parse_size(max_shard_size)
    plan = make_plan(recipe, out, overwrite=overwrite)
    memory = plan_memory(plan, parse_size(max_memory, "max_memory"), torch.get_num_threads(), chunk_bytes)
    blocks = BlockReader(plan, memory.chunk_bytes, find_device(device))
    with contextlib.ExitStack() as stack:
        staged = stack.enter_context(
            StagedFolder(out, overwrite, conversion_fingerprint(plan, max_shard_size=max_shard_size, device=device))
        )
        for reader in (plan.base_reader, *plan.readers):
            stack.callback(reader.close)
        bar = stack.enter_context(
            tqdm(total=2 * plan.bytes_to_read, unit="B", unit_scale=True, disable=not progress, dynamic_ncols=True)
        )
        workers = Workers(memory.threads, blocks.stop)
        bar.set_description("grouping channels")
        grouped = group_modules(plan, blocks, workers, staged.journal, bar)
        report = conversion_report(plan, grouped)
        bar.set_description("merging rows")
        writer = ShardWriter(staged.path, output_tensors(plan, grouped), max_shard_size, staged.journal)
        stack.callback(writer.close)
        errors = write_modules(plan, blocks, workers, grouped, writer, staged.journal, bar)
        add_relative_errors(report, plan, grouped, errors)
        writer.finish({"total_parameters": report["parameters"]["stored"]})
        bar.set_description("writing files")
        rows = {path: module.num_rows for path, module in all_modules(plan, grouped).items()}
        staged.publish(write_hub_files(staged.path, plan, rows, report))
    return Conversion(out, report)


def conversion_fingerprint(plan: Plan, **choices: Any) -> str:
    """Hash of everything that the bytes of a conversion depend on: recipe, input files, versions, this code."""
    code = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(modeling_channel_merged.__file__).parent):
        for file in sorted(folder.glob("*.py")):
            code.update(file.read_bytes())
    return fingerprint(
        {
            "recipe": plan.recipe.record(),
            "inputs": [file_identity(source.folder) for source in (plan.base, *plan.experts)],
            "versions": package_versions(),
            "code": code.hexdigest(),
            **choices,
        }
    )


def all_modules(plan: Plan, grouped: dict[str, GroupedModule]) -> dict[str, GroupedModule]:
    """Every channel module's grouping: a tied head has its embedding's."""
    return {path: grouped[module.tied_to or path] for path, module in plan.modules.channel.items()}


class Stopped(Exception):
    """Another thread failed, and what this one does is not needed any more."""


class BlockReader:
    """Reads the parameters of a module from all checkpoints, chunk by chunk.

    Args:
        plan: the checked conversion.
        chunk_bytes: of float32 rows in one chunk; a row is never split.
        device: where the blocks go.
    """

    def __init__(self, plan: Plan, chunk_bytes: int, device: torch.device):
        self.device = device
        self._plan = plan
        self.max_bytes = chunk_bytes
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let every thread that reads blocks end at its next chunk."""
        self._stopped.set()

    def chunks(self, path: str) -> list[tuple[int, int]]:
        """Row ranges of a module."""
        channels = self._plan.modules.channel[path].out_features
        count = max(1, self.max_bytes // row_bytes(self._plan, path))
        return [(start, min(start + count, channels)) for start in range(0, channels, count)]

    def blocks(self, path: str) -> Iterator[list[Block]]:
        """For every chunk of a module its parameters' blocks: the weight, and the bias if it has one."""
        names = self._plan.channel_parameters(path)
        for start, stop in self.chunks(path):
            if self._stopped.is_set():
                raise Stopped
            yield [self._read(name, start, stop) for name in names]

    def _read(self, name: str, start: int, stop: int) -> Block:
        base, *experts = (
            reader.read_rows(name, start, stop).to(self.device)
            for reader in (self._plan.base_reader, *self._plan.readers)
        )
        present = self._plan.present(name.rpartition(".")[0])
        if present is not None:
            present = present[:, start:stop].to(self.device)
            fill_missing_rows(experts, base, present)
        return Block(name, start, stop, base, experts, present)


@dataclass(frozen=True)
class Workers:
    """Threads that work on one item each; their own tensor operations are not split further.

    Args:
        threads: how many.
        stop: called at the first error, so that the other threads end early too.
    """

    threads: int
    stop: Callable[[], None]

    def for_each(self, function: Callable, items: Iterable) -> list:
        """`function` of every item, in the items' order. The first error stops the rest."""
        items = list(items)
        before = torch.get_num_threads()
        with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.stop()
                pool.shutdown(cancel_futures=True)
                raise
            finally:
                torch.set_num_threads(before)
        return [future.result() for future in futures]


# The first pass


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
            rows = ModuleRows(load_file(files[path]))
            bar.update(module_bytes_to_read(plan, path))
        else:
            tensors = group_module(plan, blocks, path, bar)
            journal.save(path, files[path], tensors)
            rows = ModuleRows(tensors)
        return rows.summary(files[path])

    longest_first = sorted(own, key=lambda path: math.prod(plan.shapes[f"{path}.weight"]), reverse=True)
    grouped = dict(zip(longest_first, workers.for_each(group, longest_first), strict=True))
    return {path: grouped[path] for path in own}


def module_bytes_to_read(plan: Plan, path: str) -> int:
    readers = (plan.base_reader, *plan.readers)
    return sum(reader.tensors[name].num_bytes for reader in readers for name in plan.channel_parameters(path))


def group_module(plan: Plan, blocks: BlockReader, path: str, bar: tqdm) -> dict[str, torch.Tensor]:
    """Decide the groups of every channel of one module from the Gram matrices of its deltas: see `ModuleRows`."""
    grouping = plan.recipe.grouping
    trims = new_trims(plan, plan.channel_parameters(path))
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
    tensors = lay_out(torch.cat(labels, dim=1), torch.cat(distinct, dim=1), plan.present(path))
    is_embedding = plan.modules.channel[path].kind == "embedding"
    tensors["has_fallback"] = (tensors["channel_index"] < 0).any() & is_embedding
    squares, present = torch.cat(squares).T, plan.present(path)
    tensors["delta_squares"] = squares.sum(1) if present is None else (squares * present).sum(1)
    if tensors["copied"].all():
        return tensors
    while not all(trim.complete for parts in trims.values() for trim in parts):
        for parameters in blocks.blocks(path):
            update_trims(trims, [block.deltas() for block in parameters], parameters[0].present)
    thresholds = {THRESHOLD_PREFIX + name: torch.tensor([t.value for t in parts]) for name, parts in trims.items()}
    return tensors | thresholds


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
) -> dict[str, torch.Tensor]:
    """Rows of one matrix in their final order.

    Args:
        labels: (N, O) the group of each expert.
        distinct: (N, O) the first expert with the same row.
        present: (N, O) bool, which experts have which channels; None: all have all.

    Returns:
        channel_index, copied and num_distinct of `ModuleRows`.
    """
    layout = layout_rows(labels) if present is None else layout_present(labels, present)
    copied = torch.ones(len(layout.row_owners), dtype=torch.bool)
    first = torch.full(copied.shape, -1, dtype=distinct.dtype)  # `distinct` of each row's lowest owner
    for expert, same_as in enumerate(distinct):
        owned = ((layout.row_owners >> expert) & 1).bool()
        here = same_as[layout.row_channel]
        copied &= ~owned | (first < 0) | (first == here)
        first = torch.where(owned & (first < 0), here, first)
    return {
        "channel_index": layout.channel_index,
        "copied": copied,
        "num_distinct": torch.tensor(count_distinct(distinct, present)),
    }


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
    return tensors + [TensorSpec(name, shape, torch.float32) for name, shape in router_shapes(plan).items()]


def write_modules(
    plan: Plan,
    blocks: BlockReader,
    workers: Workers,
    grouped: dict[str, GroupedModule],
    writer: ShardWriter,
    journal: Journal,
    bar: tqdm,
) -> DeltaErrors:
    """Write every tensor of the merged checkpoint that is not there yet.

    Shards are finished one after the other; within one the longest work comes first.

    Returns:
        How far the merged rows are from the experts' own.
    """
    for path, module in all_modules(plan, grouped).items():
        name = f"model.{path}.channel_index"
        if not writer.is_written(name):
            writer.write(name, module.load().channel_index(plan.modules.channel[path].kind))
    errors = DeltaErrors(plan.num_experts)
    merger = RowMerger(plan, errors, blocks.device)
    files = {path: journal.folder / f"errors-{number:05d}.safetensors" for number, path in enumerate(grouped)}

    def write_rows(path: str) -> None:
        missing = {name for name in plan.channel_parameters(path) if not writer.is_written(stored_name(path, name))}
        part = f"errors of {path}"
        if not missing and journal.finished(part):
            errors.restore(path, load_file(files[path])["squares"])
            bar.update(module_bytes_to_read(plan, path))
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


def stored_name(path: str, parameter: str) -> str:
    """What a merged checkpoint calls the rows of one of a module's parameters."""
    return f"model.{path}.rows.{parameter.removeprefix(f'{path}.')}"


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
    for parameters in blocks.blocks(path):
        for block in parameters:
            for start, rows in merger.merged_rows(path, block, module):
                if block.name in missing:
                    writer.write(stored_name(path, block.name), rows.cpu(), start)
        bar.update(sum(block.num_bytes for block in parameters))
    if module.has_fallback and f"{path}.weight" in missing:
        row = plan.base_reader.mean_row(f"{path}.weight").to(plan.dtype)
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
    reader: ExpertReader, name: str, writer: ShardWriter, stored: str, dtype: torch.dtype, max_bytes: int
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

    def __init__(self, plan: Plan, errors: DeltaErrors, device: torch.device):
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

    def merged_rows(self, path: str, block: Block, module: ModuleRows) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows of one parameter that belong to a chunk's channels.

        Args:
            path: the module that the parameter is in.
            block: the parameter in the chunk, (C, I) or (C,).
            module: the rows of its module.

        Yields:
            The place of the first row, and consecutive rows (rows, I) or (rows,) in the output dtype.
        """
        thresholds = module.thresholds.get(block.name)
        masks = None
        if self._method.needs_mask:
            masks = RandomMasks(self._seed, self._names, block, self._method.density)
        for part in module.blocks(block.start, block.stop):
            channels = (part.channels - block.start).to(block.base.device)
            copied = module.copied[part.start : part.start + len(channels)].to(block.base.device)
            merged = (~copied).nonzero()[:, 0]
            if len(merged) == len(channels):
                rows = self._merge(path, block, part.members, channels, thresholds, masks)
            else:
                rows = block.experts[part.members[0]][channels].to(self._dtype)
                if len(merged):
                    rows[merged] = self._merge(path, block, part.members, channels[merged], thresholds, masks)
            yield part.start, rows

    def _merge(
        self,
        path: str,
        block: Block,
        members: tuple[int, ...],
        channels: torch.Tensor,
        thresholds: torch.Tensor | None,
        masks: "RandomMasks | None",
    ) -> torch.Tensor:
        """Merge the members' rows of some channels of a chunk: (channels, I) or (channels,) in the output dtype."""
        base = block.base[channels]
        rows = gather_rows([block.experts[member] for member in members], channels)
        rows = rows.view(len(members), len(channels), -1)
        merged = merge_rows(
            base.view(len(channels), -1),
            rows,
            self._weights[list(members)],
            self._method,
            thresholds=None if thresholds is None else thresholds[list(members)],
            keep=None if masks is None else masks.rows(members, channels),
        )
        self._errors.add(path, members, channels + block.start, rows, merged)
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


def gather_rows(experts: list[torch.Tensor], channels: torch.Tensor) -> torch.Tensor:
    """Some rows of each of M tensors (C, *): (M, channels, *) in their dtype, in float32 where they have several."""
    dtypes = {rows.dtype for rows in experts}
    gathered = torch.empty(
        len(experts),
        len(channels),
        *experts[0].shape[1:],
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        device=channels.device,
    )
    for out, rows in zip(gathered, experts, strict=True):
        if rows.dtype == out.dtype:
            torch.index_select(rows, 0, channels, out=out)
        else:
            out.copy_(rows[channels])
    return gathered
