"""All of a merged checkpoint with one more expert but weights and config: tokenizer, experts' files, report and card.

What the conversion wrote of the other experts stays.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from conversion.addition.extended_config import all_tokens, end_tokens, generation_values, stored_end_tokens
from conversion.addition.extended_report import extended_report
from conversion.addition.module_addition import ModuleAddition
from conversion.addition.plan import Addition
from conversion.hub.model_card import write_card
from conversion.hub.model_folder import copy_generation_config, copy_tokenizer, write_chat_templates, write_code
from conversion.io.foreign_files import read_json
from conversion.io.model_files import (
    COMPANION_FILES,
    EXPERT_FILES,
    EXPERT_FOLDER,
    GENERATION_CONFIG,
    REPORT_FILE,
    TEMPLATE_FOLDER,
    copy_files,
    write_json,
)
from modeling_channel_merged import ChannelMergedConfig


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
    copy_generation_config(own, addition.source.folder, target)
    copy_tokenizer(own, target)
