"""The groups of one module merged by what a calibration says that their rows do.

Shapes: N experts, C channels of one chunk, I inputs, M members of a group.
"""

import torch

from conversion.channels.channel_loss import GroupSolver, weighted_mean
from conversion.channels.merge_methods import row_deltas
from conversion.merging.block_reader import Block
from conversion.merging.channel_costs import ChannelCosts
from conversion.merging.grouped_module import ModuleRows
from conversion.merging.memory_budget import FACTOR_BYTES


class RegMean:
    """Merges the groups of one module in passes: an owner set needs a factor of I x I, and few fit into memory.

    Args:
        costs: of the calibration.
        path: the module.
        rows: its rows.
    """

    def __init__(self, costs: ChannelCosts, path: str, rows: ModuleRows):
        self._path = path
        self._weights = costs.weights(path)  # (N, O)
        self._means = self._weights.sum(1) / (self._weights > 0).sum(1).clamp(min=1)
        merged = rows.merged_owners()
        self._covariances = costs.covariances(path) if merged else None
        at_once = max(1, len(merged))
        if self._covariances is not None:
            at_once = max(1, FACTOR_BYTES // (8 * self._covariances[0].numel()))
        self._passes = {members: place // at_once for place, members in enumerate(merged)}
        self._solvers: dict[tuple[int, ...], GroupSolver] = {}
        self.num_passes = 1 + max(self._passes.values(), default=0)

    def begin(self, number: int) -> None:
        """Begin with pass `number`.

        Raises:
            ValueError: the covariances of a group's members cannot be inverted.
        """
        self._now = number
        self._solvers.clear()
        if self._covariances is None:
            return
        for members in self._passes:
            if self.takes(members):
                covariances = [self._covariances[member] for member in members]
                try:
                    self._solvers[members] = GroupSolver(covariances, self._means[list(members)].tolist())
                except ValueError as error:
                    raise ValueError(f"calibration of {self._path}: {error}") from None

    def takes(self, members: tuple[int, ...]) -> bool:
        """Whether the rows of an owner set are due in this pass; those that are all copied are in the first."""
        return self._passes.get(members, 0) == self._now

    def merge(
        self, block: Block, members: tuple[int, ...], channels: torch.Tensor, base: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Merge the members' rows of some channels of a chunk.

        Args:
            channels: (C,) of the chunk.
            base: (C, I), or (C, 1) of a bias.
            rows: (M, C, I), or (M, C, 1).

        Returns:
            (C, I) float32.
        """
        if members in self._solvers and block.base.dim() == 2:
            deltas = row_deltas(base, rows)
            return self._solvers[members].solve(deltas).add_(base).float()
        if block.base.dim() == 1:
            weights = self._means[list(members), None].expand(-1, len(channels))
        else:
            weights = self._weights[list(members)][:, channels.cpu() + block.start]
        return weighted_mean(rows, weights.to(rows.device)).float()
