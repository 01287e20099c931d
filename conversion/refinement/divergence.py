"""The divergence from a teacher that is known by its most probable tokens and by what is left for all others together.

At every position the teacher's distribution p over V tokens is kept as its k most probable tokens and one bucket with
the rest of its probability. The student's q is put into the same k + 1 outcomes, and

    KL = sum over outcomes of p log (p / q)

is what is trained on and reported. With k = V it is the whole divergence; with fewer tokens it is never more than
that, and misses only how the rest is shared out.

Shapes: P positions, V tokens, k kept tokens.
"""

from typing import NamedTuple

import torch


class TopTokens(NamedTuple):
    """A teacher's distributions at some positions."""

    values: torch.Tensor  # (P, k) float32: log-probabilities of the most probable tokens
    tokens: torch.Tensor  # (P, k) int32: which they are
    rest: torch.Tensor  # (P,) float32: log of the probability of all other tokens together; -inf where there is none


def top_tokens(logits: torch.Tensor, k: int) -> TopTokens:
    """What is kept of logits (P, V): k tokens of each position, all of them where V is smaller."""
    logits = logits.float()
    values, tokens = logits.topk(min(k, logits.shape[-1]), dim=-1)
    total = logits.logsumexp(-1)
    rest = logits.scatter(-1, tokens, float("-inf")).logsumexp(-1)
    return TopTokens(values - total[:, None], tokens.int(), rest - total)


def divergence(logits: torch.Tensor, teacher: TopTokens) -> torch.Tensor:
    """KL(teacher || student) at every position, from the student's logits (P, V): (P,) float32.

    A token that neither has (-inf in both) adds nothing.
    """
    logits, tokens = logits.float(), teacher.tokens.long()
    total = logits.logsumexp(-1)
    values = logits.gather(-1, tokens) - total[:, None]
    no_rest = teacher.rest.isneginf()
    # Where there is no rest, a finite stand-in: the gradient of logsumexp over nothing but -inf is NaN.
    others = logits.scatter(-1, tokens, float("-inf")).masked_fill(no_rest[:, None], 0.0)
    rest = others.logsumexp(-1) - total
    terms = _terms(teacher.values, values).sum(-1)
    return terms + _terms(teacher.rest, rest)


def _terms(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """p log (p / q) of log-probabilities; 0 where p is 0."""
    absent = teacher.isneginf()
    difference = teacher.masked_fill(absent, 0.0) - student.masked_fill(absent, 0.0)
    return teacher.exp() * difference
