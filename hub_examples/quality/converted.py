"""Contenders that are this project's own conversions, made as a user makes them: a recipe in, a checkpoint out."""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from conversion.checkpoints.checkpoint_report import inspect_checkpoint
from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.checkpoints.stored_expert import StoredExpertReader
from conversion.convert import convert
from conversion.merging.recipe import Recipe, parse_recipe
from quality.problem import BYTES, Problem, State, Stored

GENERAL_SHARE = 0.25  # texts of the other experts, for each of an expert's own, where general text is asked for


def recipe_with(problem: Problem, choices: dict[str, Any]) -> Recipe:
    """A recipe of all experts of the set with these choices."""
    expert_set, work_dir = problem.expert_set, problem.work_dir
    values = {
        "base_model": str(expert_set.base_folder(work_dir).resolve()),
        "experts": [
            {"name": expert.name, "model": str(expert_set.expert_folder(work_dir, expert).resolve())}
            for expert in expert_set.experts
        ],
        "seed": problem.seed,
        **choices,
    }
    return parse_recipe(values, problem.scratch)


def converted(problem: Problem, name: str, choices: dict[str, Any]) -> Path:
    """The checkpoint of such a recipe, made once for each name."""
    folder = problem.scratch / name
    if not folder.exists():
        convert(recipe_with(problem, choices), folder, progress=False)
    return folder


def one_merge(problem: Problem, method: str, parameters: dict[str, float]) -> Stored:
    """All experts of every channel in one group, which needs no channel indices."""
    choices = {"grouping": {"num_groups": 1}, "merge_method": method, "parameters": parameters}
    stored = read_stored(problem, converted(problem, method, choices))
    return replace(stored, num_bytes=stored.num_bytes - problem.index_bytes)


def preset_groups(problem: Problem, preset: str, num_groups: int) -> Stored:
    """A preset of the paper (arXiv 2412.15283) at K groups a channel."""
    choices = {"preset": preset, "grouping": {"num_groups": num_groups}}
    return read_stored(problem, converted(problem, f"{preset}-{num_groups}", choices))


def half_the_rows(problem: Problem, preset: str) -> Stored | None:
    """A preset of the paper at K = N / 2, where that is not its own K = 2."""
    num_groups = len(problem.experts) // 2
    return preset_groups(problem, preset, num_groups) if num_groups > 2 else None


def budget_alone(problem: Problem, budget: float) -> Stored:
    """Ours without any text."""
    return read_stored(problem, converted(problem, f"budget-{budget}", {"grouping": {"budget": budget}}))


def calibrated(problem: Problem, budget: float, general: bool = False) -> Stored:
    """Ours as recommended: a budget, spent by what the channels do on the calibration texts.

    With `general`, every expert is also calibrated on some texts of the others.
    """
    return read_stored(problem, calibrated_checkpoint(problem, budget, general))


def refined(problem: Problem, budget: float, general: bool = False) -> Stored:
    """The same, then trained on the calibration texts with the experts as teachers."""
    from conversion.refine import refine

    checkpoint = calibrated_checkpoint(problem, budget, general)
    out = problem.scratch / f"refined-{checkpoint.name}"
    recipe = recipe_with(problem, calibrated_choices(problem, budget, general))
    with contextlib.redirect_stdout(sys.stderr):  # the Trainer's log; tables and JSON stay alone
        texts, rate = write_calibration(problem, general), problem.expert_set.refinement_rate
        refine(checkpoint, recipe, out, train_data=str(texts.resolve()), learning_rate=rate)
    return read_stored(problem, out)


def calibrated_checkpoint(problem: Problem, budget: float, general: bool) -> Path:
    name = f"calibrated-{budget}{'-general' * general}"
    return converted(problem, name, calibrated_choices(problem, budget, general))


def calibrated_choices(problem: Problem, budget: float, general: bool) -> dict[str, Any]:
    return {
        "preset": "recommended",
        "calibration": {"file": calibration_file(problem, general).name},
        "grouping": {"budget": budget},
    }


def calibration_file(problem: Problem, general: bool = False) -> Path:
    """What the experts do on the calibration texts, measured once for all budgets."""
    from conversion.calibrate import calibrate

    texts = write_calibration(problem, general)
    file = texts.with_suffix(".safetensors")
    if not file.exists():
        choices = {"preset": "recommended", "calibration": {"data": texts.name}}
        calibrate(recipe_with(problem, choices), file, progress=False)
    return file


def write_calibration(problem: Problem, general: bool = False) -> Path:
    """The calibration texts of all experts, as a recipe names them."""
    file = problem.scratch / f"calibration{'-general' * general}.jsonl"
    own = problem.questions.calibration
    texts = [(name, text) for name, questions in own.items() for text in questions]
    if general:
        for name, questions in own.items():
            others = [text for other, found in own.items() if other != name for text in found]
            step = len(others) / (GENERAL_SHARE * len(questions))
            texts += [(name, others[int(place * step)]) for place in range(int(GENERAL_SHARE * len(questions)))]
    rows = [{"prompt": text.prompt, "completion": text.completion, "expert": name} for name, text in texts]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("".join(lines), encoding="utf-8")
    return file


def read_stored(problem: Problem, checkpoint: Path) -> Stored:
    """The views of a merged checkpoint; bytes are those of all rows, per-expert parameters and channel indices."""
    report = inspect_checkpoint(checkpoint)
    with MergedCheckpoint(checkpoint) as merged:
        views = [read_view(problem, merged, name) for name in problem.names]
    rows = {f"{matrix.path}.weight": matrix.rows for matrix in report.matrices}
    return Stored(views, BYTES * report.parameters + report.index_bytes, rows, checkpoint)


def read_view(problem: Problem, merged: MergedCheckpoint, name: str) -> State:
    """The parameters that one expert answers with."""
    reader = StoredExpertReader(merged, name)
    return {parameter: reader.read(parameter).float() for parameter in problem.base}


def experts(problem: Problem) -> Stored:
    """All experts as they are."""
    rows = {name: len(problem.experts) * problem.base[name].shape[0] for name in problem.matrices}
    return Stored(problem.experts, problem.expert_bytes, rows)


def base_alone(problem: Problem) -> Stored:
    """What the experts were trained from, for every question."""
    return Stored([problem.base] * len(problem.experts), problem.model_bytes)
