"""Sums of x^T x without most of their lower halves: block rows from the diagonal on, one after the other.

    rows 0 to 255, columns 0 on | rows 256 to 511, columns 256 on | ...

Shapes: T tokens, I inputs, P packed values of an (I, I) matrix.
"""

import torch

BLOCK_ROWS = 256


def packed_size(size: int) -> int:
    """P of a matrix with I = `size` rows."""
    return sum((stop - start) * (size - start) for start, stop in _blocks(size))


class SquareSum:
    """Sum over tokens of x x^T, x (I,): products of one call in float32, their sum in float64.

    Args:
        size: I.
        device: where it is summed.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        self._blocks = [
            (start, stop, torch.zeros(stop - start, size - start, dtype=torch.float64, device=device))
            for start, stop in _blocks(size)
        ]

    def add(self, inputs: torch.Tensor) -> None:
        """Add the tokens `inputs` (T, I), of any float dtype."""
        inputs = inputs.float()
        for start, stop, block in self._blocks:
            block += inputs[:, start:stop].T @ inputs[:, start:]

    def packed_mean(self, count: int) -> torch.Tensor:
        """The sum divided by `count`: (P,) float32 on the CPU."""
        packed = torch.empty(sum(block.numel() for _, _, block in self._blocks))
        place = 0
        for _, _, block in self._blocks:
            packed[place : place + block.numel()].view_as(block).copy_(block / count)
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
