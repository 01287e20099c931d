"""Writing safetensors shards row by row.

The headers are known before the first row is written, so a row block goes straight to its place in its file. A shard's
first 8 bytes (the header's length) are written last: a file that was left behind half written does not load. With a
journal, shards that a stopped run had finished are taken over, and written no second time.
"""

import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from conversion.io.journal import Journal
from conversion.io.options import parse_size
from conversion.io.weight_files import DTYPE_NAMES
from conversion.io.weight_formats import MODEL_FORMATS

SINGLE_FILE, INDEX_FILE = MODEL_FORMATS[0].single, MODEL_FORMATS[0].index
HEADER_SIZE_BYTES = 8  # at the beginning of a safetensors file, its header's length
MAX_OPEN_SHARDS = 16  # some systems let a process open only 64 files; more than threads write at a time


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
        self._streams: dict[int, BinaryIO] = {}  # the open ones, the last used one last
        self._streams_lock = threading.Lock()
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
            with (folder / self._files[number]).open("wb") as stream:
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
            stream = self._open(shard)
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

    def _open(self, shard: int) -> BinaryIO:
        """The stream of a shard whose lock is held; of those that nobody writes to now, the oldest are closed."""
        with self._streams_lock:
            stream = self._streams.pop(shard, None)
            for other in list(self._streams):
                if len(self._streams) < MAX_OPEN_SHARDS:
                    break
                if self._locks[other].acquire(blocking=False):
                    self._streams.pop(other).close()
                    self._locks[other].release()
            if stream is None:
                stream = (self.folder / self._files[shard]).open("r+b", buffering=0)
            self._streams[shard] = stream
        return stream

    def _finish_shard(self, number: int) -> None:
        """Close a shard that is complete but for its first bytes, and record it."""
        with self._locks[number], self._open(number) as stream:
            os.fsync(stream.fileno())
            with self._streams_lock:
                del self._streams[number]
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
