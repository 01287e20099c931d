"""Adding an expert to a channel-merged checkpoint, or exchanging one, with every other expert bit for bit as it was.

No group is formed anew. For each channel the new expert reads a row that is stored already, where that row is its own
bit for bit (or, with a tolerance, near enough to it), and its own row is stored otherwise. What the other experts read
is copied; rows that only an exchanged expert read are dropped. Two passes: the first, over the new expert and the
stored rows, decides what is reused, and with it every header; the second copies. Memory is bounded by the chunk.

The new expert is a checkpoint of the base architecture, a LoRA adapter of the base, or a LoRA adapter of one of the
checkpoint's own experts (see `expert_lora`).

Shapes: N experts, O channels, I inputs, R rows, C channels of one chunk, V tokens, H hidden size.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from conversion.addition.copying_pass import extended_tensors, write_tensors
from conversion.addition.matching_pass import chunks_of, match_module
from conversion.addition.model_folder import ROUTER_PREFIX, extended_config, merged_parameters, write_files
from conversion.addition.plan import Addition, check_out, plan_addition
from conversion.io.options import parse_size
from conversion.io.row_reader import check_tied_head
from conversion.io.shard_writer import ShardWriter
from conversion.io.sources import check_unchanged
from conversion.io.staged_folder import StagedFolder, check_disk_space, check_target
from conversion.merging.memory_budget import CHUNK_BYTES
from modeling_channel_merged import ChannelMergedConfig, ChannelMergedForCausalLM

logger = logging.getLogger(__name__)

ROUTER_BIAS = "router.head.bias"
# A new expert's router logit, over the temperature, starts at the mean of the others' less this much: for no query is
# it the largest one, and it takes less than 1 / 20,000 of the probability; training overcomes it in some steps.
ROUTER_MARGIN = 10.0


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
    merged = addition.merged
    try:
        check_out(out, addition)
        stored_bytes = sum(tensor.num_bytes for tensor in merged.tensors.values())
        new_bytes = sum(tensor.num_bytes for tensor in addition.reader.tensors.values())
        check_disk_space(out, stored_bytes + new_bytes, {})
        merged.check_channel_indices()
        with (
            StagedFolder(out, overwrite) as staged,
            tqdm(
                total=stored_bytes + 2 * new_bytes, unit="B", unit_scale=True, disable=not progress, dynamic_ncols=True
            ) as bar,
        ):
            bar.set_description("comparing rows")
            modules = {}
            for path, module in merged.modules.channel.items():
                if module.tied_to is None:
                    modules[path] = match_module(addition, path, chunk_bytes, bar)
                else:
                    chunks = list(chunks_of(module.out_features, 8 * module.in_features, chunk_bytes))
                    check_tied_head(addition.reader, f"{path}.weight", f"{module.tied_to}.weight", chunks)
            bar.set_description("writing rows")
            config = extended_config(addition, modules)
            router = extended_router(addition, config)
            writer = ShardWriter(staged.path, extended_tensors(addition, modules, router), max_shard_size)
            try:
                write_tensors(addition, modules, router, writer, chunk_bytes, bar)
                writer.finish({"total_parameters": config.merge["parameters"]["stored"]})
            finally:
                writer.close()
            write_files(staged.path, addition, modules, config)
            check_unchanged(addition.sources)
            staged.publish(config.to_json_string(use_diff=True))
    finally:
        addition.reader.close()
        if addition.base_reader is not None:
            addition.base_reader.close()
        merged.reader.close()
    record = config.merge["added_experts"][-1]
    before = merged_parameters(merged)
    stored = config.merge["parameters"]["stored"]
    return AddedExpert(
        out, record["new_rows"], record["reused_rows"], stored, stored - before, record["relative_error"]
    )


def extended_router(addition: Addition, config: ChannelMergedConfig) -> dict[str, torch.Tensor]:
    """The router's tensors for one more expert, see `grow_router`; as they are where one was exchanged."""
    merged = addition.merged
    tensors = {name: merged.reader.read(name) for name in merged.tensors if name.startswith(ROUTER_PREFIX)}
    if addition.replaces:
        if addition.name == merged.config.router["trunk_expert"]:
            logger.warning(
                "%r is the router's trunk expert: its features of every query change, so train the router again",
                addition.name,
            )
        return tensors
    with torch.device("meta"):
        larger = ChannelMergedForCausalLM(config).router.state_dict()
    shapes = {ROUTER_PREFIX + name: value.shape for name, value in larger.items()}
    trained = any(bool(tensor.any()) for tensor in tensors.values())
    # Probabilities are those of the logits over the temperature.
    return grow_router(tensors, shapes, ROUTER_MARGIN * config.router["temperature"] if trained else 0.0)


def grow_router(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], margin: float
) -> dict[str, torch.Tensor]:
    """A router's tensors for one more expert, which comes last; logits of the others stay as they are.

    Every tensor with a dimension of experts gets one more slice, the mean of the others, and the head's bias is less
    by `margin`: logits are linear in these tensors, so for every query the new one is that much less than the mean of
    the others.

    Args:
        tensors: by name, of N experts.
        shapes: the same of N + 1.
        margin: 0 for an untrained router, whose zeros stay zeros.
    """
    grown = {}
    for name, tensor in tensors.items():
        for dim in [dim for dim, size in enumerate(shapes[name]) if size != tensor.shape[dim]]:
            tensor = torch.cat([tensor, tensor.mean(dim, keepdim=True)], dim)
        if name == ROUTER_BIAS:
            tensor[-1] -= margin
        grown[name] = tensor
    return grown
