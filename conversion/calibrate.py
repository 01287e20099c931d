"""Calibration alone: what every expert's channels do on its own texts, measured into one file for later conversions.

The recipe names the texts (`calibration: {data: ...}`); a recipe with `calibration: {file: ...}` and the same experts
is then converted without measuring again, with any budget.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from conversion.hub.conversion_report import package_versions
from conversion.io.code_hash import code_hash
from conversion.io.options import find_device, format_bytes, parse_size
from conversion.io.sources import check_unchanged
from conversion.io.staged_folder import StagedFile, check_disk_space, check_target_file, free_bytes
from conversion.merging.calibration import longest_text, measure_calibration, read_texts, texts_hash
from conversion.merging.calibration_file import Measured, is_calibration, write_calibration
from conversion.merging.calibration_memory import MAX_MEMORY, CalibrationMemory, plan_calibration
from conversion.merging.places import find_texts
from conversion.merging.plan import Plan, make_plan
from conversion.merging.recipe import Recipe, load_recipe
from conversion.vocabulary.calibration_texts import CalibrationText

FILE_NAME = "calibration.safetensors"


@dataclass(frozen=True)
class Prepared:
    """A calibration that everything is known of but its results."""

    plan: Plan
    data: str
    texts: list[CalibrationText]
    memory: CalibrationMemory

    @property
    def disk_bytes(self) -> int:
        """Room that it takes: its parts, and then the file that is made of them."""
        return 2 * self.memory.disk_bytes


def prepare(
    recipe: Recipe | Path | str, out: Path, overwrite: bool, max_memory: int | str, device: torch.device
) -> Prepared:
    """Read the texts and check everything that can be checked before weights are read; errors as of `calibrate`."""
    check_target_file(out, is_calibration, overwrite)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    data = find_texts(recipe)
    plan = make_plan(recipe)
    texts = read_texts(plan, data)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    memory = plan_calibration(plan, parse_size(max_memory, "max_memory"), threads, longest_text(texts))
    return Prepared(plan, data, texts, memory)


def calibrate(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    overwrite: bool = False,
    max_memory: int | str = MAX_MEMORY,
    device: str = "cpu",
    progress: bool = True,
) -> Measured:
    """Measure the experts of a recipe on its calibration texts.

    A run that is stopped keeps its finished parts in a hidden folder beside `out`; the same call goes on from there.

    Args:
        recipe: a recipe with calibration texts, or the path of its YAML file.
        out: the file to make. It appears only when it is complete.
        overwrite: replace a calibration file that is there.
        max_memory: memory that may be used beside one expert's weights, bytes or a size such as "7GB"; no result
            depends on it.
        device: where the models run.
        progress: show a progress bar.

    Raises:
        ValueError: the recipe, the checkpoints, the texts, the output or the memory are not as they must be, or a
            model gives values that are not finite.
        OSError: a file cannot be read or written.
    """
    out = Path(out)
    torch_device = find_device(device)
    prepared = prepare(recipe, out, overwrite, max_memory, torch_device)
    plan = prepared.plan
    fingerprint = calibration_fingerprint(prepared, torch_device)
    check_disk_space(out, prepared.disk_bytes, fingerprint)
    with contextlib.ExitStack() as stack:
        staged = stack.enter_context(StagedFile(out, is_calibration, overwrite, fingerprint=fingerprint))
        for reader in (plan.base_reader, *plan.readers):
            stack.callback(reader.close)
        calibration = measure_calibration(
            plan,
            prepared.texts,
            prepared.data,
            prepared.memory,
            staged.journal,
            device=torch_device,
            progress=progress,
        )
        stack.callback(calibration.close)
        write_calibration(calibration, staged.path / FILE_NAME, package_versions())
        check_unchanged((plan.base, *plan.experts))
        staged.publish(staged.path / FILE_NAME)
    return calibration.measured


def calibration_fingerprint(prepared: Prepared, device: torch.device) -> dict[str, Any]:
    """Everything that the parts of a calibration depend on."""
    plan = prepared.plan
    values = {
        "command": "calibrate",
        "inputs": {source.name: source.files for source in (plan.base, *plan.experts)},
        "vocabulary": plan.recipe.tokenizer_source,
        "texts": texts_hash(prepared.texts),
        "versions": package_versions(),
        "code": code_hash(),
        "device": str(device),
    }
    return json.loads(json.dumps(values))


def plan_only(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    overwrite: bool = False,
    max_memory: int | str = MAX_MEMORY,
    device: str = "cpu",
) -> dict[str, Any]:
    """Check everything that can be checked before weights are read, and say what it would take. Writes nothing.

    Returns:
        Plain values: `texts` and `tokens` by expert, `passes` over each expert's texts, `memory`, `output`.

    Raises:
        ValueError: `calibrate` would refuse this too; but a disk that is too full is only told.
    """
    prepared = prepare(recipe, Path(out), overwrite, max_memory, find_device(device))
    names, memory = prepared.plan.expert_names, prepared.memory
    lengths = {name: [] for name in names}
    for text in prepared.texts:
        lengths[names[text.expert]].append(len(text.input_ids))
    return {
        "texts": {name: len(own) for name, own in lengths.items()},
        "tokens": {name: sum(own) for name, own in lengths.items()},
        "longest": longest_text(prepared.texts),
        "matrices": {"measured": len(memory.sources), "modules": len(memory.inputs)},
        "passes": len(memory.groups(memory.sources)),
        "memory": {
            "weights": memory.weight_bytes,
            "activations": memory.threads * memory.activation_bytes,
            "covariances": memory.covariance_bytes + memory.written_bytes,
            "expected_peak": memory.expected_peak,
            "threads": memory.threads,
        },
        "output": {
            "bytes": memory.disk_bytes,
            "bytes_needed": prepared.disk_bytes,
            "bytes_free": free_bytes(Path(out)),
        },
    }


def plan_lines(plan: dict[str, Any]) -> list[Table | str]:
    """The plan for a terminal."""
    texts = Table("expert", "texts", "tokens", title="to measure on")
    for name, count in plan["texts"].items():
        texts.add_row(name, f"{count:,}", f"{plan['tokens'][name]:,}")
    memory, output, matrices = plan["memory"], plan["output"], plan["matrices"]
    room = "" if output["bytes_needed"] <= output["bytes_free"] else " (NOT ENOUGH)"
    return [
        texts,
        f"per expert  a forward and backward pass over its texts, then {plan['passes']} forward passes for the "
        f"covariances of {matrices['measured']} inputs, which {matrices['modules']} modules read",
        f"memory      at most {format_bytes(memory['expected_peak'])}: one expert's weights "
        f"{format_bytes(memory['weights'])}, activations {format_bytes(memory['activations'])} in "
        f"{memory['threads']} threads, covariances {format_bytes(memory['covariances'])}",
        f"output      {format_bytes(output['bytes'])}, and as much again while it is made; "
        f"{format_bytes(output['bytes_free'])} are free there{room}",
    ]
