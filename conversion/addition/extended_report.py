"""The report of a conversion with one more expert's numbers; what it says of the others stays true."""

from collections.abc import Mapping
from typing import Any

import torch

from conversion.addition.extended_config import chat_turns
from conversion.addition.module_addition import ModuleAddition
from conversion.addition.plan import Addition
from conversion.channels.delta_errors import norm, relative_error
from conversion.channels.row_layout import owner_names
from conversion.hub.model_card import card_records
from conversion.hub.source_card import read_card
from modeling_channel_merged import ChannelMergedConfig


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
        part.pop("channels_by_rows", None)  # without the new expert
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
        report["vocabulary"]["chat_turns"] = chat_turns(addition).record()
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
