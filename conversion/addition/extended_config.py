"""The config of a merged checkpoint with one more expert: its vocabulary and end tokens, and how it was added."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.addition.module_addition import ModuleAddition
from conversion.addition.plan import Addition
from conversion.addition.router_growth import ROUTER_PREFIX
from conversion.channels.delta_errors import relative_error
from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.hub.conversion_report import package_versions
from conversion.io.model_files import GENERATION_CONFIG, read_config_file
from conversion.vocabulary.chat_markers import DerivedTurns, derive_turns
from conversion.vocabulary.own_vocabulary import find_tokenizer
from modeling_channel_merged import ChannelMergedConfig


def extended_config(addition: Addition, modules: Mapping[str, ModuleAddition]) -> ChannelMergedConfig:
    """The checkpoint's config with the new expert."""
    old, name = addition.merged.config, addition.name
    values = old.to_dict()
    record = addition_record(addition, modules)
    rows = {path: modules[module.tied_to or path].num_rows for path, module in addition.merged.modules.channel.items()}
    sources = {part["name"]: part for part in old.merge.get("experts", ())} | {name: addition.source.record()}
    merge = {
        **old.merge,
        "experts": [sources[other] for other in addition.expert_names if other in sources],
        "added_experts": [*old.merge.get("added_experts", ()), record],
        "parameters": parameter_counts(addition, modules),
    }
    own = vocabulary_record(addition)
    vocabularies = {key: value for key, value in old.expert_vocabularies.items() if key != name}
    ends = end_tokens(addition)
    values |= {
        "expert_names": addition.expert_names,
        "num_experts": addition.num_experts,
        "rows": rows,
        "router": {**old.router, "turns": turns.to_dict() if (turns := chat_turns(addition).turns) else None},
        "merge": merge,
        "expert_vocabularies": vocabularies | ({name: own} if own else {}),
        "expert_eos_token_ids": ends if len(set(map(tuple, ends.values()))) > 1 else None,
    }
    if (everything := all_tokens(ends)) != stored_end_tokens(addition.merged):
        values["eos_token_id"] = everything[0] if len(everything) == 1 else everything
    return ChannelMergedConfig.from_dict(values)


def addition_record(addition: Addition, modules: Mapping[str, ModuleAddition]) -> dict[str, Any]:
    """How the expert was added, as plain values."""
    measured = addition.base_reader is not None
    deltas = sum(module.delta_square for module in modules.values()) if measured else 0.0
    errors = sum(module.error_square for module in modules.values())
    return {
        **addition.source.record(),
        "name": addition.name,
        "replaces": addition.replaces,
        **({"checkpoint": merged.record()} if (merged := addition.merged.source).revision else {}),
        **({"adapted_expert": addition.adapted} if addition.adapted is not None else {}),
        **({"base_model": addition.base.record()} if addition.base is not None else {}),
        "tolerance": addition.tolerance,
        "new_rows": sum(module.num_new for module in modules.values()),
        "reused_rows": sum(module.num_reused for module in modules.values()),
        "relative_error": relative_error(errors, deltas),
        "versions": package_versions(),
    }


def parameter_counts(addition: Addition, modules: Mapping[str, ModuleAddition]) -> dict[str, int]:
    """Stored parameters, and those of all experts as separate models."""
    merged, stored, separate = addition.merged, 0, 0
    for path, module in modules.items():
        spec = merged.modules.channel[path]
        size = spec.in_features + spec.bias
        stored += module.num_rows * size
        separate += int(module.present.sum()) * size
    per_expert = sum(
        merged.tensors[f"model.{path}.experts.0.{parameter}"].numel
        for path, parameters in merged.modules.per_expert.items()
        for parameter in parameters
    )
    kept = addition.num_experts * per_expert
    channels = sum(module.out_features for module in merged.modules.channel.values())
    return {"stored": stored + kept, "experts": separate + kept, "indices": addition.num_experts * channels}


def merged_parameters(merged: MergedCheckpoint) -> int:
    """Stored parameters of the checkpoint without its router and its indices."""
    return sum(
        tensor.numel
        for name, tensor in merged.tensors.items()
        if not name.startswith(ROUTER_PREFIX) and not name.endswith(".channel_index")
    )


def vocabulary_record(addition: Addition) -> dict[str, Any] | None:
    """What config.json says of the new expert's own vocabulary."""
    if addition.vocabulary is None:
        return addition.merged.config.expert_vocabularies.get(addition.adapted)
    return addition.vocabulary.expert_records().get(addition.vocabulary.experts[0].name)


def chat_turns(addition: Addition) -> DerivedTurns:
    """The markers of the chat templates that the checkpoint then has; an expert that adapts one brings no other."""
    if addition.vocabulary is None:
        return derive_turns(find_tokenizer("the checkpoint", addition.merged.folder))
    return addition.vocabulary.chat_turns


def end_tokens(addition: Addition) -> dict[str, list[int]]:
    """The tokens at which each expert's answers end, by its name, in the experts' order."""
    config, common = addition.merged.config, stored_end_tokens(addition.merged)
    ends = {name: (config.expert_eos_token_ids or {}).get(name, common) for name in config.expert_names}
    if addition.vocabulary is None:
        ends[addition.name] = ends[addition.adapted]
    else:
        ends[addition.name] = addition.vocabulary.eos_token_ids(0)
    return ends


def stored_end_tokens(merged: MergedCheckpoint) -> list[int]:
    """The tokens that end an answer by the checkpoint's generation config, which rules there, or by its config."""
    tokens = generation_values(merged.folder).get("eos_token_id", merged.config.eos_token_id)
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else sorted(tokens)


def all_tokens(ends: Mapping[str, list[int]]) -> list[int]:
    return sorted({token for tokens in ends.values() for token in tokens})


def generation_values(folder: Path) -> dict[str, Any]:
    return read_config_file(folder / GENERATION_CONFIG)
