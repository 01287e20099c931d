"""What groups of one module cost, and how they are merged, by what a calibration says that their rows do.

Shapes: N experts, C channels of one chunk, I inputs, M members of a group.
"""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from conversion.channels.channel_loss import GroupSolver, Use, times_inputs
from conversion.channels.grouping import MAX_ENUMERATED
from conversion.channels.merge_methods import row_deltas
from conversion.merging.block_reader import Block, BlockReader
from conversion.merging.channel_costs import ChannelCosts
from conversion.merging.grouped_module import ModuleRows, members_of
from conversion.merging.memory_budget import FACTOR_BYTES
from conversion.merging.plan import Plan


class RegMean:
    """Merges the groups of one module in passes: an owner set needs a factor of I x I, and few fit into memory.

    Args:
        costs: of the calibration.
        path: the module.
        rows: its rows.
    """

    def __init__(self, costs: ChannelCosts, path: str, rows: ModuleRows):
        self._path = path
        merged = rows.merged_owners()
        self._uses = costs.uses(path) if merged else []
        at_once = solvers_at_once(self._uses)
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
        for members in self._passes:
            if self.takes(members):
                self._solvers[members] = make_solver(self._path, self._uses, members)

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
        solver, deltas = self._solvers[members], row_deltas(base, rows)
        if block.base.dim() == 1:
            return solver.bias(deltas).add_(base).float()
        products = times_inputs(self._uses, deltas, members)
        merged = solver.solve(deltas, products, channels.cpu() + block.start)
        return merged.add_(base).float()


def solvers_at_once(uses: Sequence[Use]) -> int:
    """How many groups of one module are solved in one pass."""
    squares = [use.covariances[0].numel() for use in uses if use.covariances is not None]
    return max(1, FACTOR_BYTES // (8 * max(squares))) if squares else 1 << MAX_ENUMERATED


def make_solver(path: str, uses: Sequence[Use], members: Sequence[int]) -> GroupSolver:
    """The solver of one group of one module; ValueError where its covariances cannot be inverted."""
    try:
        return GroupSolver(uses, members)
    except ValueError as error:
        raise ValueError(f"calibration of {path}: {error}") from None


def group_costs(plan: Plan, costs: ChannelCosts, blocks: BlockReader, path: str, bar: tqdm) -> torch.Tensor:
    """What every group of experts costs in every channel of a module: (2^N, O) float64, by the group's bit mask.

    It reads the module once for as many groups as are solved at once. A group of whom some have no such channel costs
    what the others do.
    """
    uses, present = costs.uses(path), plan.present(path)
    groups = [mask for mask in range(1 << plan.num_experts) if mask.bit_count() > 1]
    total = torch.zeros(1 << plan.num_experts, plan.modules.channel[path].out_features, dtype=torch.float64)
    at_once = solvers_at_once(uses)
    for first in range(0, len(groups), at_once):
        now = groups[first : first + at_once]
        solvers = {mask: make_solver(path, uses, members_of(mask)) for mask in now}
        for parameters in blocks.blocks(path):
            deltas = [block.deltas() for block in parameters]
            products = times_inputs(uses, deltas[0], range(plan.num_experts))
            here = torch.arange(parameters[0].start, parameters[0].stop)
            for mask, solver in solvers.items():
                members = list(members_of(mask))
                own, own_products = [delta[members] for delta in deltas], [product[members] for product in products]
                total[mask, here] = solver.costs(own, own_products, here).cpu()
            bar.update(sum(block.num_bytes for block in parameters) * len(now) / len(groups))
    if present is not None:
        bits = (present * (1 << torch.arange(plan.num_experts))[:, None]).sum(0)  # (O,)
        total = total.gather(0, torch.arange(len(total))[:, None] & bits)
    return total
