"""The second pass of adding an expert: stored rows are copied to their new places, its own ones are read.

Shapes: N experts, O channels, I inputs, R rows, V tokens.
"""

import math
from collections.abc import Mapping

import torch
from tqdm import tqdm

from conversion.addition.module_addition import ModuleAddition, chunks_of, with_expert
from conversion.addition.plan import Addition
from conversion.channels.row_layout import RowLayout
from conversion.checkpoints.architecture import channel_parameters
from conversion.checkpoints.merged_checkpoint import stored_name
from conversion.checkpoints.stored_expert import read_rows_at
from conversion.io.shard_writer import ShardWriter, TensorSpec
from conversion.merging.merging_pass import write_copy
from conversion.vocabulary.vocabulary_reader import MEAN_ROWS


def extended_tensors(
    addition: Addition, modules: Mapping[str, ModuleAddition], router: Mapping[str, torch.Tensor]
) -> list[TensorSpec]:
    """Every tensor of the new checkpoint."""
    merged, tensors = addition.merged, []
    for path, module in merged.modules.channel.items():
        rows, dtype = modules[module.tied_to or path].num_rows, addition.stored_dtype(path)
        if module.tied_to is None:
            tensors.append(TensorSpec(f"model.{path}.rows.weight", (rows, module.in_features), dtype))
        if module.bias:
            tensors.append(TensorSpec(f"model.{path}.rows.bias", (rows,), dtype))
        shape = (addition.num_experts, module.out_features)
        tensors.append(TensorSpec(f"model.{path}.channel_index", shape, torch.int32))
    for path, parameters in merged.modules.per_expert.items():
        for parameter in parameters:
            stored = merged.tensors[f"model.{path}.experts.0.{parameter}"]
            tensors += [
                TensorSpec(f"model.{path}.experts.{expert}.{parameter}", stored.shape, stored.dtype)
                for expert in range(addition.num_experts)
            ]
    return tensors + [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in router.items()]


def write_tensors(
    addition: Addition,
    modules: Mapping[str, ModuleAddition],
    router: Mapping[str, torch.Tensor],
    writer: ShardWriter,
    chunk_bytes: int,
    bar: tqdm,
) -> None:
    """Copy what the other experts read, and write what is the new expert's own."""
    merged = addition.merged
    for path, spec in merged.modules.channel.items():
        module = modules[spec.tied_to or path]
        layout = module.layout()
        index = module.channel_index(layout, is_embedding=spec.kind == "embedding" or spec.tied_to is not None)
        if spec.tied_to is not None:
            index = tied_head_index(addition, path, index)
        else:
            write_rows(addition, path, module, layout, writer, chunk_bytes, bar)
        writer.write(f"model.{path}.channel_index", index)
    before = [*addition.kept]
    before.insert(addition.place, None)
    for path, parameters in merged.modules.per_expert.items():
        for parameter in parameters:
            dtype = merged.tensors[f"model.{path}.experts.0.{parameter}"].dtype
            for expert, old in enumerate(before):
                stored = f"model.{path}.experts.{expert}.{parameter}"
                if old is None:
                    write_copy(addition.reader, f"{path}.{parameter}", writer, stored, dtype, chunk_bytes)
                    continue
                tensor = merged.reader.read(f"model.{path}.experts.{old}.{parameter}")
                writer.write(stored, tensor)
                bar.update(tensor.nbytes)
    for name, tensor in router.items():
        writer.write(name, tensor)


def tied_head_index(addition: Addition, path: str, embedding: torch.Tensor) -> torch.Tensor:
    """The index of a head that shares the embedding's rows, (N, V) int32: -1 for tokens that an expert lacks."""
    missing = addition.merged.channel_index(path)[list(addition.kept)] < 0
    return embedding.masked_fill(with_expert(missing, ~addition.present, addition.place), -1)


def write_rows(
    addition: Addition,
    path: str,
    module: ModuleAddition,
    layout: RowLayout,
    writer: ShardWriter,
    chunk_bytes: int,
    bar: tqdm,
) -> None:
    """The rows of one module, in their new order: stored ones are copied, the new expert's own ones are read."""
    merged = addition.merged
    sources = module.sources(layout)
    # One block: the rows of the owner set that is the new expert alone.
    fresh = (sources >= module.num_stored).nonzero()[:, 0]
    first, last = (int(fresh[0]), int(fresh[-1]) + 1) if len(fresh) else (0, 0)
    assert last - first == len(fresh)
    for name in channel_parameters(merged.modules, path):
        stored = stored_name(path, name)
        dtype = merged.tensors[stored].dtype
        width = dtype.itemsize * math.prod(merged.tensors[stored].shape[1:])
        for low, high in ((0, first), (last, len(sources))):
            for start, stop in chunks_of(high - low, 6 * width, chunk_bytes):
                rows = read_rows_at(merged.reader, stored, sources[low + start : low + stop])
                writer.write(stored, rows, low + start)
                bar.update(rows.nbytes)
        own = layout.row_channel[first:last]  # ascending
        for start, stop in chunks_of(merged.modules.channel[path].out_features, 8 * width, chunk_bytes):
            begin, end = torch.searchsorted(own, torch.tensor([start, stop])).tolist()
            if begin < end:
                rows = addition.reader.read_rows(name, start, stop)
                writer.write(stored, rows[own[begin:end] - start].to(dtype), first + begin)
                bar.update(rows.nbytes)
        if module.has_fallback:
            writer.write(stored, new_fallback(addition, module, path, name).to(dtype), module.num_rows - 1)


def new_fallback(addition: Addition, module: ModuleAddition, path: str, name: str) -> torch.Tensor:
    """What an embedding reads for tokens that an expert does not have: as it was, else the mean of all that it has.

    Returns:
        (1, I).
    """
    if module.fallback is not None:
        return addition.merged.reader.read_rows(stored_name(path, name), module.fallback, module.fallback + 1)
    spec = addition.merged.modules.channel[path]
    total = torch.zeros(spec.in_features, dtype=torch.float64)
    for start, stop in chunks_of(spec.out_features, 1, MEAN_ROWS):
        rows = addition.reader.read_rows(name, start, stop)[addition.present[start:stop]]
        # NumPy adds row after row, whatever the number of threads.
        total += torch.from_numpy(rows.double().numpy().sum(axis=0))
    return (total / int(addition.present.sum()))[None]
