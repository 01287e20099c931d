"""What the terminal, the model card and the picture say of a router."""

import io
import sys

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCardData
from rich.console import Console

from conversion.router.evaluation_report import card_section, eval_results, evaluation_tables, plot_confusion, summary
from conversion.router.metrics import MIN_CALIBRATION_QUERIES, NUM_BINS

from .conftest import calibrated, metrics_of


def test_too_few_queries_to_measure_calibration():
    """It is said, instead of a number that means nothing; one query more, and there is one."""
    logits, labels = calibrated(MIN_CALIBRATION_QUERIES, 2.0)
    few = metrics_of(logits[1:], labels[1:])
    assert few["calibration"] == {
        **{"temperature": 1.0, "bins": NUM_BINS},
        **dict.fromkeys(("ece_before", "ece", "ece_by_source", "loss_before", "loss")),
    }
    assert "calibration error not measured: fewer than 50 queries" in summary(few)
    assert "too few (at least 50 are needed)" in card_section(few, has_plot=False)
    enough = metrics_of(logits, labels)
    assert f"calibration error {enough['calibration']['ece']:.3f} (" in summary(enough)
    assert f"is {enough['calibration']['ece']:.3f}, without a temperature" in card_section(enough, has_plot=False)


def text_of(metrics) -> str:
    file = io.StringIO()
    Console(file=file, width=200).print(*evaluation_tables(metrics), sep="\n")
    return file.getvalue()


def test_terminal_shows_everything():
    logits, labels = calibrated(60, 1.0)
    metrics = metrics_of(logits, labels, [f"source [{number % 30}]" for number in range(60)])
    text = text_of(metrics)
    assert "source [7]" in text and "10 more, see router_eval.json" in text
    assert "math" in text and "picked math" not in text and "router decides" in text
    assert f"calibration error {metrics['calibration']['ece']:.3f} with the temperature of 1" in text


def test_the_cards_section():
    metrics = metrics_of(np.eye(3)[[0, 0, 0, 1]], np.array([0, 0, 1, 1]), ["gsm8k", "a|b", "gsm8k", "gsm8k"])
    assert "router_confusion.png" not in card_section(metrics, has_plot=False)
    section = card_section(metrics, has_plot=True)
    for line in (
        "## Router",
        "| instruct | 2 | 0 | 0 | 100.0% |",
        "| code | 0 | 0 | 0 | - |",
        "](router_confusion.png)",
        "| gsm8k | 3 | 66.7% |",
        "| a&#124;b | 1 |",
        "75.0% of 4 evaluation queries",
        "router['threshold']",
    ):
        assert line in section, line


@pytest.mark.parametrize(
    ("train_data", "eval_data", "dataset"),
    [
        (["train.jsonl"], ["user/queries:test"], ("user/queries", "user/queries:test", "test")),
        (["user/queries"], None, ("user/queries", "user/queries, a part held out", "train")),
        (["train.jsonl"], ["user/queries", "eval.jsonl"], ("generator", "user/queries, eval.jsonl", None)),
        (["a.csv", "b.csv"], None, ("generator", "a.csv, b.csv, a part held out", None)),
    ],
)
def test_results_for_the_hub(train_data, eval_data, dataset):
    """They are what the Hub's own classes read back, and few queries have no calibration error there."""
    logits, labels = np.eye(3)[[0, 0, 1]], np.array([0, 1, 1])
    metrics = metrics_of(np.tile(logits, (30, 1)), np.tile(labels, 30)) | {
        "training": {"train_data": train_data, "eval_data": eval_data}
    }
    data = ModelCardData(model_name="routed", eval_results=eval_results(metrics))
    results = ModelCardData(**yaml.safe_load(data.to_yaml())).eval_results
    assert {result.metric_type: result.metric_value for result in results} == {
        "accuracy": metrics["accuracy"],
        "recall": metrics["macro_accuracy"],
        "ece": metrics["calibration"]["ece"],
    }
    for result in results:
        assert (result.dataset_type, result.dataset_name, result.dataset_split) == dataset
    metrics["calibration"] = metrics_of(logits, labels)["calibration"]
    assert {result.metric_type for result in eval_results(metrics)} == {"accuracy", "recall"}


def test_picture(tmp_path, monkeypatch):
    """The picture has the counts; without matplotlib the error says how to get it."""
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn, text = [], axes.text

    def draw(self, x, y, label, **style):
        drawn.append((y, x, label))
        return text(self, x, y, label, **style)

    monkeypatch.setattr(axes, "text", draw)
    logits, labels = np.eye(3)[[0, 0, 0, 1]], np.array([0, 0, 1, 1])
    plot_confusion(metrics_of(logits, labels), tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert {(0, 0, "2"), (1, 0, "1"), (1, 1, "1"), (2, 2, "0")} <= set(drawn) and len(drawn) == 9
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install 'channel-merged\\[plot\\]'"):
        plot_confusion(metrics_of(logits, labels), tmp_path / "other.png")
