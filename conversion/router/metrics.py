"""How good a router is, and how sure it may be: numbers, tables and a picture of held-out queries.

Shapes: B queries, N experts. Logits are float (B, N), labels int (B,), both numpy arrays. The picked expert is
the most probable one, whatever the threshold says.

Expected calibration error (ECE): queries are put into 15 bins of equal width by the probability of the picked expert;
ECE is the mean over queries of |share of right picks in the bin - mean probability in the bin|. The temperature is
fitted to the evaluation queries, so what it achieves is measured by cross-fitting: each query's probabilities are at a
temperature that was fitted to the queries of the other folds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table
from transformers import EvalPrediction

NUM_BINS = 15
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TEMPERATURES = (1e-2, 1e2)  # what a fit may give
CALIBRATION_FOLDS = 5
MIN_CALIBRATION_QUERIES = 50  # on fewer, neither a temperature nor an error of probabilities says anything
MAX_SOURCES = 20  # in a table for readers; the JSON has all
METRICS_FILE = "router_eval.json"
PLOT_FILE = "router_confusion.png"
ROUTER_SECTION = "## Router"


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


def useful_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """`fit_temperature` where that lowers the calibration error, else 1.0: few queries, all right, tell little."""
    temperature = fit_temperature(logits, labels)
    errors = [expected_calibration_error(logits, labels, value) for value in (1.0, temperature)]
    return temperature if errors[1] < errors[0] else 1.0


def cross_fitted_temperatures(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each query `useful_temperature` of the queries in other folds than its own: (B, 1).

    Every expert's queries go to the folds in turn, in their order.
    """
    folds = np.empty(len(labels), dtype=int)
    folds[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % CALIBRATION_FOLDS
    temperatures = np.empty((len(labels), 1))
    for fold in range(CALIBRATION_FOLDS):
        left = folds != fold
        temperatures[~left] = useful_temperature(logits[left], labels[left])
    return temperatures


def calibration(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, Any]:
    """The temperature that was fitted to these queries, and what such a temperature achieves on others, cross-fitted.

    The calibration error and the loss (mean of -log(probability of the right expert)) are None for fewer than
    `MIN_CALIBRATION_QUERIES`; `..._before` are those without a temperature.
    """
    errors = dict.fromkeys(("ece_before", "ece", "loss_before", "loss"))
    if len(labels) >= MIN_CALIBRATION_QUERIES:
        scaled = logits / cross_fitted_temperatures(logits, labels)
        errors = {
            "ece_before": expected_calibration_error(logits, labels),
            "ece": expected_calibration_error(scaled, labels),
            "loss_before": negative_log_likelihood(logits, labels),
            "loss": negative_log_likelihood(scaled, labels),
        }
    return {"temperature": temperature, "bins": NUM_BINS, "folds": CALIBRATION_FOLDS, **errors}


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
        router: `temperature` (fitted to these queries), `threshold` and `default_expert`, as the checkpoint's config
            has them.
    """
    temperature = router["temperature"]
    picked, names = logits.argmax(-1), expert_names
    matrix = confusion_matrix(labels, picked, len(names))
    recall = recalls(matrix)
    confidence = probabilities(logits, temperature).max(-1)
    return {
        "expert_names": names,
        "queries": len(labels),
        "accuracy": float((picked == labels).mean()),
        "macro_accuracy": mean_of_known(recall),
        "recall": dict(zip(names, recall)),
        "confusion_matrix": matrix.tolist(),  # rows: the right expert, columns: the one that the router picked
        "sources": source_table(labels, picked, confidence, sources, names),
        "calibration": calibration(logits, labels, temperature),
        "threshold": router["threshold"],
        "thresholds": threshold_table(labels, picked, confidence, names.index(router["default_expert"])),
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
    labels: np.ndarray, picked: np.ndarray, confidence: np.ndarray, default: int
) -> list[dict[str, float | None]]:
    """What each threshold would do: the share of queries that the router decides (coverage), the share of right picks
    among them, and among all queries where the default expert answers the rest."""
    rows = []
    for threshold in THRESHOLDS:
        sure, right = confidence >= threshold, picked == labels
        rows.append(
            {
                "threshold": threshold,
                "coverage": float(sure.mean()),
                "accuracy": float(right[sure].mean()) if sure.any() else None,
                "accuracy_with_default": float(np.where(sure, right, labels == default).mean()),
            }
        )
    return rows


def share(value: float | None) -> str:
    """A share for a reader."""
    return "-" if value is None else f"{value:.1%}"


def confusion_rows(metrics: dict[str, Any], picked: str = "picked ") -> tuple[list[str], list[list[str]]]:
    """Head and rows of the confusion matrix; `picked` stands before the columns' names."""
    names = metrics["expert_names"]
    head = ["right expert", *(f"{picked}{name}" for name in names), "recall"]
    matrix = metrics["confusion_matrix"]
    return head, [[name, *map(str, row), share(metrics["recall"][name])] for name, row in zip(names, matrix)]


def source_rows(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of sources, those with the most queries."""
    rows = []
    sources = sorted(metrics["sources"].items(), key=lambda item: -item[1]["queries"])
    for source, values in sources[:MAX_SOURCES]:
        picked = sorted(values["picked"].items(), key=lambda item: -item[1])
        text = ", ".join(f"{name} {count}" for name, count in picked if count)
        rows.append([source, f"{values['queries']:,}", share(values["accuracy"]), share(values["probability"]), text])
    if more := len(sources) - len(rows):
        rows.append([f"{more} more, see {METRICS_FILE}", "", "", "", ""])
    return ["source", "queries", "accuracy", "mean probability", "picked"], rows


def threshold_rows(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of thresholds."""
    keys = ("coverage", "accuracy", "accuracy_with_default")
    rows = [[f"{row['threshold']:g}", *(share(row[key]) for key in keys)] for row in metrics["thresholds"]]
    return ["threshold", "router decides", "right of those", "right of all, the rest to the default"], rows


def summary(metrics: dict[str, Any]) -> str:
    """The evaluation in one line."""
    return (
        f"accuracy {metrics['accuracy']:.3f}, macro accuracy {metrics['macro_accuracy']:.3f} on "
        f"{metrics['queries']:,} queries; {calibration_summary(metrics['calibration'])}"
    )


def calibration_summary(calibration: dict[str, Any]) -> str:
    """The calibration in a clause."""
    if calibration["ece"] is None:
        return (
            f"temperature {calibration['temperature']:.3g}, no calibration error: fewer than "
            f"{MIN_CALIBRATION_QUERIES} queries"
        )
    return (
        f"calibration error {calibration['ece']:.3f} ({calibration['folds']}-fold cross-fitted) with the temperature, "
        f"now {calibration['temperature']:.3g}, and {calibration['ece_before']:.3f} without"
    )


def evaluation_tables(metrics: dict[str, Any]) -> list[Table | str]:
    """The evaluation for a terminal, as rich renderables."""
    parts: list[Table | str] = []
    for title, (head, rows) in (
        ("Queries by right expert (row) and picked expert (column)", confusion_rows(metrics, picked="")),
        ("\nQueries by source", source_rows(metrics)),
        ("\nWhat a threshold would do", threshold_rows(metrics)),
    ):
        table = Table(head[0])
        for name in head[1:]:
            table.add_column(escape(name), justify="left" if name == "picked" else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        parts += [title, table]
    return [*parts, summary(metrics)]


def plot_confusion(metrics: dict[str, Any], file: str | Path) -> None:
    """Draw the confusion matrix: counts, coloured by their share of the right expert's queries.

    Raises:
        ValueError: matplotlib is not installed, or it cannot write files of this suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a plot needs matplotlib: pip install 'channel-merged[plot]'") from error
    matrix, names = np.array(metrics["confusion_matrix"]), metrics["expert_names"]
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = 3 + 0.7 * len(names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*matrix.shape):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("picked expert")
    axes.set_ylabel("right expert")
    axes.set_title(f"Router on {metrics['queries']:,} queries: {metrics['accuracy']:.1%} right")
    figure.colorbar(image, ax=axes, label="share of the right expert's queries")
    figure.savefig(file, dpi=110)


def card_section(metrics: dict[str, Any], has_plot: bool) -> str:
    """The model card's section about the router, in Markdown."""
    calibration = metrics["calibration"]
    error = (
        f"They are too few (at least {MIN_CALIBRATION_QUERIES} are needed) to say how far off the probabilities are."
        if calibration["ece"] is None
        else f"On queries that it is not fitted to, the expected calibration error ({calibration['bins']} bins) is "
        f"{calibration['ece']:.3f}, without a temperature {calibration['ece_before']:.3f}: measured by "
        f"{calibration['folds']}-fold cross-fitting. The tables show the fitted queries themselves."
    )
    threshold = (
        f"Below a probability of {metrics['threshold']:g} the default expert answers (`config.router['threshold']`)."
        if metrics["threshold"]
        else "Its pick always answers; a threshold in `config.router['threshold']` would hand doubtful queries to the "
        "default expert:"
    )
    parts = [
        ROUTER_SECTION,
        f"The router was trained on {metrics['training']['queries']:,} queries. It sends {metrics['accuracy']:.1%} of "
        f"{metrics['queries']:,} evaluation queries to the right expert (mean of the experts' recalls "
        f"{metrics['macro_accuracy']:.1%}).",
        markdown_table(*confusion_rows(metrics)),
        *([f"![Queries by right and picked expert]({PLOT_FILE})"] if has_plot else []),
        markdown_table(*source_rows(metrics)),
        f"Its logits are divided by a temperature of {calibration['temperature']:.3g}, which was fitted to the "
        f"evaluation queries. {error} {threshold}",
        markdown_table(*threshold_rows(metrics)),
    ]
    return "\n\n".join(parts)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(' '.join(cell.split()).replace('|', '&#124;') for cell in line)} |" for line in lines
    )
