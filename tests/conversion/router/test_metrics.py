"""Accuracy, thresholds and calibration of a router, each against its definition."""

import json

import numpy as np
import pytest
from transformers import EvalPrediction

from conversion.router.metrics import (
    NUM_BINS,
    THRESHOLDS,
    calibration,
    confusion_matrix,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    probabilities,
    recalls,
    router_metrics,
    threshold_table,
)

from .conftest import EXPERTS, calibrated, metrics_of


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


def test_calibration_by_source():
    """The mean of the errors of each source that has enough queries, at the temperature that is given."""
    logits, labels = calibrated(130, 3.0)
    sources = ["a"] * 60 + ["b"] * 60 + ["few"] * 10
    measured = calibration(logits, labels, sources, 3.0)
    parts = [expected_calibration_error(logits[rows], labels[rows], 3.0) for rows in (slice(60), slice(60, 120))]
    assert measured["ece_by_source"] == pytest.approx(sum(parts) / 2)
    assert measured["ece"] == expected_calibration_error(logits, labels, 3.0)
    assert measured["loss"] == negative_log_likelihood(logits, labels, 3.0) < measured["loss_before"]
    assert measured["temperature"] == 3.0


@pytest.mark.parametrize("fallback", ["doubt", "likely"])
def test_a_doubtful_query_of_another_expert(fallback):
    """The default expert answers a query that is hardly its own only where any doubt is enough."""
    chances = np.array([[0.05, 0.35, 0.6], [0.35, 0.05, 0.6]])
    (row,) = [row for row in threshold_table(np.array([2, 0]), chances, 0, fallback) if row["threshold"] == 0.7]
    assert row["coverage"] == (0.0 if fallback == "doubt" else 0.5)
    assert row["accuracy_with_default"] == (0.5 if fallback == "doubt" else 1.0)


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
