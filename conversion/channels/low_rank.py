"""Rows of a matrix with an adapter's low-rank product, the same bits whatever chunk and threads they come by.

A matrix product's last bits differ with its number of rows and of threads. Products are computed in blocks of
`BLOCK_ROWS` rows, by one thread; who asks for a chunk that begins with a block gets the matrix's own bits.

Shapes: C rows of a chunk, I inputs, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

BLOCK_ROWS = 16


def add_low_rank(
    rows: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    scaling: float,
    *,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows of an adapted matrix, in blocks of `BLOCK_ROWS`, whatever the caller's number of threads.

    Args:
        rows: (C, I) of the base, any float dtype.
        up: (C, r) float32.
        down: (r, I) float32.
        scaling: of the product.
        magnitude: (C,) float32, the norms of DoRA's rows.

    Returns:
        (C, I) in the dtype of `rows`, rounded once.
    """
    adapted = torch.empty_like(rows)
    with one_thread():
        for start in range(0, len(rows), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            merged = rows[block].float() + torch.mm(up[block], down).mul_(scaling)
            if magnitude is not None:
                merged = merged * (magnitude[block] / torch.linalg.vector_norm(merged, dim=1))[:, None]
            adapted[block] = merged
    return adapted


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensor operations of the calling thread are not split; nothing to do in a conversion's own threads."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
