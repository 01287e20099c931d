"""The router's table of n-grams by counting: class-balanced naive Bayes.

What a query's n-grams say of experts is counted, not fitted: weights that only describe each expert's own queries hold
better on sources that nobody has seen than weights that were fitted to tell these queries apart (Ng and Jordan, "On
Discriminative vs. Generative Classifiers", 2001). For n-gram g and expert e

    rate(g, e)   = (count(g, e) + PRIOR * mean over experts of share(g, .)) / (count(., e) + PRIOR)
    weight(g, e) = log(rate(g, e) * typical count + SMOOTHING) - mean over experts

where `count` adds up the weights of the queries that hold g, `share` is count over its expert's sum, and the typical
count is the geometric mean of the experts' sums. All experts are equally likely, however many queries they have; the
prior keeps an expert with a handful of queries from believing each of their words; the queries of a source of n weigh
1 / sqrt(n), so that one large source does not decide alone. An n-gram that no query holds has weight 0.

Shapes: B queries, G buckets of n-grams, N experts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from conversion.router.data import Query
from conversion.router.metrics import fit_temperature, probabilities
from modeling_channel_merged.expert_router import ExpertRouter

SMOOTHING = 2.0
PRIOR = 10_000.0  # in n-grams, as some hundred queries have
FOLDS = 5
MISLABELLED = 0.95  # probability of another expert from which a query is taken for mislabelled
BATCH = 256


@dataclass(frozen=True)
class CountedQueries:
    """Which buckets each of B queries has, and what is known of it."""

    rows: np.ndarray  # (E,) the query of each entry, in order
    columns: np.ndarray  # (E,) its bucket
    labels: np.ndarray  # (B,) the right expert
    sources: np.ndarray  # (B,) number of its expert's source
    generated: np.ndarray  # (B,) whether a program wrote it
    originals: np.ndarray  # (B,) the query that it is a variant of, else its own number
    num_experts: int
    num_buckets: int

    def influence(self, kept: np.ndarray) -> np.ndarray:
        """(B,) float64 weight of each query in the (B,) mask `kept`, 1 in the mean; 0 for the others."""
        sizes = np.bincount(self.sources[kept], minlength=self.sources.max() + 1)
        influence = np.where(kept, 1 / np.sqrt(np.maximum(sizes[self.sources], 1)), 0.0)
        return influence / influence[kept].mean()

    def weights(self, kept: np.ndarray) -> np.ndarray:
        """(G, N) float32 weights from the queries of the (B,) mask `kept`."""
        influence = self.influence(kept)
        cells = self.columns * self.num_experts + self.labels[self.rows]
        counts = np.bincount(cells, influence[self.rows], self.num_buckets * self.num_experts)
        counts = counts.reshape(self.num_buckets, self.num_experts)
        seen = counts.any(-1)
        counts, sums = counts[seen], counts.sum(0)
        shares = counts / np.maximum(sums, 1)
        rates = (counts + PRIOR * shares.mean(-1, keepdims=True)) / (sums + PRIOR)
        typical = np.exp(np.log(np.maximum(sums, 1)).mean())
        logarithms = np.log(rates * typical + SMOOTHING)
        weights = np.zeros((self.num_buckets, self.num_experts), dtype=np.float32)
        weights[seen] = logarithms - logarithms.mean(-1, keepdims=True)
        return weights

    def logits(self, weights: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """(B', N) float64 logits of the queries of the (B,) mask `chosen`, as the router computes them."""
        entries = chosen[self.rows]
        rows, columns = self.rows[entries], self.columns[entries]
        sums = [np.bincount(rows, weights[columns, expert], len(chosen)) for expert in range(self.num_experts)]
        lengths = np.bincount(rows, minlength=len(chosen))
        return (np.stack(sums, -1) / np.sqrt(np.maximum(lengths, 1))[:, None])[chosen]

    def known_shares(self, weights: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """(B',) share of each chosen query's n-grams that have a weight."""
        entries = chosen[self.rows]
        rows, known = self.rows[entries], weights[self.columns[entries]].any(-1)
        lengths = np.bincount(rows, minlength=len(chosen))
        return (np.bincount(rows, known, len(chosen)) / np.maximum(lengths, 1))[chosen]

    def cross_validated(self) -> np.ndarray:
        """(B, N) logits of each query from the queries of other folds; a variant is in the fold of its original."""
        logits = np.empty((len(self.labels), self.num_experts))
        for fold in range(min(FOLDS, len(self.labels))):
            inside = self.originals % FOLDS == fold
            if inside.any() and not inside.all():
                logits[inside] = self.logits(self.weights(~inside), inside)
            else:
                logits[inside] = 0.0
        return logits

    def left_out(self, kept: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each source that is not its expert's only one: its own queries, and those of the others to learn from.

        Generated queries are nobody's, so their sources are not asked for.

        Args:
            kept: (B,) mask of the queries to learn from.

        Returns:
            Pairs of (B,) masks.
        """
        left = []
        for source in range(self.sources.max() + 1):
            inside = self.sources == source
            others = kept & ~inside
            if not self.generated[inside].all() and (self.labels[others] == self.labels[inside][0]).any():
                left.append((inside, others))
        return left

    def some_of_each_source(self, count: int, among: np.ndarray | None = None) -> np.ndarray:
        """(B,) mask of at most `count` queries of each source, evenly spread over its own, or over a (B,) mask.

        Variants are not its own.
        """
        chosen = np.zeros(len(self.labels), dtype=bool)
        if among is None:
            among = self.originals == np.arange(len(self.labels))
        for source in range(self.sources.max() + 1):
            numbers = np.flatnonzero(among & (self.sources == source))
            chosen[numbers[:: max(1, -(-len(numbers) // count))]] = True
        return chosen


def count_queries(queries: Sequence[Query], router: ExpertRouter) -> CountedQueries:
    """The buckets of encoded queries as the router reads them."""
    pairs = [(query["labels"], query["source"]) for query in queries]
    numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    columns: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(queries)
    order = sorted(range(len(queries)), key=lambda number: len(queries[number]["input_ids"]))  # little padding
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        parts = [torch.tensor(queries[number]["input_ids"]) for number in batch]
        input_ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        lengths = torch.tensor([len(part) for part in parts])
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        for number, buckets in zip(batch, router.buckets(input_ids, mask).numpy()):
            columns[number] = buckets[buckets != router.num_buckets]
    return CountedQueries(
        rows=np.repeat(np.arange(len(queries)), [len(part) for part in columns]),
        columns=np.concatenate(columns),
        labels=np.array([query["labels"] for query in queries]),
        sources=np.array([numbers[pair] for pair in pairs]),
        generated=np.array([query["generated"] for query in queries]),
        originals=np.array([query.get("original", number) for number, query in enumerate(queries)]),
        num_experts=len(router.head.bias),
        num_buckets=router.num_buckets,
    )


def likely_mislabelled(data: CountedQueries, logits: np.ndarray) -> np.ndarray:
    """(B,) mask of queries that (B, N) cross-validated logits confidently give to another expert.

    They are left out of the counts where their expert keeps more than half of its queries.
    """
    sure = probabilities(logits, fit_temperature(logits, data.labels)).max(-1) > MISLABELLED
    mislabelled = sure & (logits.argmax(-1) != data.labels)
    sizes, doubtful = Counter(data.labels.tolist()), Counter(data.labels[mislabelled].tolist())
    half = [expert for expert in sizes if 2 * doubtful[expert] > sizes[expert]]
    return mislabelled & ~np.isin(data.labels, half)
