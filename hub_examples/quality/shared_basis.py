"""Each channel's rows as combinations of a few shared rows: r rows and N x r coefficients a channel.

Reversible merging (arXiv 2510.14163) written for whole weights: the experts' rows of a channel, N x I, have rank N,
and their truncated SVD is the best basis of r rows. How many rows each channel gets is settled by what they keep for
their bytes. Channel Merging is the case in which each expert has one coefficient of 1 and the others are 0.
"""

import torch

from quality.input_statistics import EMBEDDING, damped
from quality.one_model import DAMPING, channel_weights
from quality.problem import BYTES, Problem, Stored, rounded


def shared_basis(problem: Problem, budget: float) -> Stored | None:
    """The least squared distance of weights."""
    return _shared_basis(problem, budget, {}, {})


def shared_basis_by_inputs(problem: Problem, budget: float) -> Stored | None:
    """The least squared distance of outputs on the mean covariance of the calibration texts' inputs, each channel of
    each expert weighed by its gradient."""
    weights = {name: weight.double() for name, weight in channel_weights(problem).items()}
    roots = {
        name: _square_roots(
            sum(
                weight * damped(expert.covariance[name], DAMPING)
                for weight, expert in zip(weights[name].mean(1), problem.statistics, strict=True)
            )
            / weights[name].mean(1).sum()
        )
        for name in problem.matrices
        if name != EMBEDDING
    }
    return _shared_basis(problem, budget, weights, roots)


def _square_roots(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root of a positive definite matrix, and the root's inverse."""
    values, vectors = torch.linalg.eigh(metric)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def _shared_basis(
    problem: Problem,
    budget: float,
    weights: dict[str, torch.Tensor],
    roots: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> Stored | None:
    """Weights (N, O) and roots (I, I) of each matrix's metric; a matrix without them is taken as it is."""
    num_experts = len(problem.experts)
    parts, worth, price = {}, [], []
    for name in problem.matrices:
        rows = problem.stacked(name).transpose(0, 1).double()  # (O, N, I)
        scale = weights[name].T[..., None].sqrt() if name in weights else torch.ones_like(rows[..., :1])
        root, inverse = roots.get(name, (None, None))
        scaled = rows * scale
        left, values, right = torch.linalg.svd(scaled if root is None else scaled @ root, full_matrices=False)
        basis = right if inverse is None else right @ inverse
        # The basis rows carry the size of weights, so that coefficients of about one multiply them.
        size = basis.norm(dim=-1)
        parts[name] = left * (values * size)[:, None] / scale, basis / size[..., None]  # (O, N, N), (O, N, I)
        worth.append(values.square().flatten())
        price.append(torch.full_like(worth[-1], BYTES * (rows.shape[2] + num_experts)))
    worth, price = torch.cat(worth), torch.cat(price)
    spare = problem.allowance(budget) - problem.vector_bytes
    first = torch.arange(len(worth)) % num_experts == 0  # every channel has a row
    if price[first].sum() > spare:
        return None
    order = torch.where(first, torch.inf, worth / price).argsort(descending=True)
    kept = torch.zeros_like(first)
    kept[order] = price[order].cumsum(0) <= spare
    chosen = dict(zip(parts, kept.split([coefficients[:, 0].numel() for coefficients, _ in parts.values()])))
    matrices = {}
    for name, (coefficients, basis) in parts.items():
        used = chosen[name].view(-1, 1, num_experts)
        matrices[name] = rounded(coefficients * used) @ rounded(basis)  # (O, N, I)
    num_bytes = problem.vector_bytes + int(price[kept].sum())
    return Stored(problem.views(lambda expert, name: matrices[name][:, expert]), num_bytes)
