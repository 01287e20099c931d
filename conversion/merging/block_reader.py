"""Rows of all checkpoints in chunks, and what stands where an expert has no row.

Shapes: N experts, C channels of one chunk, I inputs.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from conversion.checkpoints.architecture import channel_parameters
from conversion.merging.memory_budget import CALIBRATED_CHANNELS, row_bytes
from conversion.merging.plan import Plan
from conversion.merging.workers import Stopped


@dataclass(frozen=True)
class Block:
    """One parameter of a channel module in the rows of one chunk, as it is stored: (C, I), or (C,) of a bias."""

    name: str  # the parameter's, in the base architecture
    start: int
    stop: int
    base: torch.Tensor
    experts: list[torch.Tensor]  # where an expert has no such channel (token), another one's row
    present: torch.Tensor | None = None  # (N, C) bool: which experts have which channels; None: all have all

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.base, *self.experts))

    def deltas(self) -> torch.Tensor:
        """Differences from the base in float32: (N, C, I); a bias is a matrix of one input."""
        deltas = torch.empty(len(self.experts), *self.base.shape, device=self.base.device)
        for delta, rows in zip(deltas, self.experts, strict=True):
            delta.copy_(rows)
        return deltas.sub_(self.base.float()).view(*deltas.shape[:2], -1)

    def rows(self, dtype: torch.dtype) -> torch.Tensor:
        """The experts' rows as a merged checkpoint stores them: (N, C, I), or (N, C) of a bias."""
        return torch.stack([rows.to(dtype) for rows in self.experts])


class BlockReader:
    """Reads the parameters of a module from all checkpoints, chunk by chunk.

    Args:
        plan: the checked conversion.
        chunk_bytes: of float32 rows in one chunk; a row is never split. With a calibration all chunks have the same
            number of channels: the rounding of matrix products depends on their shapes.
        device: where the blocks go.
    """

    def __init__(self, plan: Plan, chunk_bytes: int, device: torch.device):
        self.device = device
        self._plan = plan
        self.max_bytes = chunk_bytes
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let every thread that reads blocks end at its next chunk."""
        self._stopped.set()

    def chunks(self, path: str) -> list[tuple[int, int]]:
        """Row ranges of a module."""
        channels = self._plan.modules.channel[path].out_features
        count = CALIBRATED_CHANNELS
        if self._plan.recipe.calibration is None:
            count = max(1, self.max_bytes // row_bytes(self._plan, path))
        return [(start, min(start + count, channels)) for start in range(0, channels, count)]

    def module_bytes(self, path: str) -> int:
        """What all blocks of a module read together."""
        readers = (self._plan.base_reader, *self._plan.readers)
        names = channel_parameters(self._plan.modules, path)
        return sum(reader.tensors[name].num_bytes for reader in readers for name in names)

    def blocks(self, path: str) -> Iterator[list[Block]]:
        """For every chunk of a module its parameters' blocks: the weight, and the bias if it has one."""
        names = channel_parameters(self._plan.modules, path)
        for start, stop in self.chunks(path):
            if self._stopped.is_set():
                raise Stopped
            yield [self._read(name, start, stop) for name in names]

    def _read(self, name: str, start: int, stop: int) -> Block:
        base, *experts = (
            reader.read_rows(name, start, stop).to(self.device)
            for reader in (self._plan.base_reader, *self._plan.readers)
        )
        present = self._plan.present(name.rpartition(".")[0])
        if present is not None:
            present = present[:, start:stop].to(self.device)
            fill_missing_rows(experts, base, present)
        return Block(name, start, stop, base, experts, present)


def gather_rows(experts: list[torch.Tensor], channels: torch.Tensor) -> torch.Tensor:
    """Some rows of each of M tensors (C, *): (M, channels, *) in their dtype, in float32 where they have several."""
    dtypes = {rows.dtype for rows in experts}
    gathered = torch.empty(
        len(experts),
        len(channels),
        *experts[0].shape[1:],
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        device=channels.device,
    )
    for out, rows in zip(gathered, experts, strict=True):
        if rows.dtype == out.dtype:
            torch.index_select(rows, 0, channels, out=out)
        else:
            out.copy_(rows[channels])
    return gathered


def fill_missing_rows(experts: list[torch.Tensor], base: torch.Tensor, present: torch.Tensor) -> None:
    """Give experts that lack a channel, in place, the row of the first that has it, or the base's if none has.

    As a copy it makes no difference to the channel's number of distinct rows, and with weight 0 none to its groups.

    Args:
        experts: N tensors (C, *).
        base: (C, *).
        present: (N, C) bool.
    """
    first = present.int().argmax(0)
    nobody = ~present.any(0)
    for rows, has in zip(experts, present, strict=True):
        for source, other in enumerate(experts):
            wanted = ~has & (first == source) & ~nobody
            if wanted.any():
                rows[wanted] = other[wanted].to(rows.dtype)
        if nobody.any():
            rows[nobody] = base[nobody].to(rows.dtype)
