"""How good a router is, and how sure it may be: the numbers of held-out queries.

Shapes: B queries, N experts. Logits are float (B, N), labels int (B,), both numpy arrays. The picked expert is
the most probable one, whatever the threshold says.

Expected calibration error (ECE): queries are put into 15 bins of equal width by the probability of the picked expert;
ECE is the mean over queries of |share of right picks in the bin - mean probability in the bin|. The temperature is
fitted to training queries of left-out sources (see `doubt`), never to those that are evaluated.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction

NUM_BINS = 15
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TEMPERATURES = (1e-2, 1e2)  # what a fit may give
MIN_CALIBRATION_QUERIES = 50  # on fewer, an error of probabilities says nothing
MIN_SOURCE_QUERIES = 20  # the same of one source


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Softmax of logits / temperature: (B, N) float64."""
    scaled = logits.astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Mean of -log(probability of the right expert)."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(-1, keepdims=True)
    return float((np.log(np.exp(scaled).sum(-1)) - scaled[np.arange(len(labels)), labels]).mean())


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """ECE, as defined above."""
    chances = probabilities(logits, temperature)
    confidence, right = chances.max(-1), chances.argmax(-1) == labels
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=right, minlength=NUM_BINS) - np.bincount(bins, confidence, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that makes the probabilities of held-out queries most likely.

    The targets are smoothed as Platt did: of B queries the right expert gets (B + 1) / (B + N), every other one
    1 / (B + N). So a router that errs nowhere on a few queries does not become certain.

    Returns:
        Within 0.01 to 100; 1.0 where all experts have the same logits.
    """
    count, num_experts = logits.shape
    scores = logits.astype(np.float64)
    scores -= scores.mean(-1, keepdims=True)
    if not scores.any():
        return 1.0
    right = scores[np.arange(count), labels]
    # The mean score under the smoothed targets; the scores of a query sum to zero.
    target = (count * right / (count + num_experts)).mean()
    # The loss is convex in 1 / temperature: its slope is the mean score under the probabilities minus `target`.
    low, high = (1 / temperature for temperature in reversed(TEMPERATURES))
    for _ in range(60):
        middle = (low * high) ** 0.5
        if (probabilities(scores, 1 / middle) * scores).sum(-1).mean() < target:
            low = middle
        else:
            high = middle
    return float(1 / middle)


def calibration(
    logits: np.ndarray, labels: np.ndarray, sources: Sequence[str], temperature: float
) -> dict[str, float | int | None]:
    """What a temperature achieves on queries that it was not fitted to.

    The calibration error, its mean over the sources, and the loss (mean of -log(probability of the right expert)) are
    None for fewer than `MIN_CALIBRATION_QUERIES`, of which a source must have `MIN_SOURCE_QUERIES`; `..._before` are
    those without a temperature.
    """
    errors: dict[str, float | None] = dict.fromkeys(("ece_before", "ece", "ece_by_source", "loss_before", "loss"))
    if len(labels) >= MIN_CALIBRATION_QUERIES:
        errors |= {
            "ece_before": expected_calibration_error(logits, labels),
            "ece": expected_calibration_error(logits, labels, temperature),
            "loss_before": negative_log_likelihood(logits, labels),
            "loss": negative_log_likelihood(logits, labels, temperature),
        }
        places = np.asarray(sources, dtype=object)
        masks = [places == source for source in dict.fromkeys(sources)]
        by_source = [
            expected_calibration_error(logits[rows], labels[rows], temperature)
            for rows in masks
            if rows.sum() >= MIN_SOURCE_QUERIES
        ]
        errors["ece_by_source"] = sum(by_source) / len(by_source) if by_source else None
    return {"temperature": temperature, "bins": NUM_BINS, **errors}


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_experts: int) -> np.ndarray:
    """Queries by right expert (row) and picked expert (column): (N, N) int64, from two (B,) arrays."""
    matrix = np.zeros((num_experts, num_experts), dtype=np.int64)
    np.add.at(matrix, (labels, predictions), 1)
    return matrix


def recalls(matrix: np.ndarray) -> list[float | None]:
    """Share of each expert's queries that went to it; None where there are none."""
    totals = matrix.sum(1)
    return [float(matrix[e, e] / totals[e]) if totals[e] else None for e in range(len(matrix))]


def mean_of_known(values: Sequence[float | None]) -> float:
    """Mean of the values that are not None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def router_metrics(prediction: EvalPrediction, expert_names: list[str]) -> dict[str, float]:
    """Accuracy, macro accuracy (the mean of the experts' recalls) and every expert's recall, for the Trainer."""
    matrix = confusion_matrix(prediction.label_ids, prediction.predictions.argmax(-1), len(expert_names))
    recall = recalls(matrix)
    return {
        "accuracy": float(matrix.trace() / matrix.sum()),
        "macro_accuracy": mean_of_known(recall),
        **{f"recall_{name}": value for name, value in zip(expert_names, recall) if value is not None},
    }


def evaluate_router(
    logits: np.ndarray,
    labels: np.ndarray,
    sources: Sequence[str],
    expert_names: list[str],
    router: dict[str, Any],
) -> dict[str, Any]:
    """Everything that is reported of a router, as JSON types.

    Args:
        sources: where each query is from.
        router: `temperature` (not fitted to these queries), `threshold`, `fallback` and `default_expert`, as the
            checkpoint's config has them.
    """
    temperature = router["temperature"]
    picked, names = logits.argmax(-1), expert_names
    matrix = confusion_matrix(labels, picked, len(names))
    recall = recalls(matrix)
    chances = probabilities(logits, temperature)
    return {
        "expert_names": names,
        "queries": len(labels),
        "accuracy": float((picked == labels).mean()),
        "macro_accuracy": mean_of_known(recall),
        "recall": dict(zip(names, recall)),
        "confusion_matrix": matrix.tolist(),  # rows: the right expert, columns: the one that the router picked
        "sources": source_table(labels, picked, chances.max(-1), sources, names),
        "calibration": calibration(logits, labels, sources, temperature),
        "threshold": router["threshold"],
        "fallback": router["fallback"],
        "thresholds": threshold_table(labels, chances, names.index(router["default_expert"]), router["fallback"]),
    }


def source_table(
    labels: np.ndarray, picked: np.ndarray, confidence: np.ndarray, sources: Sequence[str], expert_names: list[str]
) -> dict[str, dict[str, Any]]:
    """Of each source: its queries, how many the right expert got, how sure the router was, and whom it picked."""
    places = np.asarray(sources, dtype=object)
    table = {}
    for source in dict.fromkeys(sources):
        rows = places == source
        counts = np.bincount(picked[rows], minlength=len(expert_names)).tolist()
        table[source] = {
            "queries": int(rows.sum()),
            "accuracy": float((picked == labels)[rows].mean()),
            "probability": float(confidence[rows].mean()),
            "picked": dict(zip(expert_names, counts)),
        }
    return table


def threshold_table(
    labels: np.ndarray, chances: np.ndarray, default: int, fallback: str
) -> list[dict[str, float | None]]:
    """What each threshold would do: the share of queries that the router decides (coverage), the share of right picks
    among them, and among all queries where the default expert answers the rest.

    Args:
        chances: (B, N) probabilities.
        fallback: when the default expert answers, as the config has it.
    """
    rows = []
    for threshold in THRESHOLDS:
        likely = fallback == "likely"
        sure = chances[:, default] <= 1 - threshold if likely else chances.max(-1) >= threshold
        right = chances.argmax(-1) == labels
        rows.append(
            {
                "threshold": threshold,
                "coverage": float(sure.mean()),
                "accuracy": float(right[sure].mean()) if sure.any() else None,
                "accuracy_with_default": float(np.where(sure, right, labels == default).mean()),
            }
        )
    return rows
