"""Adding an expert to a channel-merged checkpoint, or exchanging one, with every other expert bit for bit as it was.

No group is formed anew. For each channel the new expert reads a row that is stored already, where that row is its own
bit for bit (or, with a tolerance, near enough to it), and its own row is stored otherwise. What the other experts read
is copied; rows that only an exchanged expert read are dropped. Two passes: the first, over the new expert and the
stored rows, decides what is reused, and with it every header; the second copies. Memory is bounded by the chunk.

The new expert is a checkpoint of the base architecture, a LoRA adapter of the base, or a LoRA adapter of one of the
checkpoint's own experts (see `expert_lora`).

Shapes: N experts, O channels, I inputs, R rows, C channels of one chunk, V tokens, H hidden size.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from conversion.addition.copying_pass import extended_tensors, write_tensors
from conversion.addition.extended_config import extended_config, merged_parameters
from conversion.addition.matching_pass import match_modules
from conversion.addition.model_folder import write_files
from conversion.addition.plan import plan_addition
from conversion.addition.router_growth import extended_router
from conversion.io.options import parse_size
from conversion.io.shard_writer import ShardWriter
from conversion.io.sources import check_unchanged
from conversion.io.staged_folder import StagedFolder, check_disk_space, check_not_a_source, check_target
from conversion.merging.memory_budget import CHUNK_BYTES


@dataclass(frozen=True)
class AddedExpert:
    """What came of adding an expert.

    Attributes:
        folder: the new checkpoint.
        new_rows, reused_rows: channels over all matrices that read a row of their own, and one that was there.
        parameters: stored ones, of the whole checkpoint.
        added_parameters: how many more than before (fewer, where an exchanged expert had more).
        relative_error: of the new expert, as the conversion measures it; 0.0 where it is exact.
    """

    folder: Path
    new_rows: int
    reused_rows: int
    parameters: int
    added_parameters: int
    relative_error: float | None


def add_expert(
    checkpoint: str | Path,
    expert: str | Path,
    out: str | Path,
    name: str,
    *,
    base: str | Path | None = None,
    tolerance: float = 0.0,
    replace: bool = False,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    chunk_bytes: int = CHUNK_BYTES,
    progress: bool = True,
) -> AddedExpert:
    """Write a checkpoint with one more expert, or with one exchanged; the others stay bit for bit as they were.

    Args:
        checkpoint: channel-merged checkpoint, a folder or a Hub id.
        expert: a checkpoint of the base architecture, a PEFT LoRA adapter of the base, or one of an expert of
            `checkpoint` that `expert_lora.adapt_expert` made; a folder or a Hub id.
        out: the folder to make. It appears only when it is complete.
        name: of the expert.
        base: the base model, which the checkpoint does not hold; None: as the checkpoint's recipe names it, where an
            adapter of the base or a tolerance needs it.
        tolerance: a stored row of the same channel is used instead of the new expert's own if its distance from it is
            at most this share of the own row's distance from the base's. 0: only a row that is the same bit for bit.
        replace: exchange the expert that has this name. The router keeps its row of it.
        overwrite: replace a model folder that is at `out`.
        max_shard_size: largest safetensors file, bytes or a size such as "5GB".
        chunk_bytes: float32 rows that are held at a time; no result depends on it.
        progress: show a progress bar.

    Raises:
        ValueError: names, checkpoints, tolerance or output are not as they must be; mostly before weights are read.
        OSError: a file cannot be read or written.
    """
    out = Path(out)
    check_target(out, overwrite)
    parse_size(max_shard_size)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance is {tolerance}, expected a finite number, at least 0")
    addition = plan_addition(checkpoint, expert, name, base=base, tolerance=tolerance, replace=replace)
    stored_bytes = sum(tensor.num_bytes for tensor in addition.merged.tensors.values())
    new_bytes = sum(tensor.num_bytes for tensor in addition.reader.tensors.values())
    with contextlib.ExitStack() as stack:
        for reader in (addition.merged.reader, addition.base_reader, addition.reader):
            if reader is not None:
                stack.callback(reader.close)
        inputs = zip(("the checkpoint", "the expert", "the base"), addition.sources, strict=False)
        check_not_a_source(out, {f"{what} that is read": source.folder for what, source in inputs})
        check_disk_space(out, stored_bytes + new_bytes, {})
        addition.merged.check_channel_indices()
        staged = stack.enter_context(StagedFolder(out, overwrite))
        total = stored_bytes + 2 * new_bytes
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, disable=not progress, dynamic_ncols=True)
        )
        bar.set_description("comparing rows")
        modules = match_modules(addition, chunk_bytes, bar)
        config = extended_config(addition, modules)
        router = extended_router(addition, config)
        bar.set_description("writing rows")
        writer = ShardWriter(staged.path, extended_tensors(addition, modules, router), max_shard_size)
        stack.callback(writer.close)
        write_tensors(addition, modules, router, writer, chunk_bytes, bar)
        writer.finish({"total_parameters": config.merge["parameters"]["stored"]})
        write_files(staged.path, addition, modules, config)
        check_unchanged(addition.sources)
        staged.publish(config.to_json_string(use_diff=True))
    record, parameters = config.merge["added_experts"][-1], config.merge["parameters"]["stored"]
    return AddedExpert(
        folder=out,
        new_rows=record["new_rows"],
        reused_rows=record["reused_rows"],
        parameters=parameters,
        added_parameters=parameters - merged_parameters(addition.merged),
        relative_error=record["relative_error"],
    )
