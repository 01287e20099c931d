"""A part counts as finished only while its file is what it was."""

import pytest
import torch

from conversion.journal import Journal, file_identity, fingerprint, read_fingerprint


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path, "f")
    (tmp_path / "shard").write_bytes(b"12345678data")
    journal.record("shard", tmp_path / "shard", skip=8)
    journal.save("groups", journal.folder / "groups", {"x": torch.arange(3)})
    return journal


def test_the_same_fingerprint_finds_what_was_finished(journal, tmp_path):
    assert read_fingerprint(tmp_path) == "f"
    again = Journal(tmp_path, "f")
    assert len(again) == 2 and again.finished("groups") and again.finished("shard", skip=8)
    assert not again.finished("nothing")
    assert again.files == {tmp_path / "shard", journal.folder / "groups"}


def test_another_fingerprint_finds_nothing(journal, tmp_path):
    assert len(Journal(tmp_path, "g")) == 0
    assert len(Journal(tmp_path, "f")) == 0  # the other run took over


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
    again = Journal(tmp_path, "f")
    assert len(again) == 2
    again.save("more", again.folder / "more", {})
    assert len(Journal(tmp_path, "f")) == 3


def test_what_was_not_finished_goes(journal, tmp_path):
    (tmp_path / "half").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / ".lock").touch()
    (journal.folder / "half").touch()
    journal.remove_unfinished()
    assert {path.name for path in tmp_path.rglob("*")} == {".lock", ".journal", "journal.jsonl", "groups", "shard"}
    journal.remove()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "shard"}
    assert read_fingerprint(tmp_path) is None


def test_fingerprints_tell_values_and_files_apart(tmp_path):
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 2, "b": 1})
    (tmp_path / "x").write_text("1")
    before = file_identity(tmp_path)
    assert file_identity(tmp_path) == before
    (tmp_path / "x").write_text("11")
    assert file_identity(tmp_path) != before
