"""What merging rows costs by what they do: channels weighed and inputs measured on an expert's own texts.

Where channel o of expert e reads a row m instead of its own row w, its output for the inputs x changes by (m - w)^T x,
and what the expert says diverges, to second order, by half of the mean of

    (d log p(y) / dy_o)^2 ((m - w)^T x)^2

over tokens y that the expert itself draws (the Fisher information for the curvature). With gradients and inputs taken
as independent, that is g_eo (m - w)^T H_e (m - w), with H_e = mean of x x^T (I x I), the covariance of the matrix's
inputs, and g_eo the mean squared gradient at the channel. So the numbers of all channels of a model compare. Texts are
few, so directions and channels that none of them showed count a little, too:

- to H_e, 0.003 of its mean diagonal is added on the diagonal;
- to g_eo, 0.02 of the matrix's mean. Before, each expert's g are scaled to a mean of 1 over the model.

The row of a group S is the minimiser (RegMean, Jin et al., ICLR 2023, inside groups and weighted)

    m = (sum_S g_e H_e)^-1 sum_S g_e H_e w_e,

with g_e averaged over the matrix's channels, so that one factorisation serves all channels of S. The group costs
sum_S g_eo (m - w_e)^T H_e (m - w_e), with each channel's own weight. A matrix may have several uses, each with weights
and covariances of its own, whose costs add up: of an embedding that is tied to the head the rows are read as they are
(H the identity, g that of the embedding's output at the token), and multiplied (H and g of the head). A bias is the
weight of a constant input 1, taken as uncorrelated with the others.

For more experts than `MAX_ENUMERATED` there are too many groups to factor each. Then one metric stands for all
experts, the mean H of the H_e, and the cost of any group follows from the channel's N x N Gram matrix D H D^T of the
deltas D and the weights g_eo, as in `grouping`. With H = L L^T it is that of D L.

Shapes: N experts, M members of a group, C channels, O channels of a matrix, I inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

DAMPING = 0.003
FLOOR = 0.02
LEAST_MEAN = 1e-6  # where no text needed anything of a matrix; 1 is the mean over the model

# Columns of a float32 matrix that are widened at a time.
TILE = 1024


@dataclass(frozen=True)
class Use:
    """One way in which a matrix's rows are used: how much its channels count there, and with which inputs."""

    weights: torch.Tensor  # (N, O) float64: g_eo, 0 where an expert has no such channel
    covariances: torch.Tensor | None  # (N, I, I) float32: the damped H_e; None: the identity

    @property
    def means(self) -> torch.Tensor:
        """The g_e averaged over the channels that the expert has: (N,) float64."""
        return self.weights.sum(1) / (self.weights > 0).sum(1).clamp(min=1)


def channel_weights(gradient_squares: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """The g_eo of one matrix.

    Args:
        gradient_squares: (N, O) float64, mean squared gradients.
        means: (N,) float64, of each expert over all channels of the model.

    Returns:
        (N, O) float64.
    """
    weights = gradient_squares / means[:, None]
    return weights + FLOOR * weights.mean().clamp(min=LEAST_MEAN)


def damp_covariances(covariances: torch.Tensor) -> torch.Tensor:
    """Add a part of the mean diagonal to the diagonal, in place; an expert without any input gets the identity.

    Args:
        covariances: (N, I, I) float32.

    Returns:
        The same.
    """
    for covariance in covariances:
        scale = float(covariance.diagonal().double().mean())
        covariance.diagonal().add_(DAMPING * scale if scale > 0 else 1)
    return covariances


def mean_metric(uses: Sequence[Use]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One metric for all experts, and how much each expert's channel counts in it.

    Returns:
        The weights (N, O) float64, and the L (I, I) float32 of the metric L L^T; None: the identity.

    Raises:
        ValueError: the metric is not positive definite.
    """
    weights = sum(use.weights for use in uses)
    if all(use.covariances is None for use in uses):
        return weights, None
    num_experts = len(weights)
    parts = [float(use.weights.sum() / weights.sum()) / num_experts for use in uses]
    metric = _weighted_sum(uses, range(num_experts), [[part] * num_experts for part in parts])
    return weights, _cholesky(metric).float()


class GroupSolver:
    """The minimising row of one group of experts, for every channel of one matrix.

    Args:
        uses: of the matrix.
        members: the M experts of the group.

    Raises:
        ValueError: their covariances add up to a matrix that is not positive definite.
    """

    def __init__(self, uses: Sequence[Use], members: Sequence[int]):
        self._uses, self._members = uses, list(members)
        self._means = [use.means[self._members].tolist() for use in uses]
        self._factor = None
        if any(use.covariances is not None for use in uses):
            self._factor = _cholesky(_weighted_sum(uses, self._members, self._means))

    def solve(self, deltas: torch.Tensor, products: Sequence[torch.Tensor], channels: torch.Tensor) -> torch.Tensor:
        """The merged delta (C, I) float64; without covariances it is the mean with each channel's own weights.

        Args:
            deltas: the members' (M, C, I), any float dtype.
            products: from `times_inputs`, for each use the members' (M, C, I).
            channels: (C,) of the matrix.
        """
        if self._factor is None:
            weights = sum(self._weights(use, channels) for use in self._uses)
            return weighted_mean(deltas, weights.to(deltas.device))
        right = torch.zeros(deltas.shape[1:], dtype=torch.float64, device=deltas.device)
        for means, of_use in zip(self._means, products, strict=True):
            for mean, product in zip(means, of_use, strict=True):
                right.add_(product, alpha=mean)
        return torch.cholesky_solve(right.T, self._factor).T

    def bias(self, deltas: torch.Tensor) -> torch.Tensor:
        """From the members' deltas (M, C, 1) of a bias to the merged delta (C, 1) float64."""
        means = torch.tensor(self._means, dtype=torch.float64, device=deltas.device).sum(0)
        return weighted_mean(deltas, means[:, None].expand(deltas.shape[:2]))

    def costs(
        self, deltas: Sequence[torch.Tensor], products: Sequence[torch.Tensor], channels: torch.Tensor
    ) -> torch.Tensor:
        """What the group costs: (C,) float64, from products in float32.

        Args:
            deltas: the members' deltas of the weight (M, C, I), and of a bias (M, C, 1).
            products, channels: as `solve` takes them.
        """
        weight, *biases = deltas
        merged, merged_biases = self.solve(weight, products, channels), [self.bias(bias) for bias in biases]
        weights = [self._weights(use, channels).to(weight.device) for use in self._uses]
        total = torch.zeros(len(channels), dtype=torch.float64, device=weight.device)
        for place, member in enumerate(self._members):
            away = (weight[place].double() - merged).float()
            bias_squares = sum((bias[place] - mean).square().sum(1) for bias, mean in zip(biases, merged_biases))
            for use, of_use in zip(self._uses, weights, strict=True):
                product = away if use.covariances is None else away @ use.covariances[member]
                squares = (product * away).sum(1, dtype=torch.float64) + bias_squares
                total += of_use[place] * squares
        return total

    def _weights(self, use: Use, channels: torch.Tensor) -> torch.Tensor:
        """The members' weights of some channels: (M, C) float64."""
        return use.weights[:, channels.to(use.weights.device)][self._members]


def weighted_mean(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean of the members' rows (M, C, I) with a weight for each channel (M, C): (C, I) float64; 0 where all are 0."""
    total = torch.zeros(rows.shape[1:], dtype=torch.float64, device=rows.device)
    weight_sum = torch.zeros_like(total[:, 0])
    for row, weight in zip(rows, weights.double(), strict=True):
        total.addcmul_(row.double(), weight[:, None])
        weight_sum += weight
    return total.div_(torch.where(weight_sum > 0, weight_sum, 1)[:, None])


def times_inputs(uses: Sequence[Use], deltas: torch.Tensor, experts: Sequence[int]) -> list[torch.Tensor]:
    """For each use the experts' deltas (M, C, I), any float dtype, times their covariances: (M, C, I) float64."""
    products = []
    for use in uses:
        product = torch.empty(deltas.shape, dtype=torch.float64, device=deltas.device)
        for place, expert in enumerate(experts):
            wide = deltas[place].double()
            if use.covariances is None:
                product[place] = wide
                continue
            for start in range(0, deltas.shape[2], TILE):
                product[place, :, start : start + TILE] = (
                    wide @ use.covariances[expert, :, start : start + TILE].double()
                )
        products.append(product)
    return products


def _weighted_sum(uses: Sequence[Use], experts: Sequence[int], weights: Sequence[Sequence[float]]) -> torch.Tensor:
    """Sum of the experts' covariances in all uses, (I, I) float64, with a weight for each; widened row by row."""
    like = next(use.covariances for use in uses if use.covariances is not None)
    total = torch.zeros(like.shape[1:], dtype=torch.float64, device=like.device)
    for use, numbers in zip(uses, weights, strict=True):
        if use.covariances is None:
            total.diagonal().add_(sum(numbers))
            continue
        for expert, number in zip(experts, numbers, strict=True):
            for start in range(0, len(total), TILE):
                part = use.covariances[expert, start : start + TILE].double()
                total[start : start + TILE].add_(part, alpha=number)
    return total


def _cholesky(matrix: torch.Tensor) -> torch.Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info:
        raise ValueError(f"a covariance of {len(matrix)} inputs is not positive definite")
    return factor
