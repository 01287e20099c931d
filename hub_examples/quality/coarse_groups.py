"""Two groups of experts that are not chosen channel by channel; each group is averaged."""

from collections.abc import Callable

import torch

from conversion.channels.grouping import gram_matrices, set_partitions
from quality.problem import BYTES, Problem, Stored, rounded

NUM_GROUPS = 2


def random_groups(problem: Problem) -> Stored:
    """Every channel's experts fall into two groups at random."""
    choices = _partitions(len(problem.experts))
    generator = torch.Generator().manual_seed(problem.seed)
    labels = {
        name: choices[torch.randint(len(choices), problem.base[name].shape[:1], generator=generator)]
        for name in problem.matrices
    }
    return _merged(problem, labels)


def layer_groups(problem: Problem) -> Stored:
    """The best two groups for each decoder block, and for the embedding, by the squared distance of weights."""
    return _merged(problem, _best_groups(problem, lambda name: name.split(".")[2]))


def model_groups(problem: Problem) -> Stored:
    """The best two groups for the whole model, by the squared distance of weights."""
    return _merged(problem, _best_groups(problem, lambda name: ""))


def _partitions(num_experts: int) -> torch.Tensor:
    """All ways to split the experts into two groups: (P, N)."""
    partitions = set_partitions(num_experts)
    return partitions[partitions.amax(1) == NUM_GROUPS - 1]


def _best_groups(problem: Problem, part_of: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """One partition for all matrices of a part of the model, as labels of every channel: (O, N)."""
    grams: dict[str, torch.Tensor] = {}
    for name in problem.matrices:
        gram = gram_matrices(problem.stacked(name) - problem.base[name]).sum(0)
        grams[part_of(name)] = grams.get(part_of(name), 0) + gram
    best = {part: _best_partition(gram) for part, gram in grams.items()}
    return {name: best[part_of(name)].expand(len(problem.base[name]), -1) for name in problem.matrices}


def _best_partition(gram: torch.Tensor) -> torch.Tensor:
    """Labels (N,) of the two groups whose members are nearest to their means, from inner products (N, N)."""
    partitions = _partitions(len(gram))
    together = torch.nn.functional.one_hot(partitions).double()  # (P, N, groups)
    kept = torch.einsum("pik,ij,pjk->pk", together, gram, together) / together.sum(1)
    return partitions[kept.sum(1).argmax()]


def _merged(problem: Problem, labels: dict[str, torch.Tensor]) -> Stored:
    """Means inside the groups that labels (O, N) say."""
    means: dict[str, torch.Tensor] = {}
    for name in problem.matrices:
        together = torch.nn.functional.one_hot(labels[name], NUM_GROUPS).float()  # (O, N, groups)
        sums = torch.einsum("onk,noi->oki", together, problem.stacked(name))
        means[name] = rounded(sums / together.sum(1)[..., None])  # (O, groups, I)

    def matrix(expert: int, name: str) -> torch.Tensor:
        return means[name][torch.arange(len(means[name])), labels[name][:, expert]]

    matrix_bytes = BYTES * NUM_GROUPS * sum(problem.base[name].numel() for name in problem.matrices)
    return Stored(problem.views(matrix), matrix_bytes + problem.vector_bytes)
