"""One expert of a channel-merged checkpoint read as if it were a checkpoint of its own.

Shapes: N experts, O channels, I inputs, R rows.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch

from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.io.row_reader import RowReader
from conversion.io.weight_files import StoredTensor

READ_THROUGH = 4  # rows that nobody asked for and that are read rather than skipped
HASHED_CHANNELS = 16  # of each parameter


def read_rows_at(reader: RowReader, name: str, rows: torch.LongTensor) -> torch.Tensor:
    """Some rows of a stored tensor, in the order asked for: (len(rows), I), or (len(rows),) of a vector.

    Rows close to each other are read at once, so that memory is at most a few times the result.
    """
    wanted, place = rows.unique(return_inverse=True)
    breaks = (wanted.diff() > READ_THROUGH).nonzero()[:, 0] + 1
    parts = []
    for run in wanted.tensor_split(breaks):
        if len(run):
            first = int(run[0])
            parts.append(reader.read_rows(name, first, int(run[-1]) + 1)[run - first])
    if not parts:
        return reader.read_rows(name, 0, 0)
    return torch.cat(parts)[place]


class StoredExpertReader:
    """Rows of one expert's parameters in channel order; a `BaseReader` to those who read.

    Channels are those of the merged model, all matrices (O, I), also where the base stores them transposed. A token
    that the expert does not have reads as zeros.

    Args:
        merged: the checkpoint; it stays the caller's to close.
        name: the expert's.
    """

    transposed: frozenset[str] = frozenset()

    def __init__(self, merged: MergedCheckpoint, name: str):
        self.name = name
        self._merged = merged
        self._expert = merged.config.expert_id(name)
        self._stored: dict[str, str] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for path, module in merged.modules.channel.items():
            if module.tied_to is None:
                self._add(f"{path}.weight", f"model.{path}.rows.weight", (module.out_features, module.in_features))
            if module.bias:
                self._add(f"{path}.bias", f"model.{path}.rows.bias", (module.out_features,))
        for path, parameters in merged.modules.per_expert.items():
            for parameter in parameters:
                stored = f"model.{path}.experts.{self._expert}.{parameter}"
                self._add(f"{path}.{parameter}", stored, merged.tensors[stored].shape)

    def with_tensors(self, tensors: Mapping[str, StoredTensor]) -> "StoredExpertReader":
        """A reader of the same parameters: a merged checkpoint stores none beside them."""
        assert tensors.keys() == self.tensors.keys()
        return self

    def read(self, name: str) -> torch.Tensor:
        return self.read_rows(name, 0, self.tensors[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of channels `start` to `stop`: (stop - start, I), or (stop - start,) of a vector; stored dtype."""
        return self.read_channels(name, torch.arange(start, stop))

    def read_channels(self, name: str, channels: torch.LongTensor) -> torch.Tensor:
        """Rows of some channels: (len(channels), I), or (len(channels),) of a vector; stored dtype."""
        stored, path = self._stored[name], name.rpartition(".")[0]
        if path not in self._merged.modules.channel:
            return read_rows_at(self._merged.reader, stored, channels)
        index = self._merged.channel_index(path)[self._expert, channels].long()
        rows = read_rows_at(self._merged.reader, stored, index.clamp(min=0))
        rows[index < 0] = 0
        return rows

    def hash(self) -> str:
        """SHA-256 of the expert: names, dtypes and shapes of its parameters, and 16 channels of each, evenly spread.

        The same wherever the checkpoint lies, whatever its router learned, and whatever became of its other experts.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype_name} {list(tensor.shape)}\n".encode())
            channels = torch.linspace(0, tensor.shape[0] - 1, HASHED_CHANNELS, dtype=torch.float64).long().unique()
            digest.update(self.read_channels(name, channels).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Nothing is open but the checkpoint's own reader."""

    def _add(self, name: str, stored: str, shape: tuple[int, ...]) -> None:
        tensor = self._merged.tensors[stored]
        self._stored[name] = stored
        num_bytes = tensor.dtype.itemsize * torch.Size(shape).numel()
        self.tensors[name] = replace(tensor, shape=tuple(shape), num_bytes=num_bytes)
