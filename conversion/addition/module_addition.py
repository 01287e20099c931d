"""What the first pass of adding an expert decides about one channel module, for the second and for the records.

Shapes: N experts, K of them that stay, O channels, R rows.
"""

from collections.abc import Iterator

import torch

from conversion.channels.grouping import lowest_members
from conversion.channels.row_layout import RowLayout, layout_present


class ModuleAddition:
    """What one matrix becomes: which rows the experts read, and the layout of all rows.

    Rows count as they are stored before; after those come the new expert's own ones, one per channel.

    Args:
        index: (N, O) the row that each expert reads.
        present: (N, O) channels that each expert has; elsewhere the index means nothing.
        num_stored: rows that are stored before.
        place: the new expert's number.
        fallback: the row that an embedding reads for tokens that an expert does not have; None: there is none.
        needs_fallback: the module is an embedding, and not all experts have all tokens.
        delta_square, error_square: squared norms of (own rows - base rows) and of (rows read - own rows); the first
            is None where the base is not known.
    """

    def __init__(
        self,
        index: torch.Tensor,
        present: torch.Tensor,
        num_stored: int,
        place: int,
        fallback: int | None,
        needs_fallback: bool,
        delta_square: float | None,
        error_square: float,
    ):
        self._index = index.to(torch.int32)  # half as large to keep
        self.present = present
        self.num_stored = num_stored
        self.fallback = fallback
        self.has_fallback = needs_fallback
        self.delta_square, self.error_square = delta_square, error_square
        is_new = index[place] >= num_stored
        self.num_new = int((present[place] & is_new).sum())
        self.num_reused = int((present[place] & ~is_new).sum())
        layout = self.layout()
        self.num_rows = len(layout.row_owners) + needs_fallback
        sets, counts = layout.row_owners.unique(return_counts=True)
        self.rows_by_owners = dict(zip(sets.tolist(), counts.tolist(), strict=True))

    def layout(self) -> RowLayout:
        """All rows in their final order, without an embedding's fallback."""
        return layout_present(lowest_members(self._index), self.present)

    def channel_index(self, layout: RowLayout, is_embedding: bool) -> torch.Tensor:
        """The new index, int32 (N, O); an embedding reads its last row for a token that an expert does not have."""
        index = layout.channel_index
        return torch.where(index < 0, self.num_rows - 1, index) if is_embedding and self.has_fallback else index

    def sources(self, layout: RowLayout) -> torch.LongTensor:
        """Where each row of the layout comes from, (R,): a stored row, or one of the new expert's own after those."""
        sources = torch.empty_like(layout.row_owners)
        for expert, rows in enumerate(self._index.long()):
            owned = (layout.row_owners >> expert & 1).bool()
            sources[owned] = rows[layout.row_channel[owned]]
        return sources


def with_expert(others: torch.Tensor, new: torch.Tensor, place: int) -> torch.Tensor:
    """What K experts have (K, *) with the new one's (*) at its place: (N, *)."""
    return torch.cat([others[:place], new[None], others[place:]])


def chunks_of(count: int, width: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of `count` rows of `width` bytes each."""
    step = max(1, chunk_bytes // width)
    for start in range(0, count, step):
        yield start, min(start + step, count)
