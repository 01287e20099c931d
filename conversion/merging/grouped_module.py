"""What the first pass of a conversion decides about one channel module, on disk until the second reads it.

Shapes: N experts, O channels, R rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file

from conversion.merging.plan import Plan

THRESHOLD_PREFIX = "thresholds."


@dataclass(frozen=True)
class GroupedModule:
    """What the first pass decides about one channel module: its numbers, and the file with the rest."""

    file: Path
    num_rows: int
    num_merged: int  # rows whose owners stored different rows; the others are copied
    num_distinct: int  # rows that differ from each other, over all channels
    delta_squares: torch.Tensor  # (N,) float64: squared norm of each expert's deltas
    rows_by_owners: dict[int, int]  # bit mask of the owners -> rows
    has_fallback: bool  # of an embedding: a last row that is read for tokens that an expert does not have

    def owner_counts(self, names: list[str]) -> dict[str, int]:
        """Rows by the names of their owners."""
        return {
            "+".join(name for e, name in enumerate(names) if owners >> e & 1): count
            for owners, count in self.rows_by_owners.items()
        }

    def load(self) -> "ModuleRows":
        return ModuleRows(load_file(self.file))


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of one matrix that have the same owners and whose channels are in one chunk."""

    members: tuple[int, ...]  # the owners, ascending
    start: int
    channels: torch.Tensor  # (rows,), ascending


class ModuleRows:
    """The rows of one matrix: owners, channels, and whether they are copied or merged.

    Args:
        tensors: channel_index (N, O) int32, -1 where an expert has no such channel; copied (R,) bool: all owners store
            the same row; num_distinct, a scalar; has_fallback, a scalar bool: there is one more row, which an
            embedding reads for tokens that an expert does not have; delta_squares (N,) float64;
            thresholds.<parameter> (N,) float32 where the method trims.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self._tensors = tensors
        self.copied = tensors["copied"]
        self.has_fallback = bool(tensors["has_fallback"])
        self.thresholds = {
            name.removeprefix(THRESHOLD_PREFIX): value
            for name, value in tensors.items()
            if name.startswith(THRESHOLD_PREFIX)
        }
        self._row_channel = torch.zeros(len(self.copied), dtype=torch.int64)
        self._row_owners = torch.zeros(len(self.copied), dtype=torch.int64)
        for expert, index in enumerate(tensors["channel_index"]):
            channels = (index >= 0).nonzero()[:, 0]
            rows = index[channels].long()
            self._row_channel[rows] = channels
            self._row_owners[rows] |= 1 << expert
        self._by_channel = torch.argsort(self._row_channel, stable=True)
        self._sorted_channels = self._row_channel[self._by_channel]

    @property
    def num_rows(self) -> int:
        return len(self.copied) + self.has_fallback

    def channel_index(self, kind: str) -> torch.Tensor:
        """The index of this module, or of a head tied to it, (N, O) int32: an embedding reads its last row for -1."""
        index = self._tensors["channel_index"]
        return torch.where(index < 0, self.num_rows - 1, index) if kind == "embedding" else index

    def summary(self, file: Path) -> GroupedModule:
        owners, counts = self._row_owners.unique_consecutive(return_counts=True)
        return GroupedModule(
            file=file,
            num_rows=self.num_rows,
            num_merged=int((~self.copied).sum()),
            num_distinct=int(self._tensors["num_distinct"]),
            delta_squares=self._tensors["delta_squares"],
            has_fallback=self.has_fallback,
            rows_by_owners=dict(zip(owners.tolist(), counts.tolist(), strict=True)),
        )

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        """The rows of channels `start` to `stop`: each block's rows are consecutive, for the channels ascend."""
        first, last = torch.searchsorted(self._sorted_channels, torch.tensor([start, stop])).tolist()
        rows = self._by_channel[first:last].sort().values
        owners = self._row_owners[rows]
        edges = [0, *(owners.diff().nonzero()[:, 0] + 1).tolist(), len(rows)] if len(rows) else []
        for begin, end in pairwise(edges):
            mask = int(owners[begin])
            members = tuple(expert for expert in range(mask.bit_length()) if mask >> expert & 1)
            yield RowBlock(members, int(rows[begin]), self._row_channel[rows[begin:end]])


def all_modules(plan: Plan, grouped: dict[str, GroupedModule]) -> dict[str, GroupedModule]:
    """Every channel module's grouping: a tied head has its embedding's."""
    return {path: grouped[module.tied_to or path] for path, module in plan.modules.channel.items()}
