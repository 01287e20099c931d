"""What the first pass of a conversion decides about one channel module, on disk until the second reads it.

Shapes: N experts, O channels, R rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file

from conversion.channels.row_layout import owner_names
from conversion.merging.plan import Plan

THRESHOLD_PREFIX = "thresholds."
LOSSES = ("predicted_loss", "one_row_loss")


def threshold_tensors(thresholds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Trim thresholds by parameter as a file holds them."""
    return {THRESHOLD_PREFIX + name: values for name, values in thresholds.items()}


def loaded_thresholds(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `threshold_tensors` gave."""
    return {
        name.removeprefix(THRESHOLD_PREFIX): values
        for name, values in tensors.items()
        if name.startswith(THRESHOLD_PREFIX)
    }


@dataclass(frozen=True)
class ModuleChoices:
    """What a budget chooses from: the groups of one module for each number of groups, K at most."""

    labels: torch.Tensor  # (K, N, O) int8
    costs: torch.Tensor  # (K, O) float64
    distinct: torch.Tensor  # (N, O) int8: the first expert with the same row
    delta_squares: torch.Tensor  # as in `ModuleGroups`, like the next
    thresholds: dict[str, torch.Tensor]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it as a file holds it."""
        values = {name: getattr(self, name) for name in ("labels", "costs", "distinct", "delta_squares")}
        return values | threshold_tensors(self.thresholds)

    @classmethod
    def load(cls, file: Path) -> "ModuleChoices":
        """Read what `tensors` gave."""
        tensors = load_file(file)
        return cls(
            labels=tensors["labels"],
            costs=tensors["costs"],
            distinct=tensors["distinct"],
            delta_squares=tensors["delta_squares"],
            thresholds=loaded_thresholds(tensors),
        )


@dataclass(frozen=True)
class ModuleGroups:
    """Everything that the first pass decides about one channel module."""

    channel_index: torch.Tensor  # (N, O) int32; -1 where an expert has no such channel
    copied: torch.Tensor  # (R,) bool: all owners store the same row
    num_distinct: int  # rows that differ from each other, over all channels
    has_fallback: bool  # of an embedding: one more row, read for tokens that an expert does not have
    delta_squares: torch.Tensor  # (N,) float64: squared norm of each expert's deltas
    thresholds: dict[str, torch.Tensor]  # parameter -> (N,) float32, where the method trims and rows are merged
    predicted_loss: float | None = None  # cost of the groups in the metric that they were chosen by
    one_row_loss: float | None = None  # the same with one row for each channel

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it as a file holds it."""
        return {
            "channel_index": self.channel_index,
            "copied": self.copied,
            "num_distinct": torch.tensor(self.num_distinct),
            "has_fallback": torch.tensor(self.has_fallback),
            "delta_squares": self.delta_squares,
            **threshold_tensors(self.thresholds),
            **{
                name: torch.tensor(getattr(self, name), dtype=torch.float64)
                for name in LOSSES
                if getattr(self, name) is not None
            },
        }

    @classmethod
    def load(cls, file: Path) -> "ModuleGroups":
        """Read what `tensors` gave."""
        tensors = load_file(file)
        return cls(
            channel_index=tensors["channel_index"],
            copied=tensors["copied"],
            num_distinct=int(tensors["num_distinct"]),
            has_fallback=bool(tensors["has_fallback"]),
            delta_squares=tensors["delta_squares"],
            thresholds=loaded_thresholds(tensors),
            **{name: tensors[name].item() for name in LOSSES if name in tensors},
        )


@dataclass(frozen=True)
class GroupedModule:
    """The numbers of `ModuleGroups`, and the file with the rest."""

    file: Path
    num_rows: int
    num_merged: int  # rows whose owners stored different rows; the others are copied
    num_distinct: int  # rows that differ from each other, over all channels
    delta_squares: torch.Tensor  # (N,) float64: squared norm of each expert's deltas
    rows_by_owners: dict[int, int]  # bit mask of the owners -> rows
    channels_by_rows: dict[int, int]  # number of rows -> channels that have so many
    predicted_loss: float | None  # as in `ModuleGroups`, like the next
    one_row_loss: float | None
    has_fallback: bool  # of an embedding: a last row that is read for tokens that an expert does not have

    def owner_counts(self, names: list[str]) -> dict[str, int]:
        """Rows by the names of their owners."""
        return {"+".join(owner_names(owners, names)): count for owners, count in self.rows_by_owners.items()}

    def load(self) -> "ModuleRows":
        return ModuleRows(ModuleGroups.load(self.file))


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of one matrix that have the same owners and whose channels are in one chunk."""

    members: tuple[int, ...]  # the owners, ascending
    start: int
    channels: torch.Tensor  # (rows,), ascending


class ModuleRows:
    """The rows of one matrix: owners, channels, and whether they are copied or merged."""

    def __init__(self, groups: ModuleGroups):
        self.groups = groups
        self._row_channel = torch.zeros(len(groups.copied), dtype=torch.int64)
        self._row_owners = torch.zeros(len(groups.copied), dtype=torch.int64)
        for expert, index in enumerate(groups.channel_index):
            channels = (index >= 0).nonzero()[:, 0]
            rows = index[channels].long()
            self._row_channel[rows] = channels
            self._row_owners[rows] |= 1 << expert
        self._by_channel = torch.argsort(self._row_channel, stable=True)
        self._sorted_channels = self._row_channel[self._by_channel]

    @property
    def num_rows(self) -> int:
        return len(self.groups.copied) + self.groups.has_fallback

    def channel_index(self, kind: str) -> torch.Tensor:
        """The index of this module, or of a head tied to it, (N, O) int32: an embedding reads its last row for -1."""
        index = self.groups.channel_index
        return torch.where(index < 0, self.num_rows - 1, index) if kind == "embedding" else index

    def summary(self, file: Path) -> GroupedModule:
        owners, counts = self._row_owners.unique_consecutive(return_counts=True)
        rows_each = self._row_channel.bincount().bincount().tolist()
        return GroupedModule(
            file=file,
            num_rows=self.num_rows,
            num_merged=int((~self.groups.copied).sum()),
            num_distinct=self.groups.num_distinct,
            delta_squares=self.groups.delta_squares,
            has_fallback=self.groups.has_fallback,
            rows_by_owners=dict(zip(owners.tolist(), counts.tolist(), strict=True)),
            channels_by_rows={rows: count for rows, count in enumerate(rows_each) if rows and count},
            predicted_loss=self.groups.predicted_loss,
            one_row_loss=self.groups.one_row_loss,
        )

    def merged_owners(self) -> list[tuple[int, ...]]:
        """The owners of rows that are merged: sets of experts, ascending."""
        masks = self._row_owners[~self.groups.copied].unique().tolist()
        return [members_of(mask) for mask in masks]

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        """The rows of channels `start` to `stop`: each block's rows are consecutive, for the channels ascend."""
        first, last = torch.searchsorted(self._sorted_channels, torch.tensor([start, stop])).tolist()
        rows = self._by_channel[first:last].sort().values
        owners = self._row_owners[rows]
        edges = [0, *(owners.diff().nonzero()[:, 0] + 1).tolist(), len(rows)] if len(rows) else []
        for begin, end in pairwise(edges):
            yield RowBlock(members_of(int(owners[begin])), int(rows[begin]), self._row_channel[rows[begin:end]])


def members_of(mask: int) -> tuple[int, ...]:
    """The experts of a bit mask, ascending."""
    return tuple(expert for expert in range(mask.bit_length()) if mask >> expert & 1)


def all_modules(plan: Plan, grouped: dict[str, GroupedModule]) -> dict[str, GroupedModule]:
    """Every channel module's grouping: a tied head has its embedding's."""
    return {path: grouped[module.tied_to or path] for path, module in plan.modules.channel.items()}
