"""Ctrl-C in a command that runs long: one line says what is kept, the exit code is 130, and it can be given again."""

import hashlib
import os
import signal
from pathlib import Path

import pytest

import conversion.convert
from conversion.io.journal import Journal

SAVING = ("--save-strategy", "steps", "--save-steps", "3")


@pytest.fixture
def texts(write_jsonl, tmp_path) -> str:
    rows = [
        {"prompt": f"What is {number} + {expert}?", "completion": f"{number + expert}.", "expert": f"e{expert}"}
        for number in range(20)
        for expert in range(2)
    ]
    return write_jsonl(tmp_path / "texts.jsonl", rows)


@pytest.fixture
def recipe(make_experts, write_recipe, texts, tmp_path) -> Path:
    base, experts = make_experts("llama", 2)
    keys = {"grouping": {"num_groups": 1}, "calibration": {"data": texts}}
    write_recipe(base, experts, tmp_path / "recipe.json", **keys)
    return tmp_path / "recipe.json"


@pytest.fixture
def arguments(request, run, recipe, router_rows, write_jsonl, stored, tmp_path):
    """The command line of a command that writes OUT."""
    if request.param == "convert":
        return ["convert", recipe, "OUT", "--no-progress", "--max-shard-size", "30KB"]
    if request.param == "calibrate":
        return ["calibrate", recipe, "OUT", "--no-progress"]
    if request.param == "refine":
        assert run("convert", recipe, tmp_path / "merged-of-two", "--no-progress")[0] == 0
        options = ("--recipe", recipe, "--max-steps", 6, "--eval-steps", 3, "--save-steps", 3, "--use-cpu", "true")
        return ["refine", tmp_path / "merged-of-two", "--output-dir", "OUT", *options, "--disable-tqdm", "true"]
    train, evaluation = (write_jsonl(tmp_path / f"{seed}.jsonl", router_rows(30, seed)) for seed in (0, 1))
    options = ("--max-steps", "9", "--disable-tqdm", "true", "--use-cpu", "true", *SAVING)
    return [
        "train-router",
        stored.folder,
        "--train-data",
        train,
        "--eval-data",
        evaluation,
        "--output-dir",
        "OUT",
        *options,
    ]


def content(out: Path) -> str:
    """A hash of the tensors that a command wrote."""
    files = sorted(out.glob("*.safetensors")) if out.is_dir() else [out]
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.fixture(autouse=True)
def handled():
    """The signal is handled as in a terminal, also where the tests themselves run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupt(monkeypatch):
    """Make this process get the signal of Ctrl-C when so many parts of a run are finished."""

    def after(parts: int):
        record, finished = Journal.record, []

        def then_interrupt(self, *args, **kwargs):
            record(self, *args, **kwargs)
            finished.append(args)
            if len(finished) == parts:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(Journal, "record", then_interrupt)

    return after


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
@pytest.mark.parametrize("arguments", ["convert", "calibrate", "refine", "train-router"], indirect=True)
def test_the_same_command_goes_on(run, arguments, interrupt, caplog, tmp_path):
    def give(out: str, *more: str):
        return run(*[tmp_path / out if part == "OUT" else part for part in arguments], *more)

    code, _, errors = give("whole")
    assert code == 0, errors
    before = {path.name for path in tmp_path.iterdir()}
    interrupt(parts=7)
    caplog.clear()
    code, _, errors = give("stopped")
    assert code == 130 and errors.splitlines()[-1] == "Stopped." and "Traceback" not in errors
    (kept,) = [message for message in caplog.messages if "is kept in" in message]
    assert kept.startswith("what was finished is kept in ") and kept.endswith(" goes on from there")
    assert not (tmp_path / "stopped").exists()
    (hidden,) = {path.name for path in tmp_path.iterdir()} - before
    assert hidden.startswith(".stopped.partial-") and not (tmp_path / hidden / "config.json").exists()
    resuming = ("--resume-from-checkpoint", "true") if "--resume-from-checkpoint" in kept else ()
    code, _, errors = give("stopped", *resuming)
    assert code == 0, errors
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == before | {"stopped"}


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
@pytest.mark.parametrize("arguments", ["convert"], indirect=True)
@pytest.mark.parametrize("where", ["make_plan", "group_modules"])
def test_before_anything_is_finished(run, arguments, monkeypatch, tmp_path, where):
    """Then nothing is left; the first of the two is before the output was looked after."""
    monkeypatch.setattr(conversion.convert, where, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGINT))
    code, _, errors = run(*[tmp_path / "out" if part == "OUT" else part for part in arguments])
    assert code == 130 and errors.splitlines()[-1] == "Stopped." and "Traceback" not in errors
    assert not (tmp_path / "out").exists()
