"""A conversion that was stopped leaves nothing that loads, goes on where it was, and gives the same bytes."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import conversion
import modeling_channel_merged
from conversion import convert as convert_module
from conversion.convert import conversion_fingerprint, convert
from conversion.io.journal import differences
from conversion.io.shard_writer import ShardWriter
from conversion.io.weight_files import read_header
from conversion.merging import grouping_pass
from conversion.merging.plan import make_plan
from conversion.merging.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
SHARDS = "15KB"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def partial_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob(".out.partial-*"))


def assert_nothing_loads(folder: Path, all_shards: bool = False) -> None:
    """No config.json anywhere; and unless all shards were finished, none that safetensors reads."""
    assert not list(folder.rglob("config.json"))
    for file in [] if all_shards else folder.rglob("model*.safetensors"):
        with pytest.raises(SafetensorError):
            load_file(file)


@pytest.fixture
def recipe(make_experts, write_recipe, tmp_path) -> Path:
    base, experts = make_experts("qwen2", 3, folder=tmp_path / "in")
    write_recipe(base, experts, path=tmp_path / "recipe.json", preset="paper-ties")
    return tmp_path / "recipe.json"


@pytest.fixture
def work(tmp_path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def run(recipe, work):
    """Convert the recipe into work/out in many small shards."""

    def call(changed: Recipe | None = None) -> dict[str, bytes]:
        convert(changed or recipe, work / "out", max_shard_size=SHARDS, progress=False)
        return contents(work / "out")

    return call


@pytest.fixture
def whole(run, work) -> dict[str, bytes]:
    """What an uninterrupted run makes."""
    files = run()
    assert sum(name.endswith(".safetensors") for name in files) > 4
    assert ".journal" not in str(files)
    shutil.rmtree(work / "out")
    return files


@pytest.fixture
def grouped(monkeypatch) -> list[str]:
    """The modules that were grouped."""
    paths, group_module = [], grouping_pass.group_module

    def count(plan, costs, blocks, path, bar):
        paths.append(path)
        return group_module(plan, costs, blocks, path, bar)

    monkeypatch.setattr(grouping_pass, "group_module", count)
    return paths


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The tensors that were written."""
    names, write = [], ShardWriter.write

    def count(self, name, tensor, start=0):
        names.append(name)
        return write(self, name, tensor, start)

    monkeypatch.setattr(ShardWriter, "write", count)
    return names


def stop_at(monkeypatch, owner, name: str, call: int, error: BaseException):
    """Let the `call`-th call of a function raise."""
    function, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


STOPS = {
    "in the first pass": (grouping_pass, "group_module", 5),
    "early in the second pass": (ShardWriter, "write", 30),
    "late in the second pass": (ShardWriter, "write", 90),
    "before the last files": (convert_module, "write_hub_files", 1),
}


@pytest.mark.parametrize("moment", STOPS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left")], ids=["ctrl-c", "full"])
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(
    run, whole, work, grouped, written, monkeypatch, moment, error
):
    with monkeypatch.context() as patch:
        stop_at(patch, *STOPS[moment], error)
        with pytest.raises(type(error)):
            run()
    assert_nothing_loads(work, all_shards=moment == "before the last files")
    assert len(partial_folders(work)) == 1
    already_grouped, already_written = set(grouped), set(written)
    grouped.clear()
    written.clear()
    assert run() == whole
    assert len(already_grouped & set(grouped)) <= 3  # those that the threads were at
    if moment != "in the first pass":
        assert not grouped
    if moment == "before the last files":
        assert not written and already_written
    assert list(work.iterdir()) == [work / "out"]


def interrupted(run, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, convert_module, "write_hub_files", 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run()


def test_another_recipe_starts_afresh(run, recipe, whole, work, grouped, monkeypatch):
    interrupted(run, monkeypatch)
    grouped.clear()
    other = load_recipe(recipe)
    assert run(other.model_copy(update={"seed": 5})) != whole
    assert len(grouped) == len(set(grouped)) > 10
    assert list(work.iterdir()) == [work / "out"]


def test_changed_inputs_start_afresh(run, whole, grouped, monkeypatch, tmp_path):
    interrupted(run, monkeypatch)
    grouped.clear()
    os.utime(tmp_path / "in" / "expert1" / "model.safetensors", (1, 1))
    tells_inputs_apart = {".channel-merge.json"}
    assert {name: data for name, data in run().items() if name not in tells_inputs_apart} == {
        name: data for name, data in whole.items() if name not in tells_inputs_apart
    }
    assert len(grouped) > 10


@pytest.mark.parametrize("pattern", ["model-00002-of-*", ".journal/groups-00003*", ".journal/errors-00001*"])
@pytest.mark.parametrize("damage", ["flipped", "short", "gone"])
def test_damaged_parts_are_made_again(run, whole, work, monkeypatch, pattern, damage):
    interrupted(run, monkeypatch)
    (file,) = partial_folders(work)[0].glob(pattern)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if damage == "short" else data)
    assert run() == whole


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_journal_that_was_cut_short(run, whole, work, monkeypatch, cut):
    interrupted(run, monkeypatch)
    file = partial_folders(work)[0] / ".journal" / "journal.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    assert run() == whole


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("does not fit"), KeyError("unforeseen")])
def test_no_error_throws_finished_work_away(run, whole, grouped, monkeypatch, error):
    with monkeypatch.context() as patch:
        stop_at(patch, ShardWriter, "write", 40, error)
        with pytest.raises(type(error)):
            run()
    grouped.clear()
    assert run() == whole
    assert not grouped


def test_what_no_result_depends_on_keeps_finished_work(run, recipe, whole, work, grouped, monkeypatch, tmp_path):
    """A file that a system makes, another card, the same size written otherwise."""
    interrupted(run, monkeypatch)
    grouped.clear()
    (tmp_path / "in" / "expert1" / ".DS_Store").touch()
    (tmp_path / "in" / "expert2" / "notes.txt").touch()
    (tmp_path / "in" / "base" / "README.md").write_text("# A base\n")
    convert(recipe, work / "out", max_shard_size=15_000, device="cpu", progress=False)
    assert not grouped
    assert {name: data for name, data in contents(work / "out").items() if name != "README.md"} == {
        name: data for name, data in whole.items() if name != "README.md"
    }


def exchange(file: Path) -> None:
    """Other bytes, with the size and the time of modification of those before."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-4:] = bytes(4) if file.suffix == ".safetensors" else b"   }"
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)


def test_inputs_of_the_same_size_and_time_start_afresh(run, recipe, whole, work, grouped, monkeypatch, tmp_path):
    interrupted(run, monkeypatch)
    exchange(tmp_path / "in" / "expert1" / "model.safetensors")
    grouped.clear()
    changed = run()
    assert len(grouped) == len(set(grouped)) > 10 and changed != whole
    shutil.rmtree(work / "out")
    assert run() == changed


@pytest.mark.parametrize("name", ["expert2/model.safetensors", "base/model.safetensors", "expert0/tokenizer.json"])
def test_inputs_that_change_during_a_run_are_not_mixed(run, whole, work, monkeypatch, tmp_path, name):
    file, merged = tmp_path / "in" / name, convert_module.write_modules

    def change(*args):
        exchange(file) if file.suffix == ".safetensors" else file.write_text(file.read_text() + " ")
        return merged(*args)

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "write_modules", change)
        with pytest.raises(ValueError, match=f"{name} was changed while it was read"):
            run()
    assert not (work / "out").exists()
    changed = run()
    shutil.rmtree(work / "out")
    assert run() == changed


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of open files")
def test_many_shards_with_few_open_files(recipe, whole, work):
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))

    done = command_line(recipe, work / "out", shards="100", preexec_fn=limit)
    assert done.returncode == 0, done.stderr
    assert len(list((work / "out").glob("*.safetensors"))) > 50


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from conversion.convert import convert

recipe, work, shards = sys.argv[1], Path(sys.argv[2]), sys.argv[3]

def start(out):
    child = os.fork()
    if child == 0:
        convert(recipe, out, progress=False, max_shard_size=shards, chunk_bytes=2000)
        os._exit(0)
    return child

began = time.perf_counter()
assert os.waitpid(start(work / "whole"), 0)[1] == 0
seconds = time.perf_counter() - began
generator = random.Random(0)
for number in range(6):
    out = work / f"run{number}"
    child = start(out)
    time.sleep(generator.uniform(0.1, 1.0) * seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = [file.name for file in work.glob(".run*/config.json")]
    parts = [line for file in work.glob(".run*/.journal/journal.jsonl") for line in file.read_text().splitlines()]
    print(number, left, len(parts), flush=True)
    if not out.exists():
        assert os.waitpid(start(out), 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="uses fork and SIGKILL")
def test_killed_at_random_moments(recipe, work):
    command = [sys.executable, "-c", KILLS, recipe, work, SHARDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[1] for line in lines] == ["[]"] * 6
    assert any(int(line[2]) > 5 for line in lines), "no run was killed where there was anything to go on from"
    runs = sorted(work.iterdir())
    assert [path.name for path in runs] == [*(f"run{number}" for number in range(6)), "whole"]
    first, *others = (contents(path) for path in runs)
    assert all(other == first for other in others)


FULL_DISK = """
import sys
import conversion.convert

conversion.convert.check_disk_space = lambda *args: None  # the room was there when it was looked at
from conversion.__main__ import main

main(sys.argv[1:])
"""


def command_line(recipe: Path, out: Path, shards: str = SHARDS, **options) -> subprocess.CompletedProcess:
    arguments = ["convert", str(recipe), str(out), "--no-progress", "--max-shard-size", shards]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FULL_DISK, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)


def assert_one_clear_error(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and "out: there is no room for the output (" in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of file sizes")
def test_a_file_size_limit_is_one_clear_error(recipe, whole, work):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = command_line(recipe, work / "out", preexec_fn=limit)
    assert_one_clear_error(done)
    assert_nothing_loads(work)
    assert command_line(recipe, work / "out").returncode == 0
    assert contents(work / "out") == whole


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 160 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system needs more rights")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error(recipe, whole, small_disk):
    """And once there is more room, the same command finishes what it began."""
    done = command_line(recipe, small_disk / "out")
    assert_one_clear_error(done)
    assert "goes on from there" in done.stderr
    assert_nothing_loads(small_disk)
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    assert command_line(recipe, small_disk / "out").returncode == 0
    assert contents(small_disk / "out") == whole


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root cannot write to")
def test_a_read_only_target_is_one_clear_error(recipe):
    done = command_line(recipe, Path("/proc/self/out"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: /proc/") and done.stderr.count("Error") == 1


def test_a_shortened_input_is_refused(run, work, tmp_path):
    file = tmp_path / "in" / "expert2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="e2: .*is cut short or damaged"):
        run()
    assert not list(work.iterdir())


def test_an_input_that_shrinks_while_it_is_read_is_refused(run, work, tmp_path, monkeypatch):
    file = tmp_path / "in" / "expert2" / "model.safetensors"
    group_module = grouping_pass.group_module

    def shorten(*args):
        os.truncate(file, 5000)
        return group_module(*args)

    monkeypatch.setattr(grouping_pass, "group_module", shorten)
    with pytest.raises(ValueError, match="e2: .*ended .* bytes early"):
        run()
    assert not list(work.iterdir())


def test_no_flipped_bit_of_a_header_goes_unnoticed(tmp_path):
    """Every single bit: an error, other names than the architecture asks for, or the very same table of contents."""
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.zeros(4, 12), "b.bias": torch.zeros(10).bfloat16()}, file)
    expected = read_header(file)
    data = file.read_bytes()
    header_size = int.from_bytes(data[:8], "little")
    noticed = 0
    for bit in range(8 * (8 + header_size)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            tensors = read_header(file)
        except ValueError:
            noticed += 1
            continue
        assert tensors.keys() != expected.keys() or tensors == expected or unknown_dtypes(tensors), flipped[8:]
    assert noticed > 100


def unknown_dtypes(tensors) -> bool:
    return any(tensor.dtype_name not in ("F32", "BF16") for tensor in tensors.values())


def test_the_journal_names_every_part(run, whole, work, monkeypatch):
    interrupted(run, monkeypatch)
    lines = (partial_folders(work)[0] / ".journal" / "journal.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert set(records[0]) == {"fingerprint"}
    files = {record["file"] for record in records[1:]}
    assert {name for name in whole if name.endswith(".safetensors")} <= files


def test_a_run_of_other_code_starts_anew(recipe, tmp_path, monkeypatch):
    """The fingerprint is of every file of the program, in whichever room, and of the model's."""
    plan = make_plan(load_recipe(recipe))
    expected = conversion_fingerprint(plan)
    for package in (conversion, modeling_channel_merged):
        folder = Path(package.__file__).parent
        copy = shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(package, "__file__", str(copy / "__init__.py"))
    assert conversion_fingerprint(plan) == expected
    rooms = {file.parent for file in tmp_path.rglob("*.py")}
    assert {room.name for room in rooms} >= {"conversion", "channels", "merging", "io", "modeling_channel_merged"}
    for room in rooms:
        file = max(room.glob("*.py"))
        text = file.read_bytes()
        file.write_bytes(text + b"#")
        assert list(differences(conversion_fingerprint(plan), expected)) == ["code"], file
        file.write_bytes(text)
