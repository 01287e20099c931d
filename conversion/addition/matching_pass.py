"""The first pass of adding an expert: which stored rows it reads, and how all rows are laid out anew.

Nothing is merged: rows are compared here, and copied by the second pass.

Shapes: N experts, K of them that stay, O channels, I inputs, R rows, C channels of one chunk, V tokens.
"""

import math
from collections.abc import Iterator

import torch
from tqdm import tqdm

from conversion.addition.plan import Addition
from conversion.channels.grouping import BIT_VIEWS
from conversion.channels.row_layout import RowLayout, layout_present
from conversion.checkpoints.merged_checkpoint import MergedCheckpoint, stored_name
from conversion.checkpoints.stored_expert import read_rows_at
from conversion.io.row_reader import check_tensor_finite


class ModuleAddition:
    """What one matrix becomes: which stored rows the new expert reads, and the layout of all rows.

    Args:
        index: (K, O) rows that the K experts that stay read before; -1 where they have no such channel.
        fallback: the row that an embedding reads for tokens that an expert does not have; None: there is none.
        reused: (O,) stored row that the new expert reads, -1: it stores its own.
        present: (O,) channels that the new expert has.
        place: the new expert's number.
        needs_fallback: the module is an embedding, and not all experts have all tokens.
        delta_square, error_square: squared norms of (own rows - base rows) and of (rows read - own rows); the first
            is None where the base is not known.
    """

    def __init__(
        self,
        index: torch.Tensor,
        fallback: int | None,
        reused: torch.Tensor,
        present: torch.Tensor,
        place: int,
        needs_fallback: bool,
        delta_square: float | None,
        error_square: float,
    ):
        self.fallback = fallback
        self.has_fallback = needs_fallback
        self.delta_square, self.error_square = delta_square, error_square
        self.num_new = int((present & (reused < 0)).sum())
        self.num_reused = int((present & (reused >= 0)).sum())
        self._index, self._reused = index.to(torch.int32), reused.to(torch.int32)  # half as large to keep
        self._present, self._place = present, place
        layout = self.layout()
        self.num_rows = len(layout.row_owners) + needs_fallback
        sets, counts = layout.row_owners.unique(return_counts=True)
        self.rows_by_owners = dict(zip(sets.tolist(), counts.tolist(), strict=True))

    def rows_read(self) -> torch.Tensor:
        """Rows before that all experts read, (N, O): -1 where there is no such channel, -2 for the new one's own."""
        new = torch.where(self._present, torch.where(self._reused < 0, -2, self._reused), -1)
        return torch.cat([self._index[: self._place], new[None], self._index[self._place :]])

    def layout(self) -> RowLayout:
        """All rows in their final order, without an embedding's fallback."""
        rows = self.rows_read()
        labels = torch.empty_like(rows)
        for expert in range(len(rows) - 1, -1, -1):  # the lowest reader of a row names it
            labels = torch.where(rows == rows[expert], expert, labels)
        return layout_present(labels, rows != -1)

    def channel_index(self, layout: RowLayout, is_embedding: bool) -> torch.Tensor:
        """The new index, int32 (N, O); an embedding reads its last row for a token that an expert does not have."""
        index = layout.channel_index
        return torch.where(index < 0, self.num_rows - 1, index) if is_embedding and self.has_fallback else index

    def sources(self, layout: RowLayout) -> torch.LongTensor:
        """The row that each row of the layout was before, (R,); -2 for the new expert's own."""
        rows, owners = self.rows_read().long(), layout.row_owners
        sources = torch.full_like(owners, -1)
        for expert, read in enumerate(rows):
            owned = (owners >> expert & 1).bool() & (sources == -1)
            sources[owned] = read[layout.row_channel[owned]]
        return sources


def match_module(addition: Addition, path: str, chunk_bytes: int, bar: tqdm) -> ModuleAddition:
    """Find for every channel of a module the stored row that the new expert can read instead of its own."""
    merged, module = addition.merged, addition.merged.modules.channel[path]
    index = merged.channel_index(path)
    fallback = fallback_row(merged, path, index)
    if fallback is not None:
        index = index.masked_fill(index == fallback, -1)
    index = index[list(addition.kept)].long()
    is_tokens = addition.is_vocabulary(path)
    present = addition.present if is_tokens else torch.ones(module.out_features, dtype=torch.bool)
    reused = torch.full((module.out_features,), -1)
    delta_square, error_square = 0.0, 0.0
    names = addition.parameters_of(path)
    matcher = RowMatcher(addition, path)
    width = 4 * (module.in_features + module.bias) * (addition.num_experts + 3)
    for start, stop in chunks_of(module.out_features, width, chunk_bytes):
        new = [addition.reader.read_rows(name, start, stop) for name in names]
        for name, rows in zip(names, new, strict=True):
            check_tensor_finite(addition.name, name, rows, addition.stored_dtype(path))
        has = present[start:stop]
        reused[start:stop], deltas, errors = matcher.match(new, index[:, start:stop], has, start)
        delta_square, error_square = delta_square + deltas, error_square + errors
        bar.update(sum(rows.nbytes for rows in new))
    lacks = bool((index < 0).any()) or not bool(present.all())
    return ModuleAddition(
        index=index,
        fallback=fallback,
        reused=reused,
        present=present,
        place=addition.place,
        needs_fallback=module.kind == "embedding" and lacks,
        delta_square=None if addition.base_reader is None else delta_square,
        error_square=error_square,
    )


def fallback_row(merged: MergedCheckpoint, path: str, index: torch.Tensor) -> int | None:
    """The row of an embedding that stands for tokens that an expert does not have: its last, if no token owns it."""
    if merged.modules.channel[path].kind != "embedding":
        return None
    has = torch.stack([merged.has_token(expert) for expert in range(merged.config.num_experts)])
    last = merged.num_rows(path) - 1
    return last if (index[~has] == last).any() and not (index[has] == last).any() else None


class RowMatcher:
    """Compares the new expert's rows of one module with the stored rows of the same channels."""

    def __init__(self, addition: Addition, path: str):
        self._addition = addition
        self._names = addition.parameters_of(path)
        self._stored = [stored_name(path, name) for name in self._names]
        self._dtype = addition.stored_dtype(path)

    def match(
        self, new: list[torch.Tensor], index: torch.Tensor, present: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, float, float]:
        """One chunk of channels.

        Args:
            new: the expert's own weight rows (C, I), and its bias (C,) where there is one, as its checkpoint has them.
            index: (K, C) rows that the other experts read.
            present: (C,) channels that the expert has.
            start: the first channel.

        Returns:
            (C,) the row to reuse, or -1; the squared norms of the expert's deltas from the base, and of its errors.
        """
        own = [rows.to(self._dtype) for rows in new]
        reused = torch.full((len(present),), -1)
        tolerance, base_reader = self._addition.tolerance, self._addition.base_reader
        deltas = None
        if base_reader is not None:
            base = [base_reader.read_rows(name, start, start + len(present)) for name in self._names]
            deltas = square_distance(new, base)
        nearest = torch.full((len(present),), math.inf, dtype=torch.float64)
        nearest_row = torch.full_like(reused, -1)
        needed = index[(index >= 0) & present].unique()
        stored = [read_rows_at(self._addition.merged.reader, name, needed) for name in self._stored]
        for expert in range(len(index) if len(needed) else 0):
            row = index[expert]
            # Each row once: by its first reader.
            first = (row >= 0) & present & ~(index[:expert] == row).any(0)
            place = torch.searchsorted(needed, row.clamp(min=int(needed[0]), max=int(needed[-1])))
            theirs = [rows[place] for rows in stored]
            reused = torch.where(first & (reused < 0) & same_bits(own, theirs), row, reused)
            if tolerance > 0:
                distance = square_distance(new, theirs)
                nearer = first & (distance < nearest)
                nearest = torch.where(nearer, distance, nearest)
                nearest_row = torch.where(nearer, row, nearest_row)
        error = 0.0
        if tolerance > 0:
            near = (reused < 0) & (nearest <= tolerance**2 * deltas)
            reused = torch.where(near, nearest_row, reused)
            error = float(nearest[near].sum())
        return reused, 0.0 if deltas is None else float(deltas[present].sum()), error


def same_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
    """Whether rows (C, I), and their biases (C,), are the same bit for bit: (C,) bool."""
    same = torch.ones(len(left[0]), dtype=torch.bool)
    for ours, theirs in zip(left, right, strict=True):
        view = BIT_VIEWS[ours.element_size()]
        same &= (ours.contiguous().view(view) == theirs.contiguous().view(view)).view(len(same), -1).all(1)
    return same


def square_distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
    """Squared distance of rows (C, I), a bias (C,) being one more column of them: (C,) float64."""
    total = torch.zeros(len(left[0]), dtype=torch.float64)
    for ours, theirs in zip(left, right, strict=True):
        difference = ours.float().view(len(total), -1).sub(theirs.float().view(len(total), -1))
        total += torch.linalg.vector_norm(difference, dim=1).double().square()
    return total


def chunks_of(count: int, width: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of `count` rows of `width` bytes each."""
    step = max(1, chunk_bytes // width)
    for start in range(0, count, step):
        yield start, min(start + step, count)
