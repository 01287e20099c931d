"""What a conversion would do, from configs and headers alone: tensors, rows, sizes, memory, what experts share."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from conversion.checkpoints.architecture import channel_parameters
from conversion.io.options import format_bytes
from conversion.io.staged_folder import check_target, free_bytes
from conversion.io.weight_files import dtype_text
from conversion.merging.calibration_source import CalibrationData, find_calibration
from conversion.merging.memory_budget import MAX_THREADS, memory_limit, plan_memory
from conversion.merging.plan import Plan, make_plan
from conversion.merging.recipe import Recipe, load_recipe


def plan_conversion(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    overwrite: bool = False,
    max_memory: int | str | None = None,
) -> dict[str, Any]:
    """Check everything that can be checked before data is read, and say what would come of it. Writes nothing.

    Args:
        recipe, out, overwrite, max_memory: as `convert` takes them.

    Returns:
        Plain values: `checkpoints`, `times_read`, `modules` by kind, `per_expert`, `output`, `memory`, `calibration`
        or None.

    Raises:
        ValueError: `convert` would refuse this too; but a disk that is too full is only told.
    """
    check_target(Path(out), overwrite)
    plan = make_plan(recipe if isinstance(recipe, Recipe) else load_recipe(recipe))
    threads = min(torch.get_num_threads(), MAX_THREADS)
    memory = plan_memory(plan, memory_limit(plan.recipe, max_memory), threads)
    calibration = find_calibration(plan, memory.max_memory, threads)
    return {
        "checkpoints": [
            {
                "name": source.name,
                "model": source.model,
                "tensors": len(reader.tensors),
                "bytes": sum(tensor.num_bytes for tensor in reader.tensors.values()),
            }
            for source, reader in zip((plan.base, *plan.experts), (plan.base_reader, *plan.readers), strict=True)
        ],
        "times_read": plan.times_read,
        "modules": modules_by_kind(plan),
        "per_expert": {
            "tensors": sum(map(len, plan.modules.per_expert.values())),
            "parameters": plan.per_expert_parameters,
        },
        "output": {
            "tensors": count_tensors(plan),
            "rows_at_most": rows_at_most(plan, plan.own_modules),
            "bytes_at_most": plan.max_bytes,
            "bytes_free": free_bytes(Path(out)),
            "dtype": dtype_text(plan.dtype),
        },
        "memory": {
            "budget": memory.max_memory,
            "expected_peak": memory.expected_peak,
            "threads": memory.threads,
            "chunk_bytes": memory.chunk_bytes,
        },
        "calibration": calibration
        and {
            "texts": calibration.texts,
            "bytes_in_between": calibration.disk_bytes,
            "expected_peak": calibration.memory.expected_peak if isinstance(calibration, CalibrationData) else 0,
        },
    }


def modules_by_kind(plan: Plan) -> dict[str, dict[str, int]]:
    """Channel modules that store rows, by kind; tied ones store an index only."""
    kinds: dict[str, Counter] = {}
    own: dict[str, list[str]] = {}
    for path, module in plan.modules.channel.items():
        tied = module.tied_to is not None
        kind = "tied head" if tied else module.kind
        counts = kinds.setdefault(kind, Counter(modules=0, channels=0, rows_at_most=0, rows_as_separate_models=0))
        counts["modules"] += 1
        counts["channels"] += module.out_features
        if not tied:
            own.setdefault(kind, []).append(path)
            counts["rows_as_separate_models"] += plan.num_experts * module.out_features
    for kind, paths in own.items():
        kinds[kind]["rows_at_most"] = rows_at_most(plan, paths)
    return {kind: dict(counts) for kind, counts in kinds.items()}


def rows_at_most(plan: Plan, paths: list[str]) -> int:
    """The most rows that these modules can have; with a budget, if it is spent on them, on the shortest rows first."""
    if plan.budget_parameters is None:
        return sum(plan.most_rows(path) for path in paths)
    spare = plan.budget_parameters - plan.least_parameters
    rows = 0
    for path in sorted(paths, key=plan.row_size):
        least, size = plan.least_rows(path), plan.row_size(path)
        more = min(plan.most_rows(path) - least, spare // size)
        rows, spare = rows + least + more, spare - more * size
    return rows


def count_tensors(plan: Plan) -> int:
    """Tensors of the output: rows, biases, indices, copies per expert, the router's head."""
    rows = sum(len(channel_parameters(plan.modules, path)) for path in plan.own_modules)
    copies = plan.num_experts * sum(map(len, plan.modules.per_expert.values()))
    return rows + len(plan.modules.channel) + copies + 2


def plan_tables(plan: dict[str, Any]) -> list[Table | str]:
    """The plan for a terminal."""
    checkpoints = Table("checkpoint", "model", "tensors", "size", title=f"to read, {plan['times_read']} times")
    for checkpoint in plan["checkpoints"]:
        name, model, tensors, size = checkpoint.values()
        checkpoints.add_row(name, model, str(tensors), format_bytes(size))
    modules = Table("channels of", "modules", "channels", "rows at most", "as separate models", title="merged")
    for kind, counts in plan["modules"].items():
        modules.add_row(kind, *(f"{count:,}" for count in counts.values()))
    output, memory, copies, calibration = plan["output"], plan["memory"], plan["per_expert"], plan["calibration"]
    room = "" if output["bytes_at_most"] <= output["bytes_free"] else " (NOT ENOUGH)"
    return [
        checkpoints,
        modules,
        f"per expert  {copies['tensors']} tensors ({copies['parameters']:,} parameters) are copied exactly; the "
        "other tensors' rows are shared where experts are alike",
        f"output      at most {output['rows_at_most']:,} rows in {output['tensors']} tensors, "
        f"{format_bytes(output['bytes_at_most'])} in {output['dtype']}; "
        f"{format_bytes(output['bytes_free'])} are free there{room}",
        f"memory      at most {format_bytes(memory['expected_peak'])} of {format_bytes(memory['budget'])}: "
        f"{memory['threads']} threads with chunks of {format_bytes(memory['chunk_bytes'])}",
        *(() if calibration is None else [calibration_line(calibration)]),
    ]


def calibration_line(calibration: dict[str, Any]) -> str:
    """Which texts count, and what measuring takes beside the rest."""
    texts = ", ".join(f"{count:,} of {name}" for name, count in calibration["texts"].items())
    if not calibration["bytes_in_between"]:
        return f"calibration {texts}, measured before"
    return (
        f"calibration {texts}; at most {format_bytes(calibration['expected_peak'])} of memory before the merge, "
        f"{format_bytes(calibration['bytes_in_between'])} of disk until it is done"
    )
