"""Everything that the benchmark compares, by name; each is made at the bytes that it may store."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from quality.coarse_groups import layer_groups, model_groups, random_groups
from quality.converted import (
    base_alone,
    budget_alone,
    calibrated,
    experts,
    half_the_rows,
    one_merge,
    preset_groups,
    refined,
)
from quality.delta_compression import bitdelta, low_rank_from_base, low_rank_from_mean, tall_masks
from quality.one_model import regmean, weighted_regmean
from quality.problem import Problem, Stored
from quality.rounding import quantized
from quality.shared_basis import shared_basis, shared_basis_by_inputs


@dataclass(frozen=True)
class Contender:
    """`make` takes the problem and, where it has budgets, one of them; None: it cannot be made that small."""

    name: str
    make: Callable[..., Stored | None]
    budgets: bool = False
    bits: tuple[int, ...] = ()  # to which its rows are rounded beside bfloat16

    def variants(self) -> list[str]:
        """Names of its lines in the table."""
        return [self.name, *(f"{self.name}, int{bits}" for bits in self.bits)]

    def stored(self, problem: Problem, budget: float | None) -> dict[str, Stored]:
        """What it stores, under each of its names; nothing where it cannot be made that small."""
        stored = self.make(problem, budget) if self.budgets else self.make(problem)
        if stored is None:
            return {}
        return {self.name: stored} | {
            f"{self.name}, int{bits}": quantized(problem, stored, bits) for bits in self.bits
        }


PAPER = {"density": 0.7, "lambda": 0.5}  # of Channel Merging; "normalize" stays mergekit's
ROUNDED = (8, 4)

CONTENDERS = (
    Contender("base", base_alone),
    Contender("experts", experts, bits=(*ROUNDED, 3, 2)),  # what fewer bits alone would do, down to our sizes
    # One model: Task arithmetic is arXiv 2212.04089, TIES 2306.01708, DARE 2311.03099.
    Contender("average", partial(one_merge, method="linear", parameters={})),
    Contender("task arithmetic", partial(one_merge, method="task_arithmetic", parameters={"lambda": 0.5})),
    Contender("TIES", partial(one_merge, method="ties", parameters={"density": 0.7})),
    Contender("DARE", partial(one_merge, method="dare_linear", parameters=PAPER)),
    Contender("RegMean", regmean),
    Contender("RegMean, weighted", weighted_regmean),
    Contender("random groups", random_groups),
    Contender("layer groups", layer_groups),
    Contender("model groups", model_groups),
    Contender("paper-ties", partial(preset_groups, preset="paper-ties", num_groups=2)),
    Contender("paper-dare", partial(preset_groups, preset="paper-dare", num_groups=2)),
    Contender("paper-ties, half the rows", partial(half_the_rows, preset="paper-ties")),
    Contender("TALL-masks", tall_masks),
    Contender("BitDelta", bitdelta, budgets=True),
    Contender("low rank (SMILE)", low_rank_from_base, budgets=True),
    Contender("low rank (Twin-Merging)", low_rank_from_mean, budgets=True),
    Contender("shared basis", shared_basis, budgets=True),
    Contender("shared basis, by inputs", shared_basis_by_inputs, budgets=True),
    Contender("ours, no texts", budget_alone, budgets=True),
    Contender("ours, calibrated", calibrated, budgets=True, bits=ROUNDED),
    Contender("ours, calibrated, general text", partial(calibrated, general=True), budgets=True),
    Contender("ours, refined", refined, budgets=True, bits=ROUNDED),
    Contender("ours, refined, general text", partial(refined, general=True), budgets=True, bits=ROUNDED),
)
