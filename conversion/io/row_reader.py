"""Rows of one checkpoint's tensors, read when they are asked for: memory is bounded by the chunk.

Rows of a parameter are read by the parameter's name in the base architecture, whatever the checkpoint calls it.
`RowReader` is all that those who read need to know; `CheckpointReader` reads the files of a checkpoint. Others read a
checkpoint through such a reader: by the merged vocabulary's channels (`VocabularyReader`), with an adapter
(`LoraReader`), one expert of a merged one (`StoredExpertReader`).
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from conversion.io.open_files import OpenFiles
from conversion.io.weight_files import StoredTensor


class RowReader(Protocol):
    """Rows of one checkpoint's parameters, by their names in the base architecture. Several threads may read."""

    @property
    def name(self) -> str:
        """What errors call this checkpoint."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Parameter name -> shape, dtype and size as it is read."""

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter in the base architecture's layout; its dtype in `tensors`."""

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a parameter: (stop - start, I), or (stop - start,) of a vector; the same dtype."""

    def close(self) -> None:
        """Close the files that reading has opened."""


class BaseReader(RowReader, Protocol):
    """What an adapter can be laid over."""

    @property
    def transposed(self) -> frozenset[str]:
        """Parameters that are stored as (I, O) and read as (O, I) rows."""

    def with_tensors(self, tensors: Mapping[str, StoredTensor]) -> "BaseReader":
        """A reader of the same checkpoint that has these parameters."""


class CheckpointReader:
    """Rows of one checkpoint's parameters, by their names in the base architecture.

    Several threads may read.

    Args:
        name: what errors call this checkpoint.
        tensors: parameter name -> stored tensor.
        transposed: parameters that are stored as (I, O) and read as (O, I) rows.
    """

    def __init__(self, name: str, tensors: Mapping[str, StoredTensor], transposed: Iterable[str] = ()):
        self.name = name
        self.tensors = dict(tensors)
        self.transposed = frozenset(transposed)
        self._files = OpenFiles()

    def with_tensors(self, tensors: Mapping[str, StoredTensor]) -> "CheckpointReader":
        """A reader of its own with the same checkpoint's name and layout."""
        return CheckpointReader(self.name, tensors, self.transposed)

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
        self._files.close()

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
        view, place = memoryview(buffer.numpy()), tensor.offset + offset
        file = self._files.get(tensor.file)
        while len(view):
            count = file.read_into(view, place)
            if not count:
                raise ValueError(f"{self.name}: {tensor.file} ended {len(view)} bytes early while it was read")
            view, place = view[count:], place + count


def check_tied_head(reader: RowReader, head: str, embedding: str, chunks: list[tuple[int, int]]) -> None:
    """A checkpoint of a tied architecture may hold its head too, if that is the embedding."""
    if head not in reader.tensors:
        return
    for start, stop in chunks:
        if not torch.equal(reader.read_rows(head, start, stop), reader.read_rows(embedding, start, stop)):
            raise ValueError(
                f"{reader.name}: {head} differs from {embedding} between rows {start} and {stop}, "
                "but the config ties them (tie_word_embeddings)"
            )


def check_tensor_finite(owner: str, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """ValueError if a tensor holds NaN or infinity as it is stored, or will in the output dtype."""
    if not tensor.isfinite().all():
        raise ValueError(f"{owner}: {name} holds NaN or infinity")
    if not tensor.to(dtype).isfinite().all():
        raise ValueError(f"{owner}: {name} holds {float(tensor.abs().max()):g}, which {dtype} cannot hold")
