"""Reading one checkpoint in row chunks: safetensors headers, names, then the bytes that are asked for.

A checkpoint is known by its headers before any tensor is read; `ExpertReader` then reads rows of a parameter by the
parameter's name in the base architecture, whatever the checkpoint calls it, with memory bounded by the chunk.
"""

import json
import math
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {**FLOAT_DTYPES, "I32": torch.int32, "I64": torch.int64}

# Tables that a module computes for itself and that older versions of Transformers saved beside the parameters.
COMPUTED_TABLES = (
    r"rotary_emb\.inv_freq$",
    r"\bh\.\d+\.attn\.(masked_)?bias$",
    r"\blayers\.\d+\.attention\.(masked_)?bias$",
)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its file, its place in it, the dtype's safetensors name and the shape."""

    file: Path
    dtype_name: str
    shape: tuple[int, ...]
    offset: int  # of the first byte, from the beginning of the file
    num_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Table of contents of one safetensors file; ValueError where the file is cut short or not safetensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= header_size <= size - 8:
            raise ValueError(f"{file} is not a whole safetensors file: its header does not fit its {size} bytes")
        try:
            header = json.loads(stream.read(header_size))
            header.pop("__metadata__", None)
            tensors = {}
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                tensors[name] = StoredTensor(
                    file, entry["dtype"], tuple(entry["shape"]), 8 + header_size + begin, end - begin
                )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file} is not a safetensors file: its header cannot be read") from None
    end_of_data = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=8 + header_size)
    if end_of_data != size:
        raise ValueError(f"{file} is cut short or damaged: it has {size} bytes, its header describes {end_of_data}")
    for name, tensor in tensors.items():
        if tensor.dtype_name in DTYPES and tensor.numel * tensor.dtype.itemsize != tensor.num_bytes:
            raise ValueError(f"{file} is damaged: {name} of shape {list(tensor.shape)} has {tensor.num_bytes} bytes")
    return tensors


def weight_files(folder: Path) -> list[str]:
    """Names of a checkpoint's safetensors files, from the single file or the index; they need not be there.

    Raises:
        ValueError: the folder has no safetensors checkpoint, or its index cannot be read.
    """
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    if (folder / INDEX_FILE).exists():
        return sorted(set(_weight_map(folder).values()))
    raise ValueError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{_other_format(folder)}")


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Table of contents of a checkpoint folder, over all its shards."""
    files = weight_files(folder)
    headers = {}
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is incomplete: its index names {name}, which is not there")
        headers[name] = read_header(folder / name)
    if files == [SINGLE_FILE]:
        return headers[SINGLE_FILE]
    tensors = {}
    for tensor, file in _weight_map(folder).items():
        if tensor not in headers[file]:
            raise ValueError(f"{folder}: the index says that {tensor} is in {file}, which does not hold it")
        tensors[tensor] = headers[file][tensor]
    return tensors


def match_names(
    checkpoint_names: Iterable[str], parameter_names: Iterable[str], prefix: str, ignored: Iterable[str] = ()
) -> tuple[dict[str, str], list[str], list[str]]:
    """Find every parameter's name in a checkpoint: the same, or with or without the base model's prefix.

    Args:
        checkpoint_names: names of the stored tensors.
        parameter_names: names that the architecture needs.
        prefix: `base_model_prefix` of the architecture ("model", "transformer", ...).
        ignored: regular expressions of stored tensors that are no parameters.

    Returns:
        parameter name -> checkpoint name; the parameters that are missing; the stored tensors that nobody asked for.
    """
    stored = set(checkpoint_names)
    patterns = [re.compile(pattern) for pattern in (*COMPUTED_TABLES, *ignored)]
    found, missing = {}, []
    for name in parameter_names:
        for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if candidate in stored:
                found[name] = candidate
                break
        else:
            missing.append(name)
    extra = sorted(stored - set(found.values()))
    return found, missing, [name for name in extra if not any(pattern.search(name) for pattern in patterns)]


class ExpertReader:
    """Rows of one checkpoint's parameters, by their names in the base architecture.

    Keeps one shard open. Several threads may read.

    Args:
        name: what errors call this checkpoint.
        tensors: parameter name -> stored tensor.
        transposed: parameters that are stored as (I, O) and read as (O, I) rows.
    """

    def __init__(self, name: str, tensors: Mapping[str, StoredTensor], transposed: Iterable[str] = ()):
        self.name = name
        self.tensors = dict(tensors)
        self.transposed = frozenset(transposed)
        self._file: Path | None = None
        self._stream: BinaryIO | None = None
        self._lock = threading.Lock()

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter as it is stored, in its stored dtype."""
        tensor = self.tensors[name]
        buffer = torch.empty(tensor.num_bytes, dtype=torch.uint8)
        self._read_into(tensor, buffer, 0)
        return buffer.view(tensor.dtype).view(tensor.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a parameter: (stop - start, I), or (stop - start,) of a vector; stored dtype."""
        tensor = self.tensors[name]
        if name in self.transposed:
            return self._read_columns(tensor, start, stop)
        row_bytes = tensor.num_bytes // max(tensor.shape[0], 1)
        buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        self._read_into(tensor, buffer, start * row_bytes)
        return buffer.view(tensor.dtype).view(stop - start, *tensor.shape[1:])

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._file = self._stream = None

    def _read_columns(self, tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
        """Columns of a matrix stored as (I, O), turned into rows (stop - start, I)."""
        inputs, channels = tensor.shape
        if (start, stop) == (0, channels):
            buffer = torch.empty(tensor.num_bytes, dtype=torch.uint8)
            self._read_into(tensor, buffer, 0)
            return buffer.view(tensor.dtype).view(inputs, channels).T.contiguous()
        size = tensor.dtype.itemsize
        buffer = torch.empty(inputs, (stop - start) * size, dtype=torch.uint8)
        for row in range(inputs):
            self._read_into(tensor, buffer[row], (row * channels + start) * size)
        return buffer.view(tensor.dtype).T.contiguous()

    def _read_into(self, tensor: StoredTensor, buffer: torch.Tensor, offset: int) -> None:
        """Fill `buffer` (uint8) from the tensor's bytes beginning at `offset`."""
        view = memoryview(buffer.numpy())
        with self._lock:
            if tensor.file != self._file:
                self.close()
                self._file, self._stream = tensor.file, tensor.file.open("rb", buffering=0)
            self._stream.seek(tensor.offset + offset)
            while len(view):
                count = self._stream.readinto(view)
                if not count:
                    raise ValueError(f"{self.name}: {tensor.file} ended {len(view)} bytes early while it was read")
                view = view[count:]


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        return json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / INDEX_FILE} cannot be read: expected JSON with a weight_map") from None


def _other_format(folder: Path) -> str:
    """What a folder without safetensors files holds instead, for the error."""
    others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in folder.glob(pattern))
    if not others:
        return ""
    return f", only {others[0]}: save it as safetensors first (load it with Transformers and call save_pretrained)"
