"""How much to trust the trunk, and how sure a router may be, from each of its training sources, left out in turn.

A router without a source knows less than the one with all of them, and one that is asked of a source that it knows
errs less than it will elsewhere. So the trunk's share is what suits both, and the temperature the geometric mean of
what both need.

Shapes: B queries, B' of them with trunk features, H features, N experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conversion.router.discriminant import discriminant
from conversion.router.metrics import fit_temperature, negative_log_likelihood
from conversion.router.naive_bayes import CountedQueries

SOURCE_QUERIES = 200  # most queries of one source, so that a large one does not decide alone
UNKNOWN_SHARE = 0.02  # of left-out queries that may be taken for none of the experts'
MIN_EXPERTS = 2  # with a source left out, else they tell nothing of the others
TRUNK_SHARES = (0.0, 0.1, 0.3, 1.0, 3.0)  # standard deviation of the trunk's logits over that of the n-grams'
FOLDS = 5


@dataclass(frozen=True)
class Trunk:
    """The trunk features of some of the queries."""

    features: np.ndarray  # (B', H) float64, standardised
    numbers: np.ndarray  # (B',) which of the B queries they are of

    def head(self, data: CountedQueries, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`discriminant` of those in the (B,) mask `kept`."""
        rows = kept[self.numbers]
        numbers = self.numbers[rows]
        return discriminant(self.features[rows], data.labels[numbers], data.influence(kept)[numbers], data.num_experts)

    def logits(self, head: tuple[np.ndarray, np.ndarray], chosen: np.ndarray) -> np.ndarray:
        """(B'', N) logits of those in the (B,) mask `chosen`."""
        weights, biases = head
        return self.features[chosen[self.numbers]] @ weights.T + biases


@dataclass(frozen=True)
class Doubt:
    """What follows from the router's logits on sources that it has not seen."""

    trunk_share: float
    temperature: float
    min_known: float
    sources: list[str]


def measure_doubt(data: CountedQueries, kept: np.ndarray, trunk: Trunk | None, names: Sequence[str]) -> Doubt | None:
    """The trunk's share, the temperature and the least known share that fit queries of left-out sources.

    Args:
        kept: (B,) mask of the queries to learn from.
        trunk: None where the router reads no trunk.
        names: source of each query, for the result.

    Returns:
        None where the queries of fewer than two experts come from more than one source.
    """
    known = None if trunk is None else np.isin(np.arange(len(data.labels)), trunk.numbers)
    asked = data.some_of_each_source(SOURCE_QUERIES, known)
    left = [(inside & asked, others) for inside, others in data.left_out(kept)]
    if len({label for inside, _ in left for label in data.labels[inside].tolist()}) < MIN_EXPERTS:
        return None
    folds = [
        (asked & (data.originals % FOLDS == fold), kept & (data.originals % FOLDS != fold)) for fold in range(FOLDS)
    ]
    unseen, seen = (_logits(data, trunk, splits) for splits in (left, folds))
    shares = TRUNK_SHARES if trunk else (0.0,)
    losses = [sum(_least_loss(part, share) for part in (unseen, seen)) for share in shares]
    share = TRUNK_SHARES[int(np.argmin(losses))]
    temperatures = [fit_temperature(part.mixed(share), part.labels) for part in (unseen, seen)]
    least = float(np.floor(100 * np.quantile(unseen.known, UNKNOWN_SHARE)) / 100)
    sources = [names[np.flatnonzero(inside)[0]] for inside, _ in left]
    return Doubt(share, float(np.prod(temperatures) ** 0.5), least, sources)


@dataclass(frozen=True)
class _Logits:
    """Of queries that were not learned from."""

    ngrams: np.ndarray  # (B, N)
    trunk: np.ndarray  # (B, N)
    labels: np.ndarray  # (B,)
    known: np.ndarray  # (B,) share of their n-grams

    def mixed(self, share: float) -> np.ndarray:
        return self.ngrams + trunk_scale(share, self.ngrams, self.trunk) * self.trunk


def trunk_scale(share: float, ngrams: np.ndarray, trunk: np.ndarray) -> float:
    """The factor of (B, N) trunk logits that gives them `share` times the spread of (B, N) n-gram logits."""
    return share * float(ngrams.std() / max(trunk.std(), 1e-12))


def _least_loss(logits: _Logits, share: float) -> float:
    """The loss at the temperature that fits best."""
    mixed = logits.mixed(share)
    return negative_log_likelihood(mixed, logits.labels, fit_temperature(mixed, logits.labels))


def _logits(data: CountedQueries, trunk: Trunk | None, splits: list[tuple[np.ndarray, np.ndarray]]) -> _Logits:
    """Of the first (B,) mask of each split, learned from the second."""
    parts = []
    for asked, learned in splits:
        if asked.any() and learned.any():
            weights = data.weights(learned)
            ngrams = data.logits(weights, asked)
            from_trunk = np.zeros_like(ngrams) if trunk is None else trunk.logits(trunk.head(data, learned), asked)
            parts.append((ngrams, from_trunk, data.labels[asked], data.known_shares(weights, asked)))
    return _Logits(*(np.concatenate(values) for values in zip(*parts)))
