"""All experts in one model under the covariances of their inputs; each keeps its own norms."""

import torch

from quality.input_statistics import EMBEDDING, damped
from quality.problem import Problem, Stored, rounded

REGMEAN_OFF_DIAGONAL = 0.9  # the paper's alpha for language models
DAMPING = 0.01


def regmean(problem: Problem) -> Stored:
    """RegMean (Jin et al., arXiv 2212.09849): linear layers by regression on their inputs, embeddings averaged."""
    return _one_model(
        problem,
        {name: torch.ones(len(problem.experts), problem.base[name].shape[0]) for name in problem.matrices},
        lambda covariance: (
            REGMEAN_OFF_DIAGONAL * covariance + (1 - REGMEAN_OFF_DIAGONAL) * torch.diag(covariance.diagonal())
        ),
    )


def weighted_regmean(problem: Problem) -> Stored:
    """RegMean with experts weighed by the gradients of their channels: by matrix, and by token in the embedding."""
    return _one_model(problem, channel_weights(problem), lambda covariance: damped(covariance, DAMPING))


def channel_weights(problem: Problem) -> dict[str, torch.Tensor]:
    """How much each channel of each expert matters: its gradient, scaled to the same sum for every expert, (N, O).

    A little of the mean keeps channels apart from zero that no text has used.
    """
    totals = [sum(gradient.sum() for gradient in expert.gradient.values()) for expert in problem.statistics]
    weights = {}
    for name in problem.matrices:
        gradients = torch.stack([expert.gradient[name] / total for expert, total in zip(problem.statistics, totals)])
        weights[name] = gradients + 0.1 * gradients.mean()
    return weights


def _one_model(problem: Problem, weights: dict[str, torch.Tensor], metric) -> Stored:
    """Of each matrix the minimiser of the sum of weight * |(w_e - m) x_e|^2; weights (N, O)."""
    merged = {}
    for name in problem.matrices:
        experts, weight = problem.stacked(name).double(), weights[name].double()
        if name == EMBEDDING:
            merged[name] = (weight[:, :, None] * experts).sum(0) / weight.sum(0)[:, None]
        else:
            metrics = torch.stack([metric(expert.covariance[name]) for expert in problem.statistics])
            metrics *= weight.mean(1)[:, None, None]
            merged[name] = torch.linalg.solve(metrics.sum(0), (experts @ metrics).sum(0), left=False)
    merged = {name: rounded(matrix) for name, matrix in merged.items()}
    return Stored(problem.views(lambda _, name: merged[name]), problem.model_bytes + extra_vectors(problem))


def extra_vectors(problem: Problem) -> int:
    """Bytes of the norms of all experts but one."""
    return problem.vector_bytes * (len(problem.experts) - 1) // len(problem.experts)
