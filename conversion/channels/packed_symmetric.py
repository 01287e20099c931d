"""Symmetric matrices without most of their lower halves: block rows from the diagonal on, one after the other.

    rows 0 to 255, columns 0 on | rows 256 to 511, columns 256 on | ...

Shapes: I rows and columns, P packed values.
"""

import torch

BLOCK_ROWS = 256


def packed_size(size: int) -> int:
    """P of a matrix with I = `size` rows."""
    return sum((stop - start) * (size - start) for start, stop in _blocks(size))


def pack_symmetric(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The packed values of a symmetric matrix (I, I): (P,) of `dtype`, on the CPU."""
    packed = torch.empty(packed_size(len(matrix)), dtype=dtype)
    place = 0
    for start, stop in _blocks(len(matrix)):
        block = matrix[start:stop, start:]
        packed[place : place + block.numel()].view_as(block).copy_(block)
        place += block.numel()
    return packed


def unpack_symmetric(packed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Fill `out` (I, I) from the packed values (P,) of a matrix; its lower half is the upper one's mirror image."""
    place = 0
    for start, stop in _blocks(len(out)):
        block = out[start:stop, start:]
        block.copy_(packed[place : place + block.numel()].view_as(block))
        place += block.numel()
        out[stop:, start:stop] = out[start:stop, stop:].T
    return out


def _blocks(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK_ROWS, size)) for start in range(0, size, BLOCK_ROWS)]
