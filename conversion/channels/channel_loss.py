"""What merging rows costs by what they do: channels weighed and inputs measured on an expert's own texts.

Where channel o of expert e reads a row m instead of its own row w, its output for the inputs x changes by (m - w)^T x,
and the loss, to second order and with the squared gradient for the curvature, by about half of

    (dL/dy_o)^2 ((m - w)^T x)^2.

With gradients and inputs taken as independent, its mean over the expert's texts is g_eo (m - w)^T H_e (m - w), with
the covariance H_e = mean of x x^T (I x I) of the matrix's inputs and the mean squared gradient g_eo at the channel.
Texts are few and the expansion is short, so neither is used as it is measured:

- H_e is scaled to a mean diagonal of 1 and damped: 0.997 H_e + 0.003 identity. Directions that no text showed count
  a little.
- g_eo is scaled to a mean of 1 over all channels of an expert (else the expert with the largest loss takes all rows),
  its root is taken, and a part of the matrix's mean added: a channel that no text needed counts a little, too.

The row of a group S is the minimiser (RegMean, Jin et al., ICLR 2023, inside groups and weighted)

    m = (sum_S g_e H_e)^-1 sum_S g_e H_e w_e,

with g_e averaged over the matrix's channels, so that one factorisation serves all channels of S. Groups are chosen
with one metric for all experts, the mean H of the H_e: then the cost of any group follows from the channel's N x N
Gram matrix D H D^T of the deltas D and the weights g_eo, as in `grouping`. With H = L L^T it is that of D L.

A bias is the weight of a constant input 1, taken as uncorrelated with the others. An embedding's channels, the tokens,
have no inputs: H is the identity, and their merged row the mean weighted by g_eo. Tied to a head they have the head's
H, damped to half of the identity.

Shapes: N experts, M members of a group, C channels, O channels of a matrix, I inputs.
"""

from collections.abc import Sequence

import torch

DAMPING = 0.003
EMBEDDING_DAMPING = 0.5
POWER = 0.5
FLOOR = 0.2
LEAST_MEAN = 1e-6  # where no text needed anything of a matrix; 1 is the mean over the model

# Columns of a float32 matrix that are widened at a time.
TILE = 1024


def channel_weights(gradient_squares: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """The g_eo of one matrix.

    Args:
        gradient_squares: (N, O) float64, mean squared gradients.
        means: (N,) float64, of each expert over all channels of the model.

    Returns:
        (N, O) float64.
    """
    weights = (gradient_squares / means[:, None]) ** POWER
    return weights + FLOOR * weights.mean().clamp(min=LEAST_MEAN)


def damp_covariances(covariances: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Scale to a mean diagonal of 1 and damp, in place; an expert without any input gets the identity.

    Args:
        covariances: (N, I, I) float32.

    Returns:
        What each was divided by: (N,) float64.
    """
    scales = covariances.diagonal(dim1=1, dim2=2).double().mean(1)
    for covariance, scale in zip(covariances, scales.tolist(), strict=True):
        covariance.mul_((1 - damping) / scale if scale > 0 else 0)
        covariance.diagonal().add_(damping if scale > 0 else 1)
    return torch.where(scales > 0, scales, 1)


def metric_factor(covariances: torch.Tensor) -> torch.Tensor:
    """The L with L L^T = mean of the experts' damped H: (I, I) float32, from (N, I, I) float32.

    Raises:
        ValueError: the mean is not positive definite.
    """
    return _cholesky(_weighted_sum(covariances, [1 / len(covariances)] * len(covariances))).float()


class GroupSolver:
    """The minimising row of the groups of one owner set of one matrix.

    Args:
        covariances: (M, I, I) float32, the members' damped H.
        weights: M numbers above 0, the members' g averaged over the matrix's channels.

    Raises:
        ValueError: their sum is not positive definite.
    """

    def __init__(self, covariances: Sequence[torch.Tensor], weights: Sequence[float]):
        self._covariances, self._weights = covariances, weights
        self._factor = _cholesky(_weighted_sum(covariances, weights))

    def solve(self, deltas: torch.Tensor) -> torch.Tensor:
        """From the members' deltas (M, C, I), any float dtype, to the merged delta (C, I) float64."""
        _, channels, width = deltas.shape
        right = torch.zeros(channels, width, dtype=torch.float64, device=deltas.device)
        for delta, covariance, weight in zip(deltas, self._covariances, self._weights, strict=True):
            wide = delta.double() * weight
            for start in range(0, width, TILE):
                right[:, start : start + TILE] += wide @ covariance[:, start : start + TILE].double()
        return torch.cholesky_solve(right.T, self._factor).T


def weighted_mean(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean of the members' rows (M, C, I) with a weight for each channel (M, C), not all 0: (C, I) float64."""
    total = torch.zeros(rows.shape[1:], dtype=torch.float64, device=rows.device)
    weight_sum = torch.zeros_like(total[:, 0])
    for row, weight in zip(rows, weights.double(), strict=True):
        total.addcmul_(row.double(), weight[:, None])
        weight_sum += weight
    return total.div_(weight_sum[:, None])


def _weighted_sum(matrices: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Sum of (I, I) float32 matrices in float64, widened some rows at a time."""
    total = torch.zeros(matrices[0].shape, dtype=torch.float64, device=matrices[0].device)
    for matrix, weight in zip(matrices, weights, strict=True):
        for start in range(0, len(matrix), TILE):
            total[start : start + TILE].add_(matrix[start : start + TILE].double(), alpha=weight)
    return total


def _cholesky(matrix: torch.Tensor) -> torch.Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info:
        raise ValueError(f"a covariance of {len(matrix)} inputs is not positive definite")
    return factor
