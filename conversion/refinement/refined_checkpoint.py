"""The refined checkpoint's folder: the rows that trained, everything else as it was, report, config and card."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.hub.model_folder import write_code
from conversion.hub.refinement_section import REFINEMENT
from conversion.io.model_files import (
    COMPANION_FILES,
    EXPERT_FILES,
    REPORT_FILE,
    copy_files,
    read_config_file,
    write_json,
)
from conversion.io.shard_writer import ShardWriter, TensorSpec

# What config.json keeps of the record.
CONFIG_FIELDS = ("improved", "kl_before", "kl_after", "steps", "options")


def write_weights(
    folder: Path, merged: MergedCheckpoint, trained: Mapping[str, torch.Tensor], max_shard_size: int | str
) -> None:
    """The checkpoint's tensors with those that trained in their place, each in the dtype that it was stored in."""
    specs = [TensorSpec(name, tensor.shape, tensor.dtype) for name, tensor in merged.tensors.items()]
    writer = ShardWriter(folder, specs, max_shard_size)
    try:
        for name, stored in merged.tensors.items():
            tensor = trained.get(name)
            writer.write(name, merged.reader.read(name) if tensor is None else tensor.to("cpu", stored.dtype))
        writer.finish()
    finally:
        writer.close()


def write_files(folder: Path, merged: MergedCheckpoint, record: Mapping[str, Any]) -> str:
    """Everything but weights, card and config.json.

    Returns:
        The text of config.json, which belongs there last.
    """
    copy_files(merged.folder, folder, (*COMPANION_FILES, *EXPERT_FILES))
    write_code(folder)
    write_json(folder / REPORT_FILE, {**read_config_file(merged.folder / REPORT_FILE), REFINEMENT: record})
    config = copy.deepcopy(merged.config)
    config.merge = {**config.merge, REFINEMENT: {field: record[field] for field in CONFIG_FIELDS}}
    return config.to_json_string(use_diff=True)
