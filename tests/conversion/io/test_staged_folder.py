"""A folder appears whole or not at all, nothing else of the user's goes, and finished work stays until it is used."""

import errno
import json
import os
import shutil
import subprocess
import threading
from types import SimpleNamespace

import pytest

from conversion.io import staged_folder
from conversion.io.staged_folder import (
    FILE_LIST,
    StagedFolder,
    check_disk_space,
    check_not_a_source,
    check_target,
    free_bytes,
    leftover_bytes,
)


def visible(folder):
    return {path.name for path in folder.iterdir()} - {FILE_LIST}


def test_a_folder_appears_only_when_it_is_published(tmp_path):
    target = tmp_path / "deep" / "model"
    with StagedFolder(target) as staged:
        (staged.path / "weights").write_text("w")
        assert not target.exists()
        assert not (staged.path / "config.json").exists()
        staged.publish("{}")
    assert visible(target) == {"config.json", "weights"}
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_run_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="no"), StagedFolder(tmp_path / "model"):
        raise RuntimeError("no")
    assert list(tmp_path.iterdir()) == []


def make_model(folder, text):
    with StagedFolder(folder, overwrite=True) as staged:
        (staged.path / "weights").write_text(text)
        staged.publish(text)


def test_an_old_model_goes_only_when_the_new_one_is_there(tmp_path):
    target = tmp_path / "model"
    make_model(target, "old")
    with pytest.raises(ValueError, match="not empty"):
        StagedFolder(target)
    with pytest.raises(RuntimeError, match="no"), StagedFolder(target, overwrite=True):
        raise RuntimeError("no")
    assert (target / "config.json").read_text() == "old"
    make_model(target, "new")
    assert (target / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_only_model_folders_are_overwritten(tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match="not a model folder"):
        StagedFolder(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        StagedFolder(tmp_path / "precious", overwrite=True)


def test_an_empty_folder_may_be_the_target(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    make_model(target, "new")
    assert (target / "config.json").read_text() == "new"


def test_leftovers_of_killed_runs_go_with_the_next_one(tmp_path):
    leftover = tmp_path / ".model.partial-0a0b"
    leftover.mkdir()
    (leftover / "weights").touch()
    make_model(tmp_path / "model", "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


ONE = {"seed": 1, "inputs": {"e0": [1, 2], "e1": [3]}}
TWO = {"seed": 2, "inputs": {"e0": [1, 2], "e1": [4]}}


def interrupt(target, fingerprint, parts=("part",), error=KeyboardInterrupt):
    with pytest.raises(error), StagedFolder(target, fingerprint=fingerprint) as staged:
        for part in parts:
            staged.journal.save(part, staged.path / part, {})
        (staged.path / "unfinished").write_bytes(bytes(10_000))
        raise error


def test_an_interrupted_run_is_taken_over_by_the_same_one_only(tmp_path):
    target = tmp_path / "model"
    interrupt(target, ONE)
    (left,) = tmp_path.iterdir()
    assert {path.name for path in left.iterdir()} == {".journal", "part"}
    with StagedFolder(target, fingerprint=ONE) as staged:
        assert staged.path == left and staged.journal.finished("part")
        with pytest.raises(ValueError, match="another run"), StagedFolder(target, fingerprint=ONE):
            pass
        staged.publish("{}")
    assert visible(target) == {"config.json", "part"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("fingerprint", [TWO, None], ids=["other", "none"])
def test_what_another_run_finished_goes_only_when_this_one_has_succeeded(tmp_path, fingerprint, caplog):
    """It is not used, and the log says where it is, why, and when it goes."""
    target = tmp_path / "model"
    interrupt(target, ONE)
    (left,) = tmp_path.iterdir()
    with pytest.raises(RuntimeError, match="no"), StagedFolder(target, fingerprint=fingerprint) as staged:
        assert not (staged.path / "part").exists()
        raise RuntimeError("no")
    assert list(tmp_path.iterdir()) == [left]
    assert f"in {left}: it is not used" in caplog.text
    assert ("differs in inputs.e1, seed left" in caplog.text) == (fingerprint is not None)
    with StagedFolder(target, fingerprint=ONE) as staged:
        assert staged.journal.finished("part")
        (staged.path / "x").write_text("")
    interrupt(target, ONE)
    with StagedFolder(target, fingerprint=fingerprint) as staged:
        staged.publish("{}")
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, RuntimeError, MemoryError, KeyError, SystemExit])
def test_no_error_removes_what_was_finished(tmp_path, error):
    interrupt(tmp_path / "model", ONE, error=error)
    with StagedFolder(tmp_path / "model", fingerprint=ONE) as staged:
        assert staged.journal.finished("part")
        staged.publish("{}")


def test_nothing_is_kept_where_nothing_was_finished(tmp_path):
    interrupt(tmp_path / "model", ONE, parts=())
    assert not list(tmp_path.iterdir())


def test_what_a_stopped_run_left_counts_as_free(tmp_path):
    assert leftover_bytes(tmp_path / "new" / "model") == leftover_bytes(tmp_path / "model") == 0
    interrupt(tmp_path / "model", ONE)
    (left,) = tmp_path.iterdir()
    (left / "written").write_bytes(bytes(50_000))
    with (left / "prepared").open("wb") as stream:
        stream.truncate(10**9)
    assert 50_000 <= leftover_bytes(tmp_path / "model") == leftover_bytes(tmp_path / "model", ONE) < 60_000
    assert leftover_bytes(tmp_path / "model", TWO) == 0
    assert leftover_bytes(tmp_path / "other") == 0


def test_room_is_that_of_the_first_folder_that_is_there(tmp_path, monkeypatch):
    """What a run of the same fingerprint would use counts as free, what another one finished does not."""
    interrupt(tmp_path / "model", ONE)
    (left,) = tmp_path.iterdir()
    (left / "written").write_bytes(bytes(50_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000 if folder == tmp_path else -1))
    assert free_bytes(tmp_path / "new" / "model") == free_bytes(tmp_path / "model", TWO) == 1000
    assert 51_000 <= free_bytes(tmp_path / "model") == free_bytes(tmp_path / "model", ONE) < 61_000
    check_disk_space(tmp_path / "model", 51_000, ONE)
    with pytest.raises(ValueError, match="model needs up to 0.00 GB, but 0.00 GB are free there"):
        check_disk_space(tmp_path / "model", 51_000, TWO)


def test_a_model_moved_aside_by_a_killed_run_comes_back(tmp_path):
    aside = tmp_path / ".model.replaced-0a0b"
    make_model(aside, "old")
    with pytest.raises(ValueError, match="not empty"), StagedFolder(tmp_path / "model"):
        pass
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_two_runs_to_one_folder_do_not_mix(tmp_path):
    with StagedFolder(tmp_path / "model") as first:
        with pytest.raises(ValueError, match="another run"), StagedFolder(tmp_path / "model"):
            pass
        first.publish("{}")
    assert (tmp_path / "model" / "config.json").exists()


def test_the_lock_is_held_until_the_new_folder_stands(tmp_path, monkeypatch):
    """A second run that comes between the renames is refused, and takes nothing away."""
    target = tmp_path / "model"
    make_model(target, "old")
    rename, refused = os.rename, []

    def intrude(source, to):
        with pytest.raises(ValueError, match="another run is writing"):
            make_model(target, "intruder")
        refused.append(to)
        rename(source, to)

    monkeypatch.setattr(os, "rename", intrude)
    make_model(target, "new")
    assert len(refused) == 2 and (target / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_one_of_several_runs_at_once_succeeds(tmp_path):
    """Threads that begin together: each either makes the whole model or is refused."""
    target, results, barrier = tmp_path / "model", [], threading.Barrier(6)

    def run(number):
        barrier.wait()
        try:
            with StagedFolder(target, overwrite=True) as staged:
                (staged.path / "weights").write_text(str(number))
                staged.publish(str(number))
            results.append((target / "config.json").exists())
        except ValueError as error:
            results.append(str(error))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert True in results and False not in results
    assert all("another run is writing" in result for result in results if result is not True)
    assert (target / "config.json").read_text() == (target / "weights").read_text()
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_rename_brings_the_old_model_back_and_keeps_the_work(tmp_path, monkeypatch):
    target = tmp_path / "model"
    make_model(target, "old")
    rename = os.rename

    def fail(source, to):
        if to == target and ".partial-" in str(source):
            raise OSError(errno.EIO, "no")
        rename(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="no"), StagedFolder(target, True, ONE) as staged:
            staged.journal.save("part", staged.path / "part", {})
            staged.publish("new")
    assert (target / "config.json").read_text() == "old"
    with StagedFolder(target, True, ONE) as staged:
        assert staged.journal.finished("part")
        staged.publish("new")
    assert visible(target) == {"config.json", "part"} and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["notes.txt", "experts/mine/adapter.safetensors", ".git/HEAD"])
def test_a_file_of_the_users_is_never_overwritten(tmp_path, name):
    """Neither one that was there before, nor one that came while the run went on."""
    target = tmp_path / "model"
    make_model(target, "old")
    (target / ".DS_Store").touch()
    check_target(target, overwrite=True)
    with pytest.raises(ValueError, match=f"holds {name}, which no run"), StagedFolder(target, True) as staged:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("precious")
        staged.publish("new")
    with pytest.raises(ValueError, match=f"holds {name}, which no run"):
        StagedFolder(target, overwrite=True)
    assert (target / name).read_text() == "precious" and (target / "config.json").read_text() == "old"


def test_a_model_from_elsewhere_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say what was written there"):
        check_target(tmp_path, overwrite=True)


def test_a_link_to_itself_is_no_output(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match="a symbolic link to itself"):
        StagedFolder(tmp_path / "loop")


def test_an_empty_folder_stays_the_same_folder(tmp_path):
    """It may be a container's volume, or have rights that its parent does not give."""
    target = tmp_path / "model"
    target.mkdir(mode=0o750)
    (target / ".DS_Store").touch()
    before = target.stat()
    with StagedFolder(target) as staged:
        assert staged.path.parent == target
        (staged.path / "weights").write_text("w")
        staged.publish("{}")
    after = target.stat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert visible(target) == {".DS_Store", "config.json", "weights"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture
def volume(tmp_path):
    """A file system of its own, as a container's volume is."""
    folder = tmp_path / "volume"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system needs more rights")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_mount_point_is_written_and_overwritten(volume):
    (volume / "lost+found").mkdir()
    make_model(volume, "old")
    with pytest.raises(ValueError, match="not empty"):
        StagedFolder(volume)
    make_model(volume, "new")
    assert (volume / "config.json").read_text() == (volume / "weights").read_text() == "new"
    assert visible(volume) == {"lost+found", "config.json", "weights"}
    assert list(volume.parent.iterdir()) == [volume]


def test_a_folder_that_cannot_be_renamed_is_filled(tmp_path, monkeypatch):
    """A mount point that does not look like one."""
    target = tmp_path / "model"
    make_model(target, "old")
    rename = os.rename

    def fail(source, to):
        if source == target:
            raise OSError(errno.EBUSY, "busy")
        rename(source, to)

    monkeypatch.setattr(os, "rename", fail)
    make_model(target, "new")
    assert (target / "config.json").read_text() == (target / "weights").read_text() == "new"
    assert visible(target) == {"config.json", "weights"} and list(tmp_path.iterdir()) == [target]


class Killed(BaseException):
    pass


def kill_at(monkeypatch, step):
    """From the `step`-th call on, nothing is renamed or removed any more."""
    calls = []

    def killing(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) >= step:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, killing(getattr(owner, name)))


@pytest.mark.parametrize("old", [None, "old"])
def test_killed_at_any_step_of_moving_in(tmp_path, monkeypatch, old):
    """At each the next run finds the old or the new model whole; what loads in between is whole too."""
    monkeypatch.setattr(staged_folder, "_is_a_folder_of_its_own", lambda target: target.is_dir())
    for step in range(1, 40):
        target = tmp_path / f"model{step}"
        target.mkdir()
        if old:
            make_model(target, old)
            (target / "only_old").touch()
            files = json.loads((target / FILE_LIST).read_text())["files"]
            (target / FILE_LIST).write_text(json.dumps({"files": [*files, "only_old"]}))
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            try:
                make_model(target, "new")
                break
            except Killed:
                pass
        if (target / "config.json").exists():
            assert (target / "config.json").read_text() == (target / "weights").read_text()
        try:
            with StagedFolder(target) as staged:
                assert old is None
                staged.publish("again")
        except ValueError as error:
            assert "not empty" in str(error)
            text = (target / "config.json").read_text()
            assert text == (target / "weights").read_text() and text in (old, "new")
            assert (target / "only_old").exists() == (text == "old")
        assert not [path for path in target.iterdir() if "moving" in path.name or "complete" in path.name]
    assert step > 6


def test_no_room_is_one_clear_error_whoever_says_it(tmp_path):
    """safetensors raises an error of its own."""

    class SafetensorError(Exception):
        pass

    with pytest.raises(OSError, match="there is no room for the output") as raised, StagedFolder(tmp_path / "model"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert raised.value.filename == str(tmp_path / "model") and not list(tmp_path.iterdir())


def test_a_target_is_no_folder_that_is_read(tmp_path):
    """Neither one of them, also by another path, nor a folder around it; one inside or beside them may be."""
    model = tmp_path / "models" / "base"
    model.mkdir(parents=True)
    folders = {"the expert": tmp_path / "expert", "the base": model}
    for target in (model, model.parent, tmp_path, tmp_path / "models" / "new" / ".." / "base"):
        with pytest.raises(ValueError, match="the output folder .* holds the (base|expert): choose another"):
            check_not_a_source(target, folders)
    for target in (model / "merged", tmp_path / "models" / "base-2"):
        check_not_a_source(target, folders)
