"""The rows of one group to one row: linear, task_arithmetic, ties, dare_linear and dare_ties as mergekit defines them.

    linear           sum_m w_m row_m; the base plays no part
    task_arithmetic  base + lambda * sum_m w_m delta_m
    ties             the same on deltas trimmed to the largest `density` of their tensor, and only over the members
                     whose sign is that of the weighted sum
    dare_linear      task_arithmetic on a random `density` of each delta, rescaled by 1 / density
    dare_ties        ties on these instead of trimmed deltas

With `normalize` a sum is divided by the sum of the w_m that take part in it.

Arithmetic is float32 in mergekit's order of operations, so that one group of up to four experts gives mergekit's bits;
beyond four, torch.sum (which it uses) adds in an order that depends on the place in the tensor, and this does not.
`regmean` is merged by what was measured of the rows' inputs, in `channel_loss`.
The trim threshold and the random mask are exact for a whole tensor that is only ever seen in chunks.

Shapes: M members of the group, C channels, I inputs.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

MERGE_METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "regmean")
ELECTING_METHODS = ("ties", "dare_ties")
MASKED_METHODS = ("dare_linear", "dare_ties")
SPARSE_METHODS = ("ties", "dare_linear", "dare_ties")

# Elements of one working block: some ten of them fit the cache, and a call costs little against them.
BLOCK_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class MergeMethod:
    """A merge method with its parameters, under mergekit's names (`lambda_` is its `lambda`)."""

    name: str
    density: float = 1.0
    lambda_: float = 1.0
    normalize: bool = True

    def __post_init__(self):
        if self.name not in MERGE_METHODS:
            raise ValueError(f"merge method is {self.name!r}, expected one of {', '.join(MERGE_METHODS)}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}, expected more than 0 and at most 1")
        if not math.isfinite(self.lambda_):
            raise ValueError(f"lambda is {self.lambda_}, expected a finite number")
        if self.density != 1 and self.name not in SPARSE_METHODS:
            raise ValueError(f"density is {self.density}, but {self.name} keeps all of a delta")
        if self.lambda_ != 1 and self.name == "linear":
            raise ValueError(f"lambda is {self.lambda_}, but linear merges rows and not deltas")

    @property
    def needs_threshold(self) -> bool:
        """Whether `merge_rows` takes the trim thresholds of the members' tensors."""
        return self.name == "ties" and self.density < 1

    @property
    def needs_mask(self) -> bool:
        """Whether `merge_rows` takes the members' random masks."""
        return self.name in MASKED_METHODS and self.density < 1


def row_deltas(base: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Expert rows minus base rows in float32, as everything here takes them; the shapes broadcast."""
    return rows.float() - base.float()


def merge_rows(
    base: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    method: MergeMethod,
    *,
    thresholds: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Merge one group: M members, C channels at once. What the group's members are is the caller's choice.

    Args:
        base: (C, I), any float dtype up to float32.
        rows: (M, C, I).
        weights: (M,).
        method: the method; `thresholds` or `keep` must be given where it needs them.
        thresholds: (M,) float32, the least magnitude that each member's trim keeps, from `MagnitudeThreshold`.
        keep: (M, C, I) bool, from `keep_mask`.

    Returns:
        (C, I) float32.
    """
    if rows.shape[1:] != base.shape or weights.shape != rows.shape[:1]:
        raise ValueError(
            f"base {tuple(base.shape)}, rows {tuple(rows.shape)} and weights {tuple(weights.shape)} do not fit, "
            "expected (C, I), (M, C, I) and (M,)"
        )
    if method.needs_threshold and (thresholds is None or thresholds.shape != weights.shape):
        raise ValueError(f"{method.name} at density {method.density} needs one threshold for each of {len(rows)} rows")
    if method.needs_mask and (keep is None or keep.shape != rows.shape):
        raise ValueError(f"{method.name} at density {method.density} needs a keep mask of shape {tuple(rows.shape)}")
    if method.name == "regmean":
        raise ValueError("rows alone cannot be merged by regmean")
    weights = weights.float()
    if method.name == "linear" and method.normalize and weights.sum() == 0:
        raise ValueError(f"the weights {weights.tolist()} of a normalized linear merge sum to 0")
    least = _largest_dropped(thresholds) if method.needs_threshold else [None] * len(rows)
    merged = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    step = max(1, BLOCK_ELEMENTS // max(1, base.shape[1]))
    for start in range(0, base.shape[0], step):
        block = slice(start, start + step)
        if method.name == "linear":
            merged[block] = _weighted_mean(rows[:, block], weights, method.normalize)
            continue
        deltas = _sparse_deltas(
            base[block], rows[:, block], method, least, keep[:, block] if method.needs_mask else None
        )
        merged[block] = _add_deltas(base[block], deltas, weights, method)
    return merged


def _largest_dropped(thresholds: torch.Tensor) -> list[float | None]:
    """The float just below each threshold: a magnitude is kept when it is above. None: all are."""
    below = torch.nextafter(thresholds.float(), torch.zeros_like(thresholds, dtype=torch.float32))
    return [
        below_ if threshold > 0 else None
        for below_, threshold in zip(below.tolist(), thresholds.tolist(), strict=True)
    ]


def _weighted_mean(rows: torch.Tensor, weights: torch.Tensor, normalize: bool) -> torch.Tensor:
    merged = torch.zeros(rows.shape[1:], dtype=torch.float32, device=rows.device)
    for row, weight in zip(rows, weights, strict=True):
        merged.addcmul_(row.float(), weight)
    return merged.div_(weights.sum()) if normalize else merged


def _sparse_deltas(
    base: torch.Tensor,
    rows: torch.Tensor,
    method: MergeMethod,
    least: list[float | None],
    keep: torch.Tensor | None,
) -> list[torch.Tensor]:
    """What the method keeps of each member's delta: M tensors (c, I)."""
    base = base.float()
    deltas = []
    for member, row in enumerate(rows):
        delta = row.float() - base
        if least[member] is not None:
            delta = F.hardshrink(delta, least[member])
        if keep is not None:
            delta.mul_(keep[member].to(delta.dtype)).mul_(1 / method.density)
        deltas.append(delta)
    return deltas


def _add_deltas(
    base: torch.Tensor, deltas: list[torch.Tensor], weights: torch.Tensor, method: MergeMethod
) -> torch.Tensor:
    """Base plus lambda times the sum or mean of the deltas. Overwrites `deltas`."""
    for delta, weight in zip(deltas, weights, strict=True):
        delta.mul_(weight)
    if method.name in ELECTING_METHODS:
        mixed, divisor = _elect(deltas, weights, method.normalize)
    else:
        mixed, divisor = _sum_in_order(deltas), weights.sum()
        divisor = torch.where(divisor.abs() < 1e-8, 1, divisor)
    if method.normalize:
        mixed.div_(divisor)
    if method.lambda_ != 1:
        mixed.mul_(method.lambda_)
    return mixed.add_(base.float())


def _sum_in_order(deltas: list[torch.Tensor]) -> torch.Tensor:
    mixed = deltas[0].clone()
    for delta in deltas[1:]:
        mixed.add_(delta)
    return mixed


def _elect(deltas: list[torch.Tensor], weights: torch.Tensor, count: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum of the weighted deltas whose sign is that of the whole sum (plus where it is 0). Overwrites `deltas`.

    Returns:
        The sum, and with `count` the weight of the deltas in it, 1 where that is 0.
    """
    total = _sum_in_order(deltas)
    sign = torch.lt(total, 0, out=torch.empty_like(total)).mul_(-2).add_(1)
    mixed = torch.zeros_like(total)
    divisor = torch.zeros_like(total) if count else None
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = delta.mul_(sign).clamp_(min=0)
        mixed.add_(agreeing)
        if divisor is not None:
            divisor.add_(agreeing.sign_().mul_(weight))
    if divisor is not None:
        divisor.add_(torch.eq(divisor, 0, out=torch.empty_like(divisor)))
    return mixed.mul_(sign), divisor
