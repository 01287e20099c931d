"""One command measures the experts into a file that appears whole, goes on after a stop, and replaces nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import conversion.calibrate as room
import conversion.merging.calibration as measuring
from conversion.calibrate import calibrate, plan_only
from conversion.merging.calibration_file import read_calibration
from conversion.merging.places import find_texts
from conversion.merging.plan import make_plan
from conversion.merging.recipe import load_recipe, parse_recipe


def write_texts(file: Path, num_experts: int = 2, count: int = 20) -> Path:
    rows = [
        {"prompt": f"What is {number} + {expert}?", "completion": f"It is {number + expert}.", "expert": f"e{expert}"}
        for number in range(count)
        for expert in range(num_experts)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def recipe(make_experts, write_recipe, tmp_path):
    """A recipe file whose texts lie beside it, named without their folder."""
    write_texts(tmp_path / "texts.jsonl")
    base, experts = make_experts("llama", 2, folder=tmp_path / "models")
    write_recipe(base, experts, tmp_path / "recipe.yaml", calibration={"data": "texts.jsonl"})
    return tmp_path / "recipe.yaml"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"recipe.yaml", "texts.jsonl", "models"}


def least_memory(recipe: Path) -> int:
    """Enough for one batch and the widest module at a time."""
    memory = room.prepare(recipe, recipe.parent / "nothing", False, "1GB", torch.device("cpu")).memory
    return memory.activation_bytes + max(memory.sum_bytes.values()) + memory.written_bytes


def test_the_file_is_read_for_the_same_experts(recipe, run, tmp_path):
    out = tmp_path / "calibration.safetensors"
    code, text, _ = run("calibrate", recipe, out, "--no-progress")
    assert code == 0 and "40 texts" in text
    assert names(tmp_path) == {out.name}
    calibration = read_calibration(out, make_plan(load_recipe(recipe)))
    assert calibration.texts == {"e0": 20, "e1": 20}
    assert calibration.measured.data == "texts.jsonl"
    assert str(tmp_path) not in out.read_bytes()[:100_000].decode("latin-1")
    assert calibration.gradient_squares("lm_head").sum() > 0
    covariance = calibration.covariance("model.layers.0.mlp.down_proj")
    assert torch.linalg.eigvalsh(covariance.double()).min() > -1e-6
    assert set(calibration.measured.tokens) == {"e0", "e1"}
    assert out.stat().st_size <= plan_only(recipe, tmp_path / "other")["output"]["bytes"] + 100_000


def test_the_same_bytes_again(recipe, tmp_path):
    """Whatever memory and threads, and where it is written."""
    calibrate(recipe, tmp_path / "first", progress=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        calibrate(recipe, tmp_path / "deep" / "second", max_memory=least_memory(recipe), progress=False)
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "deep" / "second").read_bytes()


def test_dry_run_says_what_it_takes(recipe, run, tmp_path):
    out = tmp_path / "out.safetensors"
    code, text, _ = run("calibrate", recipe, out, "--dry-run")
    assert code == 0 and names(tmp_path) == set()
    assert "e1" in text and "1 forward passes" in text and "one expert's weights" in text
    plan = plan_only(recipe, out, max_memory=least_memory(recipe))
    assert plan["passes"] > 1 and plan["memory"]["threads"] == 1
    assert plan["matrices"] == {"measured": 9, "modules": 15}
    code, _, err = run("calibrate", recipe, out, "--dry-run", "--max-memory", "1MB")
    assert code == 2 and "expected at least" in err and err.count("\n") == 1


def test_nothing_else_is_overwritten(recipe, run, tmp_path):
    out = tmp_path / "calibration.safetensors"
    calibrate(recipe, out, progress=False)
    content = out.read_bytes()
    code, _, err = run("calibrate", recipe, out)
    assert code == 2 and "is there already: choose another name, or replace it with --overwrite" in err
    assert run("calibrate", recipe, out, "--overwrite", "--no-progress")[0] == 0
    assert out.read_bytes() == content
    for other in (tmp_path / "texts.jsonl", tmp_path / "models" / "base" / "model.safetensors"):
        before = other.read_bytes()
        code, _, err = run("calibrate", recipe, other, "--overwrite")
        assert code == 2 and "is something else than this command writes, it is not overwritten" in err
        assert other.read_bytes() == before
    code, _, err = run("calibrate", recipe, tmp_path / "models", "--overwrite")
    assert code == 2 and "is a folder, expected the name of a file" in err


def test_recipes_without_texts_are_refused(make_experts, write_recipe, run, tmp_path):
    base, experts = make_experts("llama", 2)
    write_recipe(base, experts, tmp_path / "plain.yaml")
    code, _, err = run("calibrate", tmp_path / "plain.yaml", tmp_path / "out")
    assert code == 2 and "the recipe has no calibration texts: add calibration: {data: texts.jsonl}" in err
    write_recipe(base, experts, tmp_path / "gone.yaml", calibration={"data": "gone.jsonl"})
    code, _, err = run("calibrate", tmp_path / "gone.yaml", tmp_path / "out")
    assert code == 2 and f"there is no file {tmp_path / 'gone.jsonl'}" in err
    assert not (tmp_path / "out").exists()


def test_a_failed_run_keeps_what_it_finished(recipe, tmp_path, monkeypatch, caplog):
    """And leaves no file; the next run of the same texts goes on, one of others does not."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    calibrate(recipe, whole, progress=False)
    covariances, groups = measuring._Expert.covariances, []

    def count(self, paths, step):
        groups.append((self._number, len(paths)))
        return covariances(self, paths, step)

    def fail(self, paths, step):
        if self._number == 1:
            raise OSError("no")
        return covariances(self, paths, step)

    monkeypatch.setattr(measuring._Expert, "covariances", fail)
    with pytest.raises(OSError, match="no"):
        calibrate(recipe, out, progress=False)
    assert not out.exists() and "the same command goes on from there" in caplog.text
    (partial,) = [path for path in tmp_path.iterdir() if path.name.startswith(".out.partial-")]
    monkeypatch.setattr(measuring._Expert, "covariances", count)
    calibrate(recipe, out, progress=False)
    assert groups == [(1, 9)] and out.read_bytes() == whole.read_bytes() and not partial.exists()
    out.unlink()
    monkeypatch.setattr(measuring._Expert, "covariances", fail)
    with pytest.raises(OSError, match="no"):
        calibrate(recipe, out, progress=False)
    write_texts(tmp_path / "texts.jsonl", count=21)
    groups.clear()
    monkeypatch.setattr(measuring._Expert, "covariances", count)
    calibrate(recipe, out, progress=False)
    assert groups == [(0, 9), (1, 9)] and "differs in texts" in caplog.text
    assert names(tmp_path) == {"whole", "out"}


def test_a_killed_run_goes_on(recipe, tmp_path):
    """Killed when it had finished something, wherever it was then: no file, then the same bytes."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    calibrate(recipe, whole, progress=False)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-m", "conversion", "calibrate", str(recipe), str(out), "--no-progress"], env=environment
    )
    while process.poll() is None and len(list(tmp_path.glob(".out.partial-*/.journal/*.safetensors"))) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    killed = process.wait() == -signal.SIGKILL
    assert killed and not out.exists()
    calibrate(recipe, out, progress=False)
    assert out.read_bytes() == whole.read_bytes() and names(tmp_path) == {"whole", "out"}


def test_experts_that_change_meanwhile_are_refused(recipe, tmp_path, monkeypatch):
    write = room.write_calibration

    def change(*args):
        file = tmp_path / "models" / "expert1" / "model.safetensors"
        file.write_bytes(file.read_bytes())
        write(*args)

    monkeypatch.setattr(room, "write_calibration", change)
    with pytest.raises(ValueError, match="was changed while it was read"):
        calibrate(recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_before(recipe, run, tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.io.staged_folder.free_bytes", lambda *args: 1000)
    code, _, err = run("calibrate", recipe, tmp_path / "out")
    assert code == 2 and "out needs up to" in err and "are free there" in err


def test_a_device_that_is_too_small_is_told(recipe, run, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("Tried to allocate")

    monkeypatch.setattr(measuring, "load_expert_model", full)
    code, _, err = run("calibrate", recipe, tmp_path / "out", "--no-progress")
    assert code == 2 and "cpu has too little memory free to measure expert 'e0'" in err and err.count("\n") == 1


def test_a_data_set_is_not_taken_for_a_file(recipe, tmp_path):
    """Nor a file that is not there for a data set."""
    for name, expected in (
        ("texts.jsonl", str(tmp_path / "texts.jsonl")),
        ("gone.csv", str(tmp_path / "gone.csv")),
        (str(tmp_path / "gone.jsonl"), str(tmp_path / "gone.jsonl")),
        ("user/texts", "user/texts"),
        ("user/texts-v1.5", "user/texts-v1.5"),
        ("user/texts:test", "user/texts:test"),
    ):
        changed = {**json.loads(recipe.read_text()), "calibration": {"data": name}}
        assert find_texts(parse_recipe(changed, recipe.parent)) == expected
