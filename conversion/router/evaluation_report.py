"""The evaluation of a router for readers: tables, a picture, a section of the model card, results for the Hub."""

from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult
from rich.markup import escape
from rich.table import Table

from conversion.io import markdown
from conversion.io.options import format_share
from conversion.io.wording import first_names
from conversion.router.metrics import MIN_CALIBRATION_QUERIES

MAX_SOURCES = 20  # in a table for readers; the JSON has all
METRICS_FILE = "router_eval.json"
PLOT_FILE = "router_confusion.png"
ROUTER_SECTION = "## Router"
OTHER_DATA = "generator"  # what the Hub calls data that are not one of its datasets


def confusion_rows(metrics: dict[str, Any], picked: str = "picked ") -> tuple[list[str], list[list[str]]]:
    """Head and rows of the confusion matrix; `picked` stands before the columns' names."""
    names = metrics["expert_names"]
    head = ["right expert", *(f"{picked}{name}" for name in names), "recall"]
    matrix = metrics["confusion_matrix"]
    return head, [[name, *map(str, row), format_share(metrics["recall"][name])] for name, row in zip(names, matrix)]


def source_rows(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of sources, those with the most queries."""
    rows = []
    sources = sorted(metrics["sources"].items(), key=lambda item: -item[1]["queries"])
    for source, values in sources[:MAX_SOURCES]:
        picked = sorted(values["picked"].items(), key=lambda item: -item[1])
        text = ", ".join(f"{name} {count}" for name, count in picked if count)
        rows.append(
            [
                source,
                f"{values['queries']:,}",
                format_share(values["accuracy"]),
                format_share(values["probability"]),
                text,
            ]
        )
    if more := len(sources) - len(rows):
        rows.append([f"{more} more, see {METRICS_FILE}", "", "", "", ""])
    return ["source", "queries", "accuracy", "mean probability", "picked"], rows


def threshold_rows(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of thresholds."""
    keys = ("coverage", "accuracy", "accuracy_with_default")
    rows = [[f"{row['threshold']:g}", *(format_share(row[key]) for key in keys)] for row in metrics["thresholds"]]
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
            f"temperature {calibration['temperature']:.3g}, calibration error not measured: fewer than "
            f"{MIN_CALIBRATION_QUERIES} queries"
        )
    by_source = calibration["ece_by_source"]
    return (
        f"calibration error {calibration['ece']:.3f}"
        + ("" if by_source is None else f" ({by_source:.3f} by source)")
        + f" with the temperature of {calibration['temperature']:.3g}, and {calibration['ece_before']:.3f} without"
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
    """The model card's section about the router, in Markdown; of evaluations of older checkpoints as well."""
    calibration, training = metrics["calibration"], metrics["training"]
    error = (
        f"They are too few (at least {MIN_CALIBRATION_QUERIES} are needed) to say how far off the probabilities are."
        if calibration["ece"] is None
        else f"On the evaluation queries the expected calibration error ({calibration['bins']} bins) is "
        f"{calibration['ece']:.3f}, without a temperature {calibration['ece_before']:.3f}."
    )
    in_doubt = (
        f"Where the default expert is itself more probable than {1 - metrics['threshold']:g}, it"
        if metrics.get("fallback") == "likely"
        else f"Below a probability of {metrics['threshold']:g} the default expert"
    )
    threshold = (
        f"{in_doubt} answers (`config.router['threshold']`)."
        if metrics["threshold"]
        else "Its pick always answers; a threshold in `config.router['threshold']` would hand doubtful queries to the "
        "default expert:"
    )
    generated = training.get("generated_queries")
    fitted_to = training.get("temperature_from", "the evaluation queries, with cross-fitted errors")
    parts = [
        ROUTER_SECTION,
        f"The router was trained on {training['queries']:,} queries"
        + (f" and {generated:,} generated ones" if generated else "")
        + f". It sends {metrics['accuracy']:.1%} of "
        f"{metrics['queries']:,} evaluation queries to the right expert (mean of the experts' recalls "
        f"{metrics['macro_accuracy']:.1%}).",
        markdown.table(*confusion_rows(metrics)),
        *([f"![Queries by right and picked expert]({PLOT_FILE})"] if has_plot else []),
        markdown.table(*source_rows(metrics)),
        f"Its logits are divided by a temperature of {calibration['temperature']:.3g}, which was fitted to "
        f"{fitted_to}. {error} {threshold}",
        markdown.table(*threshold_rows(metrics)),
    ]
    return "\n\n".join(parts)


def eval_results(metrics: dict[str, Any]) -> list[EvalResult]:
    """The evaluation as the Hub shows it beside a model."""
    training = metrics["training"]
    held_out = training["eval_data"] is None
    data = training["train_data"] if held_out else training["eval_data"]
    repository, _, split = data[0].partition(":")
    on_hub = len(data) == 1 and "/" in repository
    common = {
        "task_type": "text-classification",
        "task_name": "Routing: which expert answers a prompt",
        "dataset_type": repository if on_hub else OTHER_DATA,
        "dataset_name": first_names(data, MAX_SOURCES) + (", a part held out" if held_out else ""),
        "dataset_split": (split or "train") if on_hub else None,
    }
    measured = {
        ("accuracy", "Accuracy"): metrics["accuracy"],
        ("recall", "Macro accuracy (mean of the experts' recalls)"): metrics["macro_accuracy"],
        ("ece", "Expected calibration error"): metrics["calibration"]["ece"],
    }
    return [
        EvalResult(metric_type=metric, metric_name=name, metric_value=value, **common)
        for (metric, name), value in measured.items()
        if value is not None
    ]
