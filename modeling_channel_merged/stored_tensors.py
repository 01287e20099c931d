"""What is checked of a stored checkpoint: Transformers converts, skips or overlooks it and loads a wrong model.

Shapes: N experts, O channels, R rows, V tokens of the merged vocabulary.
"""

import os
import re
from collections.abc import Mapping

import torch
from torch import nn
from transformers.modeling_utils import load_state_dict

from .configuration_channel_merged import ChannelMergedConfig

# The tensors that only a channel-merged checkpoint has, and the module that each is of.
MERGED_TENSOR = re.compile(r"(?P<indexed>model\..+)\.channel_index$|(?P<owner>model\..+?\.(?:rows|experts\.\d+))\.")


def check_index_values(name: str, index: torch.Tensor, num_rows: int, may_miss: torch.BoolTensor | None = None):
    """Raise ValueError if an entry of `index` (N, O) names none of `num_rows` stored rows.

    Args:
        may_miss: (N, O) entries that may be -1, for a token that the expert's vocabulary does not have; None: none.
    """
    if index.is_meta or not index.numel():
        return
    wrong = (index < 0) | (index >= num_rows)
    if may_miss is not None:
        wrong &= (index != -1) | ~may_miss.to(index.device)
    if wrong.any():
        expert, channel = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name}.channel_index holds row {int(index[expert, channel])} for expert {expert}, channel {channel}; "
            f"{name} stores {num_rows} rows (expected 0 to {num_rows - 1}): the checkpoint is damaged"
        )


def may_miss_tokens(config: ChannelMergedConfig) -> torch.BoolTensor:
    """(N, V): the tokens that an expert may lack: all but those that the config says its vocabulary has."""
    may_miss = torch.ones(config.num_experts, config.vocab_size, dtype=torch.bool)
    for expert in range(config.num_experts):
        if (channels := config.vocabulary_channels(expert)) is not None:
            may_miss[expert, channels] = False
    return may_miss


def check_shard_names(weight_map: Mapping[str, str], index: str):
    """Raise ValueError if an index of shards names a file that is not beside it."""
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ValueError(f"{index}: weight_map is {weight_map!r:.50}, expected tensor names and file names")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file or file in (".", "..") or re.search(r"[/\\\0]", file):
            raise ValueError(f"{index}: weight_map has {file!r} for {tensor}, expected the name of a file beside it")


def check_stored_tensors(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None, files: list[str] | None, load_config
):
    """Raise ValueError before data are read.

    For an index that is not int32, rows that are no floats, rows of unknown modules or none of a known one, and
    misplaced shards.

    Args:
        model: what is loaded, without its data.
        state_dict: the tensors to load, where they are given; else they are those of `files`.
        load_config: Transformers' own, with the index of shards, if there is one.
    """
    quantized = getattr(load_config, "hf_quantizer", None) is not None
    if state_dict is not None:
        _check_headers("the state dict", state_dict, model, quantized)
        return
    stored = set()
    weight_map = (load_config.sharded_metadata or {}).get("weight_map")
    if weight_map is not None:
        check_shard_names(weight_map, f"{load_config.pretrained_model_name_or_path}")
    for file in files or ():
        try:
            headers = load_state_dict(file, map_location="meta")
        except OSError:
            raise
        except Exception as error:  # the reader's own class, which is no ValueError
            raise ValueError(f"{file} is damaged: {' '.join(str(error).split())}") from None
        stored |= _check_headers(file, headers, model, quantized)
        for name in headers if weight_map is not None else ():
            if weight_map.get(name) != os.path.basename(file):
                raise ValueError(f"{file} holds {name}, expected in {weight_map.get(name)!r} by the index of shards")
    tied = {name.rpartition(".")[0] for name in model.all_tied_weights_keys}
    owners = {name for name, _ in model.named_modules() if MERGED_TENSOR.fullmatch(f"{name}.")}
    if files and (missing := sorted(owners - stored - tied)):
        place = load_config.pretrained_model_name_or_path
        raise ValueError(f"{place} holds no tensor of {missing[0]}: the checkpoint is damaged")


def _check_headers(file: str, headers: Mapping[str, torch.Tensor], model: nn.Module, quantized: bool) -> set[str]:
    """Check one file's tensors; returns the modules with rows or experts' copies there."""
    stored = set()
    modules = {name for name, _ in model.named_modules()}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for name, tensor in headers.items():
        if any(pattern.search(name) for pattern in ignored) or not (merged := MERGED_TENSOR.match(name)):
            continue
        if (merged["owner"] or f"{merged['indexed']}.rows") not in modules:
            raise ValueError(f"{file}: {name} is of no module of the model: the checkpoint is damaged")
        if merged["indexed"]:
            if tensor.dtype != torch.int32:
                raise ValueError(f"{file}: {name} is {tensor.dtype}, expected torch.int32: the checkpoint is damaged")
            continue
        if not (quantized or tensor.is_floating_point()):
            raise ValueError(f"{file}: {name} is {tensor.dtype}, expected floats: the checkpoint is damaged")
        stored.add(merged["owner"])
    return stored


__all__ = ["check_index_values", "check_shard_names", "check_stored_tensors", "may_miss_tokens"]
