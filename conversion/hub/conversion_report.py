"""The report of a conversion: what was merged from what, and what came of it, as plain values."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from conversion.channels.delta_errors import DeltaErrors, norm, relative_error
from conversion.hub.source_card import read_card
from conversion.io.weight_files import dtype_text
from conversion.merging.grouped_module import LOSSES, GroupedModule
from conversion.merging.plan import Plan

PACKAGE = "channel-merged"
RECORDED_PACKAGES = (PACKAGE, "torch", "transformers", "safetensors")


def conversion_report(
    plan: Plan, grouped: Mapping[str, GroupedModule], texts: Mapping[str, int] | None
) -> dict[str, Any]:
    """What was merged from what, and what came of it, as plain values. The same for every run of the same recipe.

    Args:
        texts: how many texts each expert was calibrated on.
    """
    names = plan.expert_names
    modules = {}
    # What was weighed is the cost of the best rows: another method's rows cost more.
    best = "regmean" if plan.recipe.calibration else "linear"
    losses = LOSSES if plan.recipe.merge_method == best else ()
    stored = distinct = 0
    for path, module in grouped.items():
        spec = plan.modules.channel[path]
        row_size = spec.in_features + spec.bias
        stored += module.num_rows * row_size
        distinct += module.num_distinct * row_size
        modules[path] = {
            "kind": spec.kind,
            "channels": spec.out_features,
            "inputs": spec.in_features,
            "rows": module.num_rows,
            "merged_rows": module.num_merged,
            "distinct_rows": module.num_distinct,
            "owners": module.owner_counts(names),
            "channels_by_rows": {str(rows): count for rows, count in module.channels_by_rows.items()},
            **{name: loss for name in losses if (loss := getattr(module, name)) is not None},
            **({"fallback_rows": 1} if module.has_fallback else {}),
        }
    kept = plan.num_experts * plan.per_expert_parameters
    channels = sum(module.out_features for module in plan.modules.channel.values())
    return {
        "recipe": recipe_record(plan),
        "base_model": plan.base.record(),
        "experts": [expert.record() for expert in plan.experts],
        "method": plan.recipe.merge_method,
        **({} if texts is None else {"calibration_texts": dict(texts)}),
        "seed": plan.recipe.seed,
        "dtype": dtype_text(plan.dtype),
        "versions": package_versions(),
        "cards": {
            "base": read_card(plan.base.name, plan.base.folder).record(),
            "experts": {expert.name: read_card(expert.name, expert.folder).record() for expert in plan.experts},
        },
        "parameters": {
            "stored": stored + kept,
            "experts_distinct": distinct + kept,
            "experts": plan.expert_parameters,
            "indices": plan.num_experts * channels,
        },
        "vocabulary": plan.vocabulary.report(),
        "modules": modules,
    }


def add_relative_errors(
    report: dict[str, Any], plan: Plan, grouped: Mapping[str, GroupedModule], errors: DeltaErrors
) -> None:
    """Write into a conversion report how much of each expert's deltas the merge lost, by module and over all."""
    names = plan.expert_names
    lost, whole = torch.zeros(2, plan.num_experts, dtype=torch.float64)

    def relative(error_squares: torch.Tensor, delta_squares: torch.Tensor) -> dict[str, float | None]:
        return dict(zip(names, map(relative_error, error_squares.tolist(), delta_squares.tolist())))

    for path, module in grouped.items():
        squares = errors.squares(path)
        report["modules"][path] |= {
            "delta_norms": dict(zip(names, map(norm, module.delta_squares.tolist()))),
            "error_norms": dict(zip(names, map(norm, squares.tolist()))),
            "relative_errors": relative(squares, module.delta_squares),
        }
        lost, whole = lost + squares, whole + module.delta_squares
    report["relative_errors"] = relative(lost, whole)


def recipe_record(plan: Plan) -> dict[str, Any]:
    """The recipe as plain values; it says which models and texts, but not where they lay on this machine."""
    record = plan.recipe.record()
    experts = [{**spec, "model": source.shown} for spec, source in zip(record["experts"], plan.experts, strict=True)]
    record |= {"base_model": plan.base.shown, "experts": experts}
    for options in (record.get("calibration", {}), record.get("refine", {})):
        for key, value in options.items():
            if value and isinstance(value, str):
                place = plan.recipe.folder / Path(value).expanduser()
                options[key] = place.resolve().name if place.exists() else value
    return record


def package_versions() -> dict[str, str]:
    """Versions of the packages that the result may depend on, of those that are installed."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
