import io
import json
import sys

import numpy as np
import pytest
from rich.console import Console
from transformers import EvalPrediction

from conversion.router.evaluation_report import card_section, evaluation_tables, plot_confusion, summary
from conversion.router.metrics import (
    CALIBRATION_FOLDS,
    MIN_CALIBRATION_QUERIES,
    NUM_BINS,
    THRESHOLDS,
    calibration,
    confusion_matrix,
    cross_fitted_temperatures,
    evaluate_router,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    probabilities,
    recalls,
    router_metrics,
    useful_temperature,
)

EXPERTS = ["instruct", "math", "code"]


def calibrated(count: int, scale: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from the softmax of random logits, and those logits times `scale`: the temperature is `scale`."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(count, 3)) * 2
    chances = probabilities(logits)
    labels = (generator.random((count, 1)) > chances.cumsum(-1)).sum(-1)
    return (logits * scale).astype(np.float32), labels


def metrics_of(logits, labels, sources=None, temperature=1.0, threshold=0.0):
    sources = ["all"] * len(labels) if sources is None else sources
    router = {"temperature": temperature, "threshold": threshold, "default_expert": "instruct"}
    metrics = evaluate_router(logits, labels, sources, EXPERTS, router)
    return {**metrics, "training": {"queries": 9}}


def test_metrics_against_a_plain_count():
    labels, logits = np.array([0, 0, 0, 1, 1]), np.eye(3)[[0, 2, 0, 1, 0]]
    assert confusion_matrix(labels, logits.argmax(-1), 3).tolist() == [[2, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert recalls(confusion_matrix(labels, logits.argmax(-1), 3)) == [2 / 3, 1 / 2, None]
    metrics = router_metrics(EvalPrediction(predictions=logits, label_ids=labels), EXPERTS)
    assert metrics == pytest.approx(
        {"accuracy": 0.6, "macro_accuracy": 7 / 12, "recall_instruct": 2 / 3, "recall_math": 0.5}
    )


def test_calibration_error_against_its_definition():
    """A loop over the bins; a certain and right router has none, a certain and wrong one has all."""
    logits, labels = calibrated(500, 2.0)
    chances = probabilities(logits)
    expected = 0.0
    for number in range(NUM_BINS):
        rows = (chances.max(-1) >= number / NUM_BINS) & (chances.max(-1) < (number + 1) / NUM_BINS)
        if rows.any():
            gap = (chances.argmax(-1) == labels)[rows].mean() - chances.max(-1)[rows].mean()
            expected += rows.mean() * abs(gap)
    assert expected_calibration_error(logits, labels) == pytest.approx(expected)
    certain = np.eye(3)[[0, 1, 2]] * 1000
    assert expected_calibration_error(certain, np.array([0, 1, 2])) == 0
    assert expected_calibration_error(certain, np.array([1, 2, 0])) == 1


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_temperature_is_found(scale):
    """Logits that are `scale` times too large need the temperature `scale`; it lowers loss and calibration error."""
    logits, labels = calibrated(4000, scale)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(scale, rel=0.08)
    losses = [negative_log_likelihood(logits, labels, temperature * factor) for factor in (0.9, 1.0, 1.1)]
    assert losses[1] == min(losses)
    assert expected_calibration_error(logits, labels, temperature) < 0.03
    if scale != 1.0:
        assert expected_calibration_error(logits, labels) > 0.1


def test_temperature_of_few_queries_stays_sane():
    """Without an error, few queries allow less certainty than many; equal logits leave the temperature alone."""
    mean_certainty = []
    for count in (4, 40, 4000):
        labels = np.arange(count) % 3
        logits = np.eye(3)[labels] * 5.0
        mean_certainty.append(probabilities(logits, fit_temperature(logits, labels)).max(-1).mean())
    assert mean_certainty == pytest.approx([5 / 7, 41 / 43, 4001 / 4003], rel=1e-3)
    assert fit_temperature(np.zeros((4, 3)), np.array([0, 1, 2, 0])) == 1.0
    wrong = np.eye(3)[[1, 2, 0]]
    assert fit_temperature(wrong, np.array([0, 1, 2])) == pytest.approx(100, rel=1e-3)


def test_the_calibration_error_is_measured_where_nothing_was_fitted():
    """A loop over folds; no query's temperature has seen its label, however that is changed."""
    logits, labels = calibrated(203, 3.0)
    temperatures = cross_fitted_temperatures(logits, labels)
    folds = np.zeros(len(labels), dtype=int)
    for place, number in enumerate(sorted(range(len(labels)), key=lambda number: labels[number])):
        folds[number] = place % CALIBRATION_FOLDS
    chances = np.empty_like(logits, dtype=np.float64)
    for fold in range(CALIBRATION_FOLDS):
        temperature = useful_temperature(logits[folds != fold], labels[folds != fold])
        assert (temperatures[folds == fold] == temperature).all()
        chances[folds == fold] = probabilities(logits[folds == fold], temperature)
    stored = useful_temperature(logits, labels)
    measured = calibration(logits, labels, stored)
    assert measured["temperature"] == stored
    assert measured["ece"] == pytest.approx(expected_calibration_error(np.log(chances), labels))
    assert measured["loss"] == pytest.approx(negative_log_likelihood(np.log(chances), labels))
    assert measured["ece_before"] == expected_calibration_error(logits, labels)
    # Fitted where it is measured, the loss is the least that a temperature can give: flattery.
    assert measured["loss"] > negative_log_likelihood(logits, labels, fit_temperature(logits, labels))


def test_every_experts_queries_are_in_all_folds():
    """Sorted by expert or not: no fold is left without one of its experts, and nobody's temperature is his own."""
    logits, labels = calibrated(60, 3.0)
    order = np.argsort(labels, kind="stable")
    sorted_by_expert = cross_fitted_temperatures(logits[order], labels[order])
    assert cross_fitted_temperatures(logits, labels)[order] == pytest.approx(sorted_by_expert)
    assert len(np.unique(sorted_by_expert)) == CALIBRATION_FOLDS
    for expert in range(3):
        assert len(np.unique(sorted_by_expert[labels[order] == expert])) == CALIBRATION_FOLDS


def test_too_few_queries_to_measure_calibration():
    """It is said, instead of a number that means nothing; one query more, and there is one."""
    logits, labels = calibrated(MIN_CALIBRATION_QUERIES, 2.0)
    few = metrics_of(logits[1:], labels[1:])
    assert few["calibration"] == {
        **{"temperature": 1.0, "bins": NUM_BINS, "folds": CALIBRATION_FOLDS},
        **dict.fromkeys(("ece_before", "ece", "loss_before", "loss")),
    }
    assert "no calibration error: fewer than 50 queries" in summary(few)
    assert "too few (at least 50 are needed)" in card_section(few, has_plot=False)
    enough = metrics_of(logits, labels)
    assert f"calibration error {enough['calibration']['ece']:.3f} (5-fold cross-fitted)" in summary(enough)
    assert f"is {enough['calibration']['ece']:.3f}, without a temperature" in card_section(enough, has_plot=False)


def test_temperature_changes_no_pick():
    logits, labels = calibrated(200, 3.0)
    before, after = metrics_of(logits, labels), metrics_of(logits, labels, temperature=fit_temperature(logits, labels))
    for key in ("accuracy", "macro_accuracy", "recall", "confusion_matrix"):
        assert before[key] == after[key]


def test_report_by_source_and_threshold():
    chances = np.array([[0.9, 0.05, 0.05], [0.2, 0.6, 0.2], [0.55, 0.15, 0.3], [0.1, 0.1, 0.8]])
    labels = np.array([0, 0, 2, 2])
    metrics = metrics_of(np.log(chances), labels, ["a", "b", "a", "b"], threshold=0.5)
    assert json.loads(json.dumps(metrics)) == metrics
    assert metrics["sources"]["a"] == {
        **{"queries": 2, "accuracy": 0.5, "probability": pytest.approx(0.725)},
        "picked": {"instruct": 2, "math": 0, "code": 0},
    }
    table = {row["threshold"]: [row[key] for key in row if key != "threshold"] for row in metrics["thresholds"]}
    assert list(table) == list(THRESHOLDS)
    assert table[0.5] == [1.0, 0.5, 0.5]
    assert table[0.7] == [0.5, 1.0, 0.75]  # of the other two the default expert gets one right
    assert table[0.95] == [0.0, None, 0.5]


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
    assert f"calibration error {metrics['calibration']['ece']:.3f} (5-fold cross-fitted) with the temperature" in text


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


def test_a_temperature_that_does_not_help_is_not_used():
    """A few queries without an error would only make a sure router unsure."""
    labels = np.arange(30) % 3
    sure = np.eye(3)[labels] * 8.0
    assert fit_temperature(sure, labels) > 1.0 and useful_temperature(sure, labels) == 1.0
    unsure = np.eye(3)[labels] * 1.0
    assert useful_temperature(unsure, labels) == fit_temperature(unsure, labels) < 1.0
