"""Writing safetensors shards row by row, and a folder that appears only when it is complete.

The headers are known before the first row is written, so a row block goes straight to its place in its file. A shard's
first 8 bytes (the header's length) are written last: a file that was left behind half written does not load.
"""

import json
import math
import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # no such module on Windows; there, two conversions to one folder are not told apart
    fcntl = None

from conversion.expert_reader import INDEX_FILE, SINGLE_FILE

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"
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


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 5000000, "5GB" or "500MiB"."""
    text = str(size).strip().upper()
    for unit, factor in SIZE_UNITS.items():
        if text.endswith(unit) and text[: -len(unit)].strip().replace(".", "", 1).isdigit():
            return _positive(int(float(text[: -len(unit)]) * factor), size)
    if text.isdigit():
        return _positive(int(text), size)
    raise ValueError(f"max_shard_size is {size!r}, expected a number of bytes or a size such as '5GB'")


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
    """

    def __init__(self, folder: Path, specs: Iterable[TensorSpec], max_shard_size: int | str = "5GB"):
        self.folder = folder
        shards = assign_shards(specs, parse_size(max_shard_size))
        self._specs: dict[str, TensorSpec] = {}
        self._places: dict[str, tuple[int, int]] = {}  # tensor -> shard, offset of its first byte in the file
        self._written: dict[str, int] = {}
        self._files = self._file_names(len(shards))
        self._locks = [threading.Lock() for _ in shards]
        self._header_sizes = []
        self._streams = []
        for number, shard in enumerate(shards):
            header = self._header(shard)
            self._header_sizes.append(len(header))
            offset = 8 + len(header)
            for spec in shard:
                if spec.name in self._specs:
                    raise ValueError(f"the tensor {spec.name} is written twice")
                self._specs[spec.name], self._places[spec.name] = spec, (number, offset)
                self._written[spec.name] = 0
                offset += spec.num_bytes
            stream = (folder / self._files[number]).open("wb", buffering=0)
            self._streams.append(stream)
            stream.truncate(offset)
            stream.seek(8)
            stream.write(header)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.num_bytes for spec in self._specs.values())

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
            stream = self._streams[shard]
            stream.seek(offset + start * (spec.num_bytes // spec.shape[0]))
            while len(view):
                view = view[stream.write(view) :]
            self._written[name] += tensor.numel()

    def finish(self, metadata: Mapping[str, int] | None = None) -> None:
        """Make the shards loadable and write the index; every tensor must have been written in full.

        Args:
            metadata: further entries of the index's metadata.
        """
        for name, spec in self._specs.items():
            if self._written[name] != spec.numel:
                raise ValueError(f"{name} has {spec.numel} elements, but {self._written[name]} were written")
        for stream in self._streams:
            os.fsync(stream.fileno())
        for stream, header_size in zip(self._streams, self._header_sizes, strict=True):
            stream.seek(0)
            stream.write(header_size.to_bytes(8, "little"))
            os.fsync(stream.fileno())
        self.close()
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": self.num_bytes, **(metadata or {})},
                "weight_map": {name: self._files[shard] for name, (shard, _) in sorted(self._places.items())},
            }
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

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

    Args:
        target: the folder to make; it must be absent or empty, or a model folder if `overwrite`.
        overwrite: replace an old model folder, once the new one is complete.
    """

    def __init__(self, target: Path, overwrite: bool = False):
        check_target(target, overwrite)
        self.target = target.resolve()
        self.overwrite = overwrite
        self.path = self._beside("partial")
        self._lock = None

    def __enter__(self) -> "StagedFolder":
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        check_target(self.target, self.overwrite)
        self.path.mkdir()
        self._lock = (self.path / LOCK_FILE).open("w")
        if fcntl is not None:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self

    def __exit__(self, *exception) -> None:
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)

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
        return self.target.parent / f".{self.target.name}.{purpose}-{secrets.token_hex(4)}"

    def _leftovers(self, purpose: str) -> list[Path]:
        prefix = f".{self.target.name}.{purpose}-"
        return [path for path in self.target.parent.iterdir() if path.name.startswith(prefix) and path.is_dir()]

    def _remove_leftovers(self) -> None:
        for path in self._leftovers("partial"):
            if _is_locked(path / LOCK_FILE):
                raise ValueError(f"another run is writing to {self.target} now (its files are in {path})")
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
        raise ValueError(f"the output folder {target} is not empty: choose another, or replace it with overwrite")
    if not (target / CONFIG_FILE).is_file():
        raise ValueError(f"the output folder {target} is not a model folder (no {CONFIG_FILE}), it is not overwritten")


def _positive(count: int, size: int | str) -> int:
    if count < 1:
        raise ValueError(f"max_shard_size is {size!r}, expected at least one byte")
    return count


def _is_locked(file: Path) -> bool:
    """Whether a running process holds the lock; the lock of a killed one is gone."""
    if fcntl is None or not file.exists():
        return False
    with file.open("r+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
