"""Whether the experts of a recipe are those of a merged checkpoint, before they teach it."""

import torch

from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.hub.refinement_section import REFINEMENT
from conversion.merging.plan import Plan


def check_same_experts(merged: MergedCheckpoint, plan: Plan) -> None:
    """ValueError where a recipe's experts are not those that a checkpoint was merged from.

    Names, revisions, architecture and vocabulary are compared, and what the checkpoint keeps of every expert exactly.
    """
    config, folder = merged.config, merged.source.shown
    if config.expert_names != plan.expert_names:
        raise ValueError(
            f"the experts of {folder} are {', '.join(config.expert_names)}, those of the recipe "
            f"{', '.join(plan.expert_names)}: give the recipe that it was made from"
        )
    recorded = {record["name"]: record for record in config.merge.get("experts", ())}
    for source in plan.experts:
        revision = recorded.get(source.name, {}).get("revision")
        if revision and source.revision and revision != source.revision:
            raise ValueError(
                f"expert {source.name!r} of {folder} is of revision {revision}, that of the recipe of "
                f"{source.revision}: name {source.repository}@{revision} there"
            )
    if merged.modules != plan.modules:
        raise ValueError(f"{folder} is of another architecture, or has another vocabulary, than the recipe's models")
    if config.expert_vocabularies and config.expert_vocabularies != plan.vocabulary.expert_records():
        raise ValueError(f"the experts of {folder} have other vocabularies than those of the recipe")
    refined = config.merge.get(REFINEMENT, {})
    if not (refined.get("improved") and refined["options"]["train_per_expert"]):
        _check_exact_parameters(merged, plan)


def _check_exact_parameters(merged: MergedCheckpoint, plan: Plan) -> None:
    for expert, (name, reader) in enumerate(zip(plan.expert_names, plan.readers, strict=True)):
        for path, parameters in plan.modules.per_expert.items():
            for parameter in parameters:
                stored = merged.reader.read(f"model.{path}.experts.{expert}.{parameter}")
                own = reader.read(f"{path}.{parameter}").to(stored.dtype)
                if not torch.equal(stored, own):
                    raise ValueError(
                        f"expert {name!r} of {merged.source.shown} is not the recipe's {plan.experts[expert].model}: "
                        f"{path}.{parameter} differs"
                    )
