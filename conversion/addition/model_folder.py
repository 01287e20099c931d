"""All of a merged checkpoint with one more expert but its weights: config, tokenizer, report and model card, extended.

What the conversion wrote of the other experts stays.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from conversion.addition.matching_pass import ModuleAddition
from conversion.addition.plan import Addition
from conversion.addition.router_growth import ROUTER_PREFIX
from conversion.channels.delta_errors import norm, relative_error
from conversion.channels.row_layout import owner_names
from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.hub.conversion_report import package_versions
from conversion.hub.model_card import card_records, read_card, write_card
from conversion.hub.model_folder import copy_tokenizer, write_chat_templates, write_code
from conversion.io.foreign_files import read_json
from conversion.io.model_files import (
    COMPANION_FILES,
    EXPERT_FILES,
    EXPERT_FOLDER,
    GENERATION_CONFIG,
    REPORT_FILE,
    TEMPLATE_FOLDER,
    copy_files,
    read_config_file,
    write_json,
)
from modeling_channel_merged import ChannelMergedConfig


def merged_parameters(merged: MergedCheckpoint) -> int:
    """Stored parameters of the checkpoint without its router and its indices."""
    return sum(
        tensor.numel
        for name, tensor in merged.tensors.items()
        if not name.startswith(ROUTER_PREFIX) and not name.endswith(".channel_index")
    )


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
        "merge": merge,
        "expert_vocabularies": vocabularies | ({name: own} if own else {}),
        "expert_eos_token_ids": ends if len(set(map(tuple, ends.values()))) > 1 else None,
    }
    if (everything := all_tokens(ends)) != stored_end_tokens(addition.merged):
        values["eos_token_id"] = everything[0] if len(everything) == 1 else everything
    return ChannelMergedConfig.from_dict(values)


def vocabulary_record(addition: Addition) -> dict[str, Any] | None:
    """What config.json says of the new expert's own vocabulary."""
    if addition.vocabulary is None:
        return addition.merged.config.expert_vocabularies.get(addition.adapted)
    return addition.vocabulary.expert_records().get(addition.vocabulary.experts[0].name)


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


def write_files(
    folder: Path, addition: Addition, modules: Mapping[str, ModuleAddition], config: ChannelMergedConfig
) -> None:
    """Everything but the weights and config.json: code, tokenizer, the experts' own files, report and model card.

    The evaluation of the router stays behind: it is that of a router without this expert.
    """
    old = addition.merged.folder
    copy_files(old, folder, (*COMPANION_FILES, *EXPERT_FILES))
    write_code(folder)
    write_expert_folder(folder, addition)
    if addition.vocabulary is not None and addition.vocabulary.tokenizer is not None:
        write_chat_templates(folder, addition.vocabulary.chat_templates)
    if all_tokens(end_tokens(addition)) != stored_end_tokens(addition.merged):
        values = {**generation_values(folder), "eos_token_id": config.eos_token_id}
        write_json(folder / GENERATION_CONFIG, values)
    if (old / REPORT_FILE).exists():
        report = read_json(old / REPORT_FILE)
        write_json(folder / REPORT_FILE, extended_report(report, addition, modules, config))
        write_card(folder)


def write_expert_folder(folder: Path, addition: Addition) -> None:
    """The new expert's own generation config and tokenizer, as long as its tokens are all there."""
    target = folder / EXPERT_FOLDER / addition.name
    if addition.adapted == addition.name:
        return
    if target.exists():
        shutil.rmtree(target)
    if addition.adapted is not None:
        copy_files(addition.merged.folder / EXPERT_FOLDER / addition.adapted, target, COMPANION_FILES)
        template = folder / TEMPLATE_FOLDER / f"{addition.adapted}.jinja"
        if template.exists():
            shutil.copyfile(template, template.with_stem(addition.name))
        return
    if addition.vocabulary.dropped(0)[0]:
        return
    own = addition.vocabulary.experts[0]
    target.mkdir(parents=True, exist_ok=True)
    if not copy_files(addition.source.folder, target, (GENERATION_CONFIG,)):
        own.generation_config.save_pretrained(target)
    copy_tokenizer(own, target)


def extended_report(
    report: dict[str, Any],
    addition: Addition,
    modules: Mapping[str, ModuleAddition],
    config: ChannelMergedConfig,
) -> dict[str, Any]:
    """The conversion's report with the new expert's numbers; what it says of the others stays true."""
    name, names = addition.name, addition.expert_names
    if "experts" in report:
        cards = card_records(report, addition.merged.folder)
        card = read_card(name, addition.source.folder).record()
        report["cards"] = {**cards, "experts": {**cards["experts"], name: card}}
    report |= {key: config.merge[key] for key in ("experts", "added_experts", "parameters")}
    for path, module in modules.items():
        part = report.get("modules", {}).get(path)
        if part is None:
            continue
        part["rows"] = module.num_rows
        part["owners"] = {
            "+".join(owner_names(owners, names)): count for owners, count in module.rows_by_owners.items()
        }
        part.pop("fallback_rows", None)
        part |= {"fallback_rows": 1} if module.has_fallback else {}
        if "error_norms" in part:
            delta = module.delta_square
            part["delta_norms"][name] = None if delta is None else norm(delta)
            part["error_norms"][name] = norm(module.error_square)
            part["relative_errors"][name] = relative_error(module.error_square, delta or 0.0)
    if "relative_errors" in report:
        report["relative_errors"][name] = config.merge["added_experts"][-1]["relative_error"]
    if "experts" in report.get("vocabulary", {}):
        report["vocabulary"]["experts"] |= vocabulary_report(report["vocabulary"]["experts"], addition)
    return report


def vocabulary_report(experts: Mapping[str, Any], addition: Addition) -> dict[str, Any]:
    """What became of the new expert's vocabulary, and the tokens that now only one expert has."""
    merged, name = addition.merged, addition.name
    if addition.vocabulary is None:
        own = dict(experts.get(addition.adapted, {}))
    else:
        own = addition.vocabulary.report()["experts"][addition.vocabulary.experts[0].name]
    present = [merged.has_token(expert) for expert in addition.kept]
    present.insert(addition.place, addition.present)
    present = torch.stack(present)
    alone = present & (present.sum(0) == 1)
    updated = {**experts, name: own}
    return {
        other: {**updated[other], "channels_that_only_it_has": int(alone[expert].sum())}
        for expert, other in enumerate(addition.expert_names)
        if other in updated
    }
