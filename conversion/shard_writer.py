"""Writing safetensors shards row by row, and a folder that appears only when it is complete.

The headers are known before the first row is written, so a row block goes straight to its place in its file. A shard's
first 8 bytes (the header's length) are written last: a file that was left behind half written does not load. With a
journal, shards that a stopped run had finished are taken over, and written no second time.
"""

import contextlib
import errno
import json
import logging
import math
import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

import torch

try:
    import fcntl
except ImportError:  # no such module on Windows; there, two conversions to one folder are not told apart
    fcntl = None

from conversion.expert_reader import MODEL_FORMATS
from conversion.journal import Journal, read_fingerprint

logger = logging.getLogger(__name__)

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}

SINGLE_FILE, INDEX_FILE = MODEL_FORMATS[0].single, MODEL_FORMATS[0].index
CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"
HEADER_SIZE_BYTES = 8  # at the beginning of a safetensors file, its header's length
# What stops a run from outside: what it had finished is good, and the next run takes it over.
INTERRUPTIONS = (OSError, KeyboardInterrupt, SystemExit, MemoryError)
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} if hasattr(errno, "EDQUOT") else {errno.ENOSPC, errno.EFBIG}
SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the output: name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


def parse_size(size: int | str, name: str = "max_shard_size") -> int:
    """Bytes of a size such as 5000000, "5GB" or "500MiB"; `name` is what an error calls it."""
    text = str(size).strip().upper()
    for unit, factor in SIZE_UNITS.items():
        if text.endswith(unit) and text[: -len(unit)].strip().replace(".", "", 1).isdigit():
            return _positive(int(float(text[: -len(unit)]) * factor), size, name)
    if text.isdigit():
        return _positive(int(text), size, name)
    raise ValueError(f"{name} is {size!r}, expected a number of bytes or a size such as '5GB'")


def assign_shards(specs: Iterable[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Fill shards in order, none above `max_bytes` unless one tensor alone is; wide dtypes first, so all align."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return [sorted(shard, key=lambda spec: -spec.dtype.itemsize) for shard in shards]


class ShardWriter:
    """Writes blocks of the tensors of one checkpoint into shards of known layout. Several threads may write.

    Args:
        folder: where the shards go.
        specs: every tensor of the checkpoint, in the order in which shards are filled.
        max_shard_size: bytes, or a size such as "5GB".
        journal: keeps the hash of every finished shard; shards that are in it are not written again.
    """

    def __init__(
        self,
        folder: Path,
        specs: Iterable[TensorSpec],
        max_shard_size: int | str = "5GB",
        journal: Journal | None = None,
    ):
        self.folder = folder
        self._journal = journal
        shards = assign_shards(specs, parse_size(max_shard_size))
        self._specs: dict[str, TensorSpec] = {}
        self._places: dict[str, tuple[int, int]] = {}  # tensor -> shard, offset of its first byte in the file
        self._written: dict[str, int] = {}
        self._files = self._file_names(len(shards))
        self._locks = [threading.Lock() for _ in shards]
        self._missing = [sum(spec.numel for spec in shard) for shard in shards]  # elements that are not written yet
        self._header_sizes = []
        self._streams: dict[int, BinaryIO] = {}
        for number, shard in enumerate(shards):
            header = self._header(shard)
            self._header_sizes.append(len(header))
            offset = HEADER_SIZE_BYTES + len(header)
            for spec in shard:
                if spec.name in self._specs:
                    raise ValueError(f"the tensor {spec.name} is written twice")
                self._specs[spec.name], self._places[spec.name] = spec, (number, offset)
                self._written[spec.name] = 0
                offset += spec.num_bytes
            if journal is not None and journal.finished(self._files[number], skip=HEADER_SIZE_BYTES):
                self._written.update((spec.name, spec.numel) for spec in shard)
                self._missing[number] = 0
                continue
            self._streams[number] = stream = (folder / self._files[number]).open("wb", buffering=0)
            stream.truncate(offset)
            stream.seek(HEADER_SIZE_BYTES)
            stream.write(header)
            if not self._missing[number]:
                self._finish_shard(number)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.num_bytes for spec in self._specs.values())

    def is_written(self, name: str) -> bool:
        """Whether all of a tensor is there."""
        return self._written[name] == self._specs[name].numel

    def shard(self, name: str) -> int:
        """Number of the shard that a tensor is in."""
        return self._places[name][0]

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Write `tensor` as the rows of `name` that begin at row `start`.

        Args:
            tensor: (rows, *) block of the named tensor, in its dtype; blocks of one tensor must not overlap.
        """
        spec = self._specs[name]
        if tensor.dtype != spec.dtype or tensor.shape[1:] != spec.shape[1:]:
            raise ValueError(
                f"{name} holds rows of shape {list(spec.shape[1:])} in {spec.dtype}, "
                f"got {list(tensor.shape[1:])} in {tensor.dtype}"
            )
        if start + tensor.shape[0] > spec.shape[0]:
            raise ValueError(f"{name} has {spec.shape[0]} rows, got a block of {tensor.shape[0]} beginning at {start}")
        if tensor.numel() == 0:
            return
        shard, offset = self._places[name]
        view = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        with self._locks[shard]:
            if self._written[name] + tensor.numel() > spec.numel:
                raise ValueError(f"{name} has {spec.numel} elements, all of them are written already")
            stream = self._streams[shard]
            stream.seek(offset + start * (spec.num_bytes // spec.shape[0]))
            while len(view):
                view = view[stream.write(view) :]
            self._written[name] += tensor.numel()
            self._missing[shard] -= tensor.numel()
            complete = not self._missing[shard]
        if complete:
            self._finish_shard(shard)

    def finish(self, metadata: Mapping[str, int] | None = None) -> None:
        """Make the shards loadable and write the index; every tensor must have been written in full.

        Args:
            metadata: further entries of the index's metadata.
        """
        for name, spec in self._specs.items():
            if self._written[name] != spec.numel:
                raise ValueError(f"{name} has {spec.numel} elements, but {self._written[name]} were written")
        for file, header_size in zip(self._files, self._header_sizes, strict=True):
            with (self.folder / file).open("r+b", buffering=0) as stream:
                stream.write(header_size.to_bytes(HEADER_SIZE_BYTES, "little"))
                os.fsync(stream.fileno())
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": self.num_bytes, **(metadata or {})},
                "weight_map": {name: self._files[shard] for name, (shard, _) in sorted(self._places.items())},
            }
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams = {}

    def _finish_shard(self, number: int) -> None:
        """Close a shard that is complete but for its first bytes, and record it."""
        with self._streams.pop(number) as stream:
            os.fsync(stream.fileno())
        if self._journal is not None:
            self._journal.record(self._files[number], self.folder / self._files[number], skip=HEADER_SIZE_BYTES)

    @staticmethod
    def _file_names(count: int) -> list[str]:
        if count == 1:
            return [SINGLE_FILE]
        return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]

    @staticmethod
    def _header(shard: list[TensorSpec]) -> bytes:
        """Header of one shard, padded so that the data begins at a multiple of 8."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in shard:
            entries[spec.name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.num_bytes],
            }
            offset += spec.num_bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)


class StagedFolder:
    """A folder that appears under its name only when it is complete.

    Files are written into a hidden folder beside the target, which `publish` renames. Leaving the `with` block
    without `publish` removes it; what a killed run left behind is removed by the next one for the same target.

    With a fingerprint there is a journal of what is finished. A run that is stopped from outside (a full disk, an
    interrupt, a kill) then leaves its finished parts, and the next run of the same fingerprint works on in the same
    folder; one of another fingerprint starts afresh.

    Args:
        target: the folder to make; it must be absent or empty, or a model folder if `overwrite`.
        overwrite: replace an old model folder, once the new one is complete.
        fingerprint: of everything that the result depends on.
    """

    def __init__(self, target: Path, overwrite: bool = False, fingerprint: str | None = None):
        check_target(target, overwrite)
        self.target = target.resolve()
        self.overwrite = overwrite
        self.path = self._beside("partial")
        self.journal: Journal | None = None
        self._fingerprint = fingerprint
        self._lock: TextIO | None = None

    def __enter__(self) -> "StagedFolder":
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._take_leftovers()
        check_target(self.target, self.overwrite)
        if self._lock is None:
            self.path.mkdir()
            self._lock = _lock(self.path / LOCK_FILE)
        if self._fingerprint is not None:
            self.journal = Journal(self.path, self._fingerprint)
            self.journal.remove_unfinished()
        return self

    def __exit__(self, kind, exception, traceback) -> None:
        if self.journal is not None and len(self.journal) and isinstance(exception, INTERRUPTIONS):
            with contextlib.suppress(OSError):
                self.journal.remove_unfinished()
            logger.warning("what was finished is kept in %s: the same command goes on from there", self.path)
            self._lock.close()
        else:
            self._lock.close()
            shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(exception, OSError) and exception.errno in NO_SPACE:
            reason = f"there is no room for the output ({exception.strerror})"
            raise OSError(exception.errno, reason, str(self.target)) from exception

    def publish(self, config: str | None = None) -> None:
        """Flush every file and give the folder its name. An old folder under that name goes only then.

        Args:
            config: text of config.json, without which nothing loads: written last. None: it is there already.
        """
        check_target(self.target, self.overwrite)
        for file in self.path.iterdir():
            _sync(file)
        self._lock.close()
        (self.path / LOCK_FILE).unlink()
        if self.journal is not None:
            self.journal.remove()
            self.journal = None
        if config is not None:
            (self.path / CONFIG_FILE).write_text(config, encoding="utf-8")
        replaced = None
        if self.target.exists():
            replaced = self._beside("replaced")
            os.rename(self.target, replaced)
        os.rename(self.path, self.target)
        for path in (self.target / CONFIG_FILE, self.target, self.target.parent):
            _sync(path)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)

    def _beside(self, purpose: str) -> Path:
        return self.target.parent / f"{_prefix(self.target, purpose)}{secrets.token_hex(4)}"

    def _leftovers(self, purpose: str) -> list[Path]:
        prefix = _prefix(self.target, purpose)
        return [path for path in self.target.parent.iterdir() if path.name.startswith(prefix) and path.is_dir()]

    def _take_leftovers(self) -> None:
        """Take over what a stopped run of the same fingerprint left; remove what others left."""
        for path in self._leftovers("partial"):
            lock = _lock(path / LOCK_FILE)
            if lock is None:
                raise ValueError(f"another run is writing to {self.target} now (its files are in {path})")
            same = self._fingerprint is not None and read_fingerprint(path) == self._fingerprint
            if same and self._lock is None:
                self.path, self._lock = path, lock
                continue
            lock.close()
            shutil.rmtree(path)
        for path in self._leftovers("replaced"):
            if self.target.exists():
                shutil.rmtree(path)
            else:  # killed between the two renames: the old folder is still the best there is
                os.rename(path, self.target)


def check_target(target: Path, overwrite: bool = False) -> None:
    """ValueError unless a checkpoint may be written to `target`: absent, empty, or a model folder to be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"the output {target} is a file, expected a folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"the output folder {target} is not empty: choose another, or replace a model with --overwrite"
        )
    if not (target / CONFIG_FILE).is_file():
        raise ValueError(f"the output folder {target} is not a model folder (no {CONFIG_FILE}), it is not overwritten")


def leftover_bytes(target: Path) -> int:
    """Disk space that stopped runs hold beside `target`."""
    target = target.resolve()
    if not target.parent.is_dir():
        return 0
    folders = [path for path in target.parent.iterdir() if path.name.startswith(_prefix(target, "partial"))]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    # On disk a file that was prepared but not yet written is smaller than its size says.
    return sum(min(stat.st_size, getattr(stat, "st_blocks", stat.st_size) * 512) for stat in map(Path.stat, files))


def _prefix(target: Path, purpose: str) -> str:
    return f".{target.name}.{purpose}-"


def _positive(count: int, size: int | str, name: str) -> int:
    if count < 1:
        raise ValueError(f"{name} is {size!r}, expected at least one byte")
    return count


def _lock(file: Path) -> TextIO | None:
    """Take the lock of a folder; None if a running process holds it. The lock of a killed one is gone."""
    stream = file.open("w")
    if fcntl is not None:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.close()
            return None
    return stream


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
