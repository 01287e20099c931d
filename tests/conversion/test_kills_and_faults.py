"""Every command that writes, killed at random moments, on a full disk, and run twice at once: nothing is lost.

The output folder shows the old model or the new one, whole, and the same command given again makes the new one. What
`push` sends is in test_push.py.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conversion.__main__ import main
from conversion.io.staged_folder import FILE_LIST

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="uses fork and SIGKILL"),
]

ROOT = Path(__file__).parents[2]
COMMANDS = ["convert", "add-expert", "export", "train-router"]
SAVING = ("--save-strategy", "steps", "--save-steps", "3")

# Everything heavy is imported once; each run is a fork, which a kill ends at any of its own moments.
RUNS = """
import json, os, random, signal, sys, time
import conversion.add_expert, conversion.convert, conversion.export, conversion.train_router
from conversion.__main__ import main

if "check_disk_space" in sys.argv:  # the room was there when it was looked at
    conversion.convert.check_disk_space = conversion.add_expert.check_disk_space = lambda *args: None

def start(arguments, errors="/dev/null"):
    child = os.fork()
    if child == 0:
        stream = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1), os.dup2(stream, 2)
        code = 1
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    return child

def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for line in sys.stdin:
    order = json.loads(line)
    began = time.perf_counter()
    children = [start(arguments, errors) for arguments, errors in order["runs"]]
    if "kill_after" in order:
        time.sleep(order["kill_after"])
        os.kill(children[0], signal.SIGKILL)
    codes = [end(child) for child in children]
    print(json.dumps([codes, time.perf_counter() - began]), flush=True)
"""


class Runner:
    """A process that runs commands as its children."""

    def __init__(self, folder: Path, *options: str):
        self._folder = folder
        command = [sys.executable, "-c", RUNS, *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment
        )

    def __call__(self, *commands: list[str], **order) -> tuple[list[int], float, list[str]]:
        """Run commands at once: their exit codes (-9: killed), the seconds, and what each said."""
        errors = [str(self._folder / f"said{number}") for number in range(len(commands))]
        order["runs"] = list(zip(commands, errors))
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        codes, seconds = json.loads(self._process.stdout.readline())
        return codes, seconds, [Path(file).read_text() for file in errors]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@pytest.fixture
def runner(tmp_path):
    runner = Runner(tmp_path)
    yield runner
    runner.close()


@pytest.fixture
def arguments(request, stored, make_experts, write_recipe, router_rows, write_jsonl, tmp_path):
    """The command line of a command that writes to a folder."""
    command = request.param
    if command == "convert":
        base, experts = make_experts("llama", 3)
        write_recipe(base, experts, path=tmp_path / "recipe.json", preset="paper-ties")
        start = ["convert", str(tmp_path / "recipe.json"), "OUT", "--no-progress", "--max-shard-size", "30KB"]
    elif command == "add-expert":
        plain = tmp_path / "plain"
        with pytest.raises(SystemExit):
            main(["export", str(stored.folder), str(plain), "--expert", "math"])
        start = ["add-expert", str(stored.folder), str(plain), "OUT", "--name", "new", "--no-progress"]
    elif command == "export":
        start = ["export", str(stored.folder), "OUT", "--expert", "code", "--max-shard-size", "5KB"]
    else:
        train, evaluation = (
            write_jsonl(tmp_path / f"{name}.jsonl", router_rows(30, seed)) for seed, name in enumerate(("a", "b"))
        )
        start = ["train-router", str(stored.folder), "--train-data", train, "--eval-data", evaluation]
        start += ["--output-dir", "OUT", "--max-steps", "10", "--disable-tqdm", "true"]
        start += ["--use-cpu", "true", *SAVING]

    def at(out: Path, *more: str) -> list[str]:
        return [str(out) if part == "OUT" else part for part in start] + list(more)

    return at


@pytest.fixture
def old(stored, tmp_path):
    """Write another model to a folder, and give its content."""

    def make(out: Path) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["export", str(stored.folder), str(out), "--expert", "instruct"])
        assert stop.value.code == 0
        return content(out)

    return make


def content(folder: Path) -> str | None:
    """A hash of the model in a folder; None where there is none. The Trainer's own files hold times and paths."""
    if not (folder / "config.json").is_file():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and not name.parts[0].startswith(("checkpoint-", ".")):
            digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def assert_nothing_else_loads(folder: Path, known: set[str]) -> None:
    """Whatever has a config.json, hidden or not, is one of the known models."""
    for file in folder.rglob("config.json"):
        assert content(file.parent) in known or not list(file.parent.glob("*.safetensors")), file


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("arguments", COMMANDS, indirect=True)
def test_killed_at_random_moments(runner, arguments, old, tmp_path, overwrite):
    work = tmp_path / "work"
    work.mkdir()
    codes, seconds, said = runner(arguments(work / "whole", *["--overwrite"] * overwrite))
    assert codes == [0], said
    new, generator, killed = content(work / "whole"), random_moments(), 0
    for number in range(6):
        out = work / f"out{number}"
        known = {old(out), new} if overwrite else {new, None}
        command = arguments(out, *["--overwrite"] * overwrite)
        codes, _, _ = runner(command, kill_after=next(generator) * seconds)
        killed += codes == [-9]
        if out.exists() or overwrite and not list(work.glob(f".{out.name}.replaced-*")):
            assert content(out) in known
        assert_nothing_else_loads(work, known)
        if content(out) != new or overwrite:
            codes, _, said = runner(command)
            assert codes == [0], said
            assert hidden(work) == []
        assert content(out) == new
    assert killed >= 3


def random_moments():
    """Shares of a run's time, spread evenly in an order that jumps."""
    moment = 0.07
    while True:
        yield moment
        moment = (moment + 0.618) % 1.0


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("arguments", COMMANDS, indirect=True)
def test_two_runs_at_once(runner, arguments, old, tmp_path, overwrite):
    """At least one succeeds; one that does not says in a line that the other is there."""
    work = tmp_path / "work"
    work.mkdir()
    codes, _, said = runner(arguments(work / "whole", *["--overwrite"] * overwrite))
    assert codes == [0], said
    new = content(work / "whole")
    for number in range(2):
        out = work / f"out{number}"
        if overwrite:
            old(out)
        command = arguments(out, *["--overwrite"] * overwrite)
        codes, _, said = runner(command, command)
        assert 0 in codes and set(codes) <= {0, 2}, said
        for code, text in zip(codes, said, strict=True):
            (*_, last) = text.splitlines()
            assert code == 0 or "another run is writing" in last or "is not empty" in last, text
        assert content(out) == new
        assert hidden(work) == []


@pytest.fixture
def disk(tmp_path):
    """Give a file system of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> Path:
        try:
            command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a file system needs more rights")
        return folder

    yield mount
    while os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("arguments", COMMANDS, indirect=True)
def test_full_disks(arguments, old, tmp_path, disk, overwrite):
    """With too little room by any amount: one line, the old model as it was, and with room the command succeeds."""
    runner = Runner(tmp_path, "check_disk_space")
    try:
        codes, _, said = runner(arguments(tmp_path / "whole", *["--overwrite"] * overwrite))
        assert codes == [0], said
        new = content(tmp_path / "whole")
        needed = sum(file.stat().st_size for file in (tmp_path / "whole").rglob("*") if file.is_file())
        failed = 0
        for share in (0.1, 0.4, 0.7, 0.9):
            folder = disk("size=100m")
            before = old(folder / "out") if overwrite else None
            used = sum(file.stat().st_blocks for file in folder.rglob("*")) * 512
            subprocess.run(["mount", "-o", f"remount,size={used + int(share * needed)}", folder], check=True)
            command = arguments(folder / "out", *["--overwrite"] * overwrite)
            codes, _, said = runner(command)
            failed += codes == [2]
            if codes == [2]:
                (*_, last) = said[0].splitlines()
                assert last.startswith("Error: ") and "there is no room for the output" in last, said[0]
                assert content(folder / "out") == before
                assert_nothing_else_loads(folder, {before})
                subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)
                codes, _, said = runner(command)
            assert codes == [0], said
            assert content(folder / "out") == new and hidden(folder) == []
            subprocess.run(["umount", str(folder)], check=True)
        assert failed >= 3
    finally:
        runner.close()


@pytest.mark.parametrize("arguments", ["train-router"], indirect=True)
def test_training_goes_on_from_the_last_whole_checkpoint(runner, arguments, tmp_path):
    """Killed at any moment, and given again to go on: the same router as without a kill."""
    work = tmp_path / "work"
    work.mkdir()
    codes, seconds, said = runner(arguments(work / "whole"))
    assert codes == [0], said
    new, resumed = content(work / "whole"), 0
    for number, part in enumerate((0.95, 0.8, 0.65, 0.5)):
        out = work / f"out{number}"
        codes, _, _ = runner(arguments(out), kill_after=part * seconds)
        left = {path.name for path in work.glob(f".{out.name}.partial-*/checkpoint-*/trainer_state.json")}
        if content(out) is None:
            codes, _, said = runner(arguments(out, *(["--resume-from-checkpoint", "true"] if left else [])))
            assert codes == [0], said
            resumed += bool(left)
            assert hidden(work) == [] and hidden(out) == [FILE_LIST]
        assert content(out) == new
    assert resumed
