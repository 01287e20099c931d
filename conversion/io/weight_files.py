"""The weight files of one checkpoint and what they hold, known from their tables of contents.

A checkpoint is safetensors or PyTorch's older `.bin`; no tensor is read here, and nothing of a pickle runs.
"""

import math
import re
import reprlib
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.io.foreign_files import check_ordinary, parse_json
from conversion.io.weight_formats import MODEL_FORMATS, WeightFormat, weight_files, weight_map
from conversion.io.wording import one_line

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {**FLOAT_DTYPES, "F64": torch.float64, "I32": torch.int32, "I64": torch.int64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000  # as safetensors itself reads


def dtype_text(dtype: torch.dtype) -> str:
    """What configs, recipes and reports call a dtype: "bfloat16", for example."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its file, its place in it, the dtype's safetensors name and the shape.

    A dtype that nothing here reads may have any name.
    """

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
    """Table of contents of one file of a checkpoint; ValueError where it is cut short or something else."""
    return _read_pickled_header(file) if file.suffix == ".bin" else _read_safetensors_header(file)


def read_headers(folder: Path, formats: Iterable[WeightFormat] = MODEL_FORMATS) -> dict[str, StoredTensor]:
    """Table of contents of a checkpoint folder, over all its shards."""
    formats = tuple(formats)
    files = weight_files(folder, formats)
    headers = {}
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is incomplete: its index names {name}, which is not there")
        headers[name] = read_header(folder / name)
    if files[0] in {format.single for format in formats}:
        return headers[files[0]]
    index = next(folder / format.index for format in formats if (folder / format.index).exists())
    tensors = {}
    for tensor, file in weight_map(index).items():
        if tensor not in headers[file]:
            raise ValueError(f"{folder}: the index says that {tensor} is in {file}, which does not hold it")
        tensors[tensor] = headers[file][tensor]
    return tensors


def _read_safetensors_header(file: Path) -> dict[str, StoredTensor]:
    check_ordinary(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= header_size <= size - 8:
            raise ValueError(f"{file} is not a whole safetensors file: its header does not fit its {size} bytes")
        if header_size > MAX_HEADER_BYTES:
            raise ValueError(f"{file}: its header has {header_size:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
        text = stream.read(header_size)
    header = parse_json(text, f"{file} is not a safetensors file: its header")
    header.pop("__metadata__", None)
    begin = 8 + header_size
    tensors = {name: _stored_tensor(file, name, entry, begin) for name, entry in header.items()}
    end_of_data = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=begin)
    if end_of_data != size:
        raise ValueError(f"{file} is cut short or damaged: it has {size} bytes, its header describes {end_of_data}")
    place = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset != place:
            raise ValueError(
                f"{file} is damaged: the data of {name} begin at byte {tensor.offset - begin}, "
                f"expected {place - begin}, where those before it end"
            )
        place += tensor.num_bytes
        if tensor.dtype_name in DTYPES and tensor.numel * tensor.dtype.itemsize != tensor.num_bytes:
            raise ValueError(f"{file} is damaged: {name} of shape {list(tensor.shape)} has {tensor.num_bytes} bytes")
    return tensors


def _stored_tensor(file: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """One entry of a safetensors header; `data` is the first byte behind the header."""
    fields = entry if isinstance(entry, dict) else {}
    dtype_name, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    numbers = [shape, offsets] if isinstance(shape, list) and isinstance(offsets, list) else [[None]]
    whole = all(type(number) is int and 0 <= number < 1 << 63 for part in numbers for number in part)
    if not (isinstance(dtype_name, str) and whole and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise ValueError(
            f"{file}: its header has {reprlib.repr(entry)} for {name}, expected dtype, shape and data_offsets of it"
        )
    return StoredTensor(file, dtype_name, tuple(shape), data + offsets[0], offsets[1] - offsets[0])


def _read_pickled_header(file: Path) -> dict[str, StoredTensor]:
    """Names and places of the tensors that torch.save wrote: the pickle is read by PyTorch's safe unpickler."""
    _check_pickled_archive(file)
    tensors = {}
    for name, tensor in _load_without_data(file).items():
        if not isinstance(tensor, torch.Tensor) or not isinstance(name, str):
            raise ValueError(f"{file}: {name} is a {type(tensor).__name__}, expected names and tensors")
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            raise ValueError(
                f"{file}: {name} is not stored row after row: save the model again with contiguous tensors, "
                "best as safetensors (load it with Transformers and call save_pretrained)"
            )
        begin = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.dtype.itemsize
        dtype_name = DTYPE_NAMES.get(tensor.dtype, dtype_text(tensor.dtype))
        tensors[name] = StoredTensor(file, dtype_name, tuple(tensor.shape), begin, tensor.nbytes)
    return tensors


def _check_pickled_archive(file: Path) -> None:
    """ValueError unless the data of a `.bin` file lie in it as they are: PyTorch's zip format, whole, uncompressed."""
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"{file} cannot be read in parts: it is cut short, or older than PyTorch 1.6's file format; "
            "save it as safetensors first (load it with Transformers and call save_pretrained)"
        )
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{file} was compressed after PyTorch wrote it ({entry.filename}): unpack it first")
            if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                raise ValueError(f"{file} was written on a big-endian machine, which is not supported")


def _load_without_data(file: Path) -> dict:
    """What torch.save wrote, with tensors that know their place in the file and have no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged or malicious pickle makes the unpickler raise
        unsafe = re.search(r"GLOBAL \S+", str(error))
        if unsafe:
            raise ValueError(
                f"{file} holds more than tensors ({unsafe[0]}) and is refused: loading it could run code"
            ) from None
        raise ValueError(f"{file} cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a mapping of names to tensors")
    return content
