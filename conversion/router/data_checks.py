"""What the queries of a router will not teach it, said before it is trained on them."""

import logging
import reprlib
from collections import Counter
from itertools import combinations

import numpy as np

from conversion.io.wording import first_names
from conversion.router.data import Query
from conversion.router.naive_bayes import CountedQueries

logger = logging.getLogger(__name__)

FEW_QUERIES = 50
TOLD_APART = 0.75  # share of two experts' queries, mean of both, below which they cannot be told apart
SHOWN = 10


def check_amounts(queries: list[Query], expert_names: list[str]) -> None:
    """Warn of experts with few queries, and of those whose queries come from one source."""
    own = [[query for query in queries if query["labels"] == expert] for expert in range(len(expert_names))]
    few = [f"{name} {len(part)}" for name, part in zip(expert_names, own) if 0 < len(part) < FEW_QUERIES]
    if few:
        logger.warning(
            "few queries, at least some hundred are wanted of every expert: %s", first_names(few, len(expert_names))
        )
    single = [name for name, part in zip(expert_names, own) if len({query["source"] for query in part}) == 1]
    if single:
        logger.warning(
            "all queries of %s are from one source: the router learns how that source writes, and how well it routes "
            "others' queries cannot be measured; give a second source",
            first_names(single, len(expert_names)),
        )


def check_separation(
    queries: list[Query], data: CountedQueries, logits: np.ndarray, mislabelled: np.ndarray, expert_names: list[str]
) -> None:
    """Log how many queries look mislabelled, and warn, with some of them, of experts that cannot be told apart.

    Args:
        logits: (B, N) cross-validated.
        mislabelled: (B,) mask.
    """
    original = data.originals == np.arange(len(data.labels))
    shown = np.flatnonzero(mislabelled & original)
    if len(shown):
        counts = Counter(expert_names[data.labels[number]] for number in shown)
        logger.info(
            "%d queries look like another expert's and are not learned from: %s",
            len(shown),
            ", ".join(f"{name} {count}" for name, count in counts.items()),
        )
    for first, second in combinations(range(len(expert_names)), 2):
        pair = original & np.isin(data.labels, (first, second))
        labels = data.labels[pair]
        if len(set(labels.tolist())) < 2:
            continue
        picked = np.where(logits[pair, first] >= logits[pair, second], first, second)
        accuracy = np.mean([(picked == labels)[labels == expert].mean() for expert in (first, second)])
        if accuracy < TOLD_APART:
            margin = np.abs(logits[pair, first] - logits[pair, second])
            wrong = np.flatnonzero(pair)[picked != labels]
            worst = wrong[np.argsort(-margin[picked != labels], kind="stable")][:SHOWN]
            lines = [
                f"  {expert_names[data.labels[number]]}: {reprlib.repr(queries[number]['text'])}" for number in worst
            ]
            logger.warning(
                "queries of %s and %s can hardly be told apart: of those held out %.0f%% go to the right one of the "
                "two; %d look like the other's, first:\n%s",
                expert_names[first],
                expert_names[second],
                100 * accuracy,
                len(wrong),
                "\n".join(lines),
            )
