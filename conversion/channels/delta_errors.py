"""How far merged rows are from the experts' own, measured while they are merged.

The relative error of an expert in a module is the norm of (merged rows - its rows) over the norm of (its rows - base
rows), biases being a column of their rows: 0 where its rows are kept, 1 where nothing of what it learned is left.
"""

import math
from collections.abc import Iterable

import torch


class DeltaErrors:
    """Squared norms of (merged row - expert's row), per module, expert and channel.

    One number per channel is kept until a module is finished, so that the sums do not depend on how the channels came
    in chunks. A module is worked on by one thread at a time.
    """

    def __init__(self, num_experts: int):
        self._num_experts = num_experts
        self._squares: dict[str, torch.Tensor] = {}  # modules that are worked on, (N, O)
        self._sums: dict[str, torch.Tensor] = {}  # finished ones, (N,)

    def start(self, path: str, num_channels: int) -> None:
        """Begin with a module, or begin again."""
        self._squares[path] = torch.zeros(self._num_experts, num_channels, dtype=torch.float64)

    def add(
        self, path: str, members: Iterable[int], channels: torch.Tensor, rows: torch.Tensor, merged: torch.Tensor
    ) -> None:
        """Take in one parameter of some channels of a module.

        Args:
            members: the M experts that share the merged rows.
            channels: (C,) int64.
            rows: (M, C, I) the members' own rows.
            merged: (C, I) float32 what they share, before it is rounded to the output dtype.
        """
        difference = torch.empty_like(merged)
        for expert, own in zip(members, rows, strict=True):
            # Widened before it is subtracted: mixed dtypes in one operation are more than twice as slow.
            norms = torch.linalg.vector_norm(difference.copy_(own).sub_(merged), dim=-1)
            self._squares[path][expert].index_add_(0, channels.cpu(), norms.double().square().cpu())

    def finish(self, path: str) -> torch.Tensor:
        """Sum over a module's channels and forget their own numbers: (N,) float64."""
        self._sums[path] = self._squares.pop(path).sum(1)
        return self._sums[path]

    def restore(self, path: str, squares: torch.Tensor) -> None:
        """Take what an earlier run had finished: (N,) float64."""
        self._sums[path] = squares

    def squares(self, path: str) -> torch.Tensor:
        """Sum over a finished module's channels: (N,) float64."""
        return self._sums[path]


def norm(square: float) -> float:
    """Square root with six digits, which do not depend on the order of summation."""
    return float(f"{math.sqrt(square):.6g}")


def relative_error(error_square: float, delta_square: float) -> float | None:
    """One relative error, with six digits; None for an expert that was the base and no longer is."""
    if delta_square == 0:
        return None if error_square else 0.0
    return norm(error_square / delta_square)
