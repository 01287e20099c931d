"""The first pass of adding an expert: which stored rows it reads, and how all rows are laid out anew.

Nothing is merged: rows are compared here, and copied by the second pass.

Shapes: N experts, K of them that stay, O channels, I inputs, R rows, C channels of one chunk, V tokens.
"""

import math

import torch
from tqdm import tqdm

from conversion.addition.module_addition import ModuleAddition, chunks_of, with_expert
from conversion.addition.plan import Addition
from conversion.channels.grouping import BIT_VIEWS
from conversion.checkpoints.architecture import channel_parameters
from conversion.checkpoints.merged_checkpoint import MergedCheckpoint, stored_name
from conversion.checkpoints.stored_expert import read_rows_at
from conversion.io.row_reader import check_tensor_finite, check_tied_head


def match_modules(addition: Addition, chunk_bytes: int, bar: tqdm) -> dict[str, ModuleAddition]:
    """What becomes of every channel module that stores rows of its own, by path."""
    modules = {}
    for path, module in addition.merged.modules.channel.items():
        if module.tied_to is None:
            modules[path] = match_module(addition, path, chunk_bytes, bar)
        else:
            chunks = list(chunks_of(module.out_features, 8 * module.in_features, chunk_bytes))
            check_tied_head(addition.reader, f"{path}.weight", f"{module.tied_to}.weight", chunks)
    return modules


def match_module(addition: Addition, path: str, chunk_bytes: int, bar: tqdm) -> ModuleAddition:
    """Find for every channel of a module the stored row that the new expert can read instead of its own."""
    merged, module = addition.merged, addition.merged.modules.channel[path]
    index = merged.channel_index(path)
    fallback = fallback_row(merged, path, index)
    has = index >= 0 if fallback is None else (index >= 0) & (index != fallback)
    index, has = index[list(addition.kept)].long(), has[list(addition.kept)]
    is_tokens = addition.is_vocabulary(path)
    present = addition.present if is_tokens else torch.ones(module.out_features, dtype=torch.bool)
    num_stored = merged.num_rows(path)
    new_index = num_stored + torch.arange(module.out_features)  # its own rows, until one that is stored is found
    delta_square, error_square = 0.0, 0.0
    names = channel_parameters(merged.modules, path)
    matcher = RowMatcher(addition, path)
    width = 4 * (module.in_features + module.bias) * (addition.num_experts + 3)
    for start, stop in chunks_of(module.out_features, width, chunk_bytes):
        new = [addition.reader.read_rows(name, start, stop) for name in names]
        for name, rows in zip(names, new, strict=True):
            check_tensor_finite(addition.name, name, rows, addition.stored_dtype(path))
        chunk = slice(start, stop)
        found, found_row, deltas, errors = matcher.match(new, index[:, chunk], has[:, chunk], present[chunk], start)
        new_index[chunk][found] = found_row[found]
        delta_square, error_square = delta_square + deltas, error_square + errors
        bar.update(sum(rows.nbytes for rows in new))
    all_present = with_expert(has, present, addition.place)
    return ModuleAddition(
        index=with_expert(index, new_index, addition.place),
        present=all_present,
        num_stored=num_stored,
        place=addition.place,
        fallback=fallback,
        needs_fallback=module.kind == "embedding" and not bool(all_present.all()),
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
        self._names = channel_parameters(addition.merged.modules, path)
        self._stored = [stored_name(path, name) for name in self._names]
        self._dtype = addition.stored_dtype(path)

    def match(
        self, new: list[torch.Tensor], index: torch.Tensor, has: torch.Tensor, present: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor, float, float]:
        """One chunk of channels.

        Args:
            new: the expert's own weight rows (C, I), and its bias (C,) where there is one, as its checkpoint has them.
            index: (K, C) rows that the other experts read.
            has: (K, C) channels that they have.
            present: (C,) channels that the expert has.
            start: the first channel.

        Returns:
            (C,) whether a stored row can be used; (C,) that row; the squared norms of the expert's deltas from the
            base, and of its errors.
        """
        own = [rows.to(self._dtype) for rows in new]
        found, found_row = torch.zeros_like(present), torch.zeros(len(present), dtype=torch.int64)
        tolerance, base_reader = self._addition.tolerance, self._addition.base_reader
        deltas = None
        if base_reader is not None:
            base = [base_reader.read_rows(name, start, start + len(present)) for name in self._names]
            deltas = square_distance(new, base)
        nearest = torch.full((len(present),), math.inf, dtype=torch.float64)
        nearest_row = torch.zeros_like(found_row)
        shared = has & present
        needed = index[shared].unique()
        stored = [read_rows_at(self._addition.merged.reader, name, needed) for name in self._stored]
        for expert in range(len(index) if len(needed) else 0):
            row = index[expert]
            # Each row once: by its first reader.
            first = shared[expert] & ~(shared[:expert] & (index[:expert] == row)).any(0)
            place = torch.searchsorted(needed, row.clamp(min=int(needed[0]), max=int(needed[-1])))
            theirs = [rows[place] for rows in stored]
            same = first & ~found & same_bits(own, theirs)
            found, found_row = found | same, torch.where(same, row, found_row)
            if tolerance > 0:
                distance = square_distance(new, theirs)
                nearer = first & (distance < nearest)
                nearest = torch.where(nearer, distance, nearest)
                nearest_row = torch.where(nearer, row, nearest_row)
        error = 0.0
        if tolerance > 0:
            near = ~found & (nearest <= tolerance**2 * deltas)
            found, found_row = found | near, torch.where(near, nearest_row, found_row)
            error = float(nearest[near].sum())
        return found, found_row, 0.0 if deltas is None else float(deltas[present].sum()), error


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
