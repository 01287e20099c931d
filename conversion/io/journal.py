"""What a stopped run had finished: parts of a checkpoint with their hashes, so that the same run goes on from there.

    <folder>/.journal/journal.jsonl   {"fingerprint": ...}, then one line {"part", "file", "sha256"} per finished part
    <folder>/.journal/...             files of the run that are no part of its result

A fingerprint is plain values: all that the result depends on. A part counts only if its file still has the bytes that
were recorded. A line that was cut short by a kill counts as not written, so neither the journal nor the parts need to
reach the disk in any order.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # slow to load, and most errors need none of it
    import torch

JOURNAL_FOLDER = ".journal"
JOURNAL_FILE = "journal.jsonl"
READ_BYTES = 1 << 20


class Journal:
    """The finished parts of the run that works in `folder`. Several threads may record.

    Args:
        folder: where the run works. What an earlier run of the same fingerprint finished there is known.
        fingerprint: what the run's result depends on, as JSON holds it.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]):
        self._root = folder
        self.folder = folder / JOURNAL_FOLDER
        self._lock = threading.Lock()
        self._parts: dict[str, dict[str, str]] = {}
        if read_fingerprint(folder) == fingerprint:
            self._parts = {line["part"]: line for line in _lines(folder)[1:]}
        self.folder.mkdir(exist_ok=True)
        # Written anew: a line that was cut short must not swallow the next one.
        lines = [{"fingerprint": fingerprint}, *self._parts.values()]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        beside = self.folder / f"{JOURNAL_FILE}.new"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.folder / JOURNAL_FILE)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def files(self) -> set[Path]:
        """Files of all recorded parts."""
        return {self._root / line["file"] for line in self._parts.values()}

    def finished(self, part: str, skip: int = 0) -> bool:
        """Whether a part was finished and its file is still what it was; `skip` as it was recorded."""
        line = self._parts.get(part)
        if line is None:
            return False
        file = self._root / line["file"]
        return file.is_file() and file_hash(file, skip) == line["sha256"]

    def record(self, part: str, file: Path, skip: int = 0) -> None:
        """Write down that `file` holds a finished part; its first `skip` bytes may change later."""
        line = {"part": part, "file": str(file.relative_to(self._root)), "sha256": file_hash(file, skip)}
        with self._lock:
            self._parts[part] = line
            with (self.folder / JOURNAL_FILE).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")

    def save(self, part: str, file: Path, tensors: Mapping[str, "torch.Tensor"]) -> None:
        """Write the tensors of a part into `file`, and write that down."""
        from safetensors.torch import save

        file.write_bytes(save(dict(tensors)))
        self.record(part, file)

    def remove_unfinished(self) -> None:
        """Remove every file and folder of the run that holds no recorded part, but hidden ones beside the journal."""
        keep = self.files | {self.folder / JOURNAL_FILE}
        keep |= {parent for file in keep for parent in file.parents}
        for path in (*self._root.iterdir(), *self.folder.iterdir()):
            if path in keep or (path.parent == self._root and path.name.startswith(".")):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def read_fingerprint(folder: Path) -> Any:
    """The fingerprint of the run that worked in `folder`; None if it finished nothing."""
    lines = _lines(folder)
    return lines[0].get("fingerprint") if len(lines) > 1 else None


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Names of the values that differ between two fingerprints, such as "recipe.seed"."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name


def file_hash(file: Path, skip: int = 0) -> str:
    """SHA-256 of a file from byte `skip` on."""
    digest = hashlib.sha256()
    buffer = bytearray(READ_BYTES)
    with file.open("rb", buffering=0) as stream:
        stream.seek(skip)
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _lines(folder: Path) -> list[dict[str, str]]:
    """The journal's lines up to the first that is damaged."""
    file = folder / JOURNAL_FOLDER / JOURNAL_FILE
    lines = []
    try:
        for text in file.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if line.keys() not in ({"fingerprint"}, {"part", "file", "sha256"}):
                break
            lines.append(line)
    except (OSError, ValueError, AttributeError):
        pass
    return lines
