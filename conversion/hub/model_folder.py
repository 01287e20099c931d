"""Everything in a merged checkpoint's folder but its weights: config, code, tokenizer, model card, report."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import modeling_channel_merged
from conversion.hub.model_card import write_card
from conversion.io.model_files import (
    CHAT_TEMPLATE,
    EXPERT_FOLDER,
    GENERATION_CONFIG,
    REPORT_FILE,
    TEMPLATE_FOLDER,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    check_file_name,
    copy_files,
    read_config_file,
    write_json,
)
from conversion.io.weight_files import dtype_text
from conversion.merging.plan import Plan
from conversion.vocabulary.own_vocabulary import DEFAULT_TEMPLATE, SPECIAL_IDS, OwnVocabulary, other_templates
from modeling_channel_merged.configuration_channel_merged import ChannelMergedConfig

logger = logging.getLogger(__name__)

# What config.json keeps of the report.
MERGE_FIELDS = ("recipe", "base_model", "experts", "method", "seed", "dtype", "versions", "parameters")


def write_hub_files(folder: Path, plan: Plan, rows: Mapping[str, int], report: Mapping[str, Any]) -> str:
    """Write everything but the weights and config.json into a new checkpoint folder.

    Returns:
        The text of config.json, which belongs there last.
    """
    write_code(folder)
    if not write_tokenizer(folder, plan):
        logger.warning("the base model %s has no tokenizer files: the merged model has none", plan.base.model)
    write_generation_config(folder, plan)
    write_expert_files(folder, plan)
    write_json(folder / REPORT_FILE, report)
    write_card(folder)
    return merged_config(plan, rows, report).to_json_string(use_diff=True)


def merged_config(plan: Plan, rows: Mapping[str, int], report: Mapping[str, Any]) -> ChannelMergedConfig:
    """The merged model's config."""
    text_config = plan.text_config.to_dict()
    text_config["dtype"] = dtype_text(plan.dtype)
    text_config.pop("_name_or_path", None)
    return ChannelMergedConfig(
        text_config=text_config,
        expert_names=plan.expert_names,
        num_experts=plan.num_experts,
        rows=dict(rows),
        router={"turns": turns.to_dict() if (turns := plan.vocabulary.chat_turns.turns) else None},
        merge={field: report[field] for field in MERGE_FIELDS},
        architectures=["ChannelMergedForCausalLM"],
        dtype=plan.dtype,
        expert_vocabularies=plan.vocabulary.expert_records(),
        expert_eos_token_ids=plan.vocabulary.expert_eos_token_ids(),
        eos_token_id=end_of_sequence(plan.text_config.eos_token_id, plan),
    )


def end_of_sequence(base: int | list[int] | None, plan: Plan) -> int | list[int] | None:
    """`eos_token_id` of the merged model: the tokens that end any expert's answer, as the base says it if it does."""
    ends = plan.vocabulary.all_eos_token_ids
    if not ends or ends == sorted({base} if isinstance(base, int) else {*(base or ())}):
        return base
    return ends[0] if len(ends) == 1 else ends


def write_code(folder: Path) -> None:
    """Copy the model's code beside its weights, so that it loads where this package is not installed."""
    for file in sorted(Path(modeling_channel_merged.__file__).parent.glob("*.py")):
        if file.name != "__init__.py":
            shutil.copyfile(file, folder / file.name)


def write_tokenizer(folder: Path, plan: Plan) -> bool:
    """The merged model's tokenizer, with the chat templates of all experts; False if the base has none."""
    vocabulary = plan.vocabulary
    if vocabulary.additions:
        vocabulary.tokenizer.save_pretrained(folder)
    elif not copy_tokenizer(vocabulary.base, folder):
        return False
    write_chat_templates(folder, vocabulary.chat_templates)
    return True


def copy_generation_config(own: OwnVocabulary, source: Path, folder: Path) -> None:
    """Copy a checkpoint's generation config from its folder, or write the one that its config implies."""
    if not copy_files(source, folder, (GENERATION_CONFIG,)):
        own.generation_config.save_pretrained(folder)


def copy_tokenizer(own: OwnVocabulary, folder: Path) -> bool:
    """Copy a checkpoint's tokenizer files without code, with its class written down; False if there are none.

    Transformers may take another class than the files name, by the checkpoint's model type; in another folder it
    would not.
    """
    copies = copy_files(own.tokenizer_folder, folder, TOKENIZER_FILES)
    file = folder / TOKENIZER_CONFIG
    values = read_config_file(file)
    used = type(own.tokenizer).__name__
    if own.tokenizer is not None and str(values.get("tokenizer_class")).removesuffix("Fast") != used:
        write_json(file, {**values, "tokenizer_class": used})
    return bool(copies)


def write_chat_templates(folder: Path, templates: Mapping[str, str]) -> None:
    """Write a tokenizer's chat templates where it looks for them by name; none leaves its files as they are.

    What is the default under another name is left out: many tools expect one template, a plain text.
    """
    if not templates:
        return
    if (folder / TEMPLATE_FOLDER).exists():
        shutil.rmtree(folder / TEMPLATE_FOLDER)
    file = folder / TOKENIZER_CONFIG
    values = json.loads(file.read_text(encoding="utf-8"))
    if values.pop("chat_template", None) is not None:
        write_json(file, values)
    (folder / CHAT_TEMPLATE).write_text(templates[DEFAULT_TEMPLATE], encoding="utf-8", newline="")
    for name in other_templates(templates):
        check_file_name(name, "the chat template")
        (folder / TEMPLATE_FOLDER).mkdir(exist_ok=True)
        (folder / TEMPLATE_FOLDER / f"{name}.jinja").write_text(templates[name], encoding="utf-8", newline="")


def write_generation_config(folder: Path, plan: Plan) -> None:
    """The base's generation config, or one from its config; it ends where any expert's answer ends."""
    file = folder / GENERATION_CONFIG
    copy_generation_config(plan.vocabulary.base, plan.base.folder, folder)
    values = json.loads(file.read_text(encoding="utf-8"))
    special = {key: plan.vocabulary.base_channel(values[key]) for key in SPECIAL_IDS if key in values}
    if (end := end_of_sequence(special.get("eos_token_id"), plan)) is not None:
        special["eos_token_id"] = end
    if special != {key: values.get(key) for key in special}:
        write_json(file, {**values, **special})


def write_expert_files(folder: Path, plan: Plan) -> None:
    """Every expert's own generation config and tokenizer, as long as its tokens are all there."""
    for number, own in enumerate(plan.vocabulary.experts):
        if plan.vocabulary.dropped(number)[0]:
            continue
        target = folder / EXPERT_FOLDER / own.name
        target.mkdir(parents=True)
        copy_generation_config(own, plan.experts[number].folder, target)
        copy_tokenizer(own, target)
