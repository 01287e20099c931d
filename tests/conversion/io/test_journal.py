"""A part counts as finished only while its file is what it was."""

from pathlib import Path

import pytest
import torch

from conversion.io.journal import Journal, differences, read_fingerprint


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path, {"f": 1})
    (tmp_path / "shard").write_bytes(b"12345678data")
    journal.record("shard", tmp_path / "shard", skip=8)
    journal.save("groups", journal.folder / "groups", {"x": torch.arange(3)})
    return journal


def test_the_same_fingerprint_finds_what_was_finished(journal, tmp_path):
    assert read_fingerprint(tmp_path) == {"f": 1}
    again = Journal(tmp_path, {"f": 1})
    assert len(again) == 2 and again.finished("groups") and again.finished("shard", skip=8)
    assert not again.finished("nothing")
    assert again.files == {tmp_path / "shard", journal.folder / "groups"}


def test_another_fingerprint_finds_nothing(journal, tmp_path):
    assert len(Journal(tmp_path, {"g": 1})) == 0
    assert len(Journal(tmp_path, {"f": 1})) == 0  # the other run took over


def test_skipped_bytes_may_change_and_no_others(journal, tmp_path):
    (tmp_path / "shard").write_bytes(b"abcdefghdata")
    assert journal.finished("shard", skip=8)
    (tmp_path / "shard").write_bytes(b"abcdefghdatb")
    assert not journal.finished("shard", skip=8)
    (tmp_path / "shard").unlink()
    assert not journal.finished("shard", skip=8)


@pytest.mark.parametrize("ending", ['{"part": "a", "fi', "\x00\x00", "[]\n", '{"part": "a"}\n'])
def test_a_damaged_ending_does_not_spoil_what_comes_after(journal, tmp_path, ending):
    with (journal.folder / "journal.jsonl").open("a") as stream:
        stream.write(ending)
    again = Journal(tmp_path, {"f": 1})
    assert len(again) == 2
    again.save("more", again.folder / "more", {})
    assert len(Journal(tmp_path, {"f": 1})) == 3


def test_what_was_not_finished_goes(journal, tmp_path):
    (tmp_path / "half").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / ".lock").touch()
    (journal.folder / "half").touch()
    journal.remove_unfinished()
    assert {path.name for path in tmp_path.rglob("*")} == {".lock", ".journal", "journal.jsonl", "groups", "shard"}


def test_folders_of_finished_parts_stay(journal, tmp_path):
    for name in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state").touch()
    journal.record("checkpoint-1/state", tmp_path / "checkpoint-1" / "state")
    journal.remove_unfinished()
    assert (tmp_path / "checkpoint-1" / "state").exists() and not (tmp_path / "checkpoint-2").exists()


def test_a_kill_while_the_journal_is_opened_loses_nothing(journal, tmp_path, monkeypatch):
    """The old one stays until the new one is written."""

    def fail(self, text, **kwargs):
        with self.open("w") as stream:
            stream.write(text[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="No space"):
            Journal(tmp_path, {"f": 1})
    assert len(Journal(tmp_path, {"f": 1})) == 2


def test_differences_are_named():
    before = {"recipe": {"seed": 1, "dtype": "float32"}, "inputs": {"a": {"x": [1, 2]}}, "code": "1"}
    now = {"recipe": {"seed": 2, "dtype": "float32"}, "inputs": {"a": {"x": [1, 3]}}, "device": "cpu", "code": "1"}
    assert list(differences(before, now)) == ["device", "inputs.a.x", "recipe.seed"]
    assert not list(differences(now, now))
