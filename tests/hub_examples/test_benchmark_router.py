"""The parts of the router's benchmark say what they claim."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "hub_examples"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import benchmark_router

    return benchmark_router


def test_every_source_is_left_out_once(benchmark):
    rows = [{"text": str(n), "expert": "a", "source": "xyz"[n % 3], "generated": False} for n in range(9)]
    rounds = benchmark.experiments(rows, [])
    assert [{row["source"] for row in test} for _, test in rounds] == [{"x"}, {"y"}, {"z"}]
    for train, test in rounds:
        assert not {row["source"] for row in train} & {row["source"] for row in test}
    assert benchmark.experiments(rows, rows[:1]) == [(rows, rows[:1])]


def test_generated_queries_train_and_are_not_tested(benchmark):
    rows = [{"text": str(n), "expert": "a", "source": "xy"[n % 2], "generated": n % 2 == 1} for n in range(4)]
    assert benchmark.experiments(rows, []) == [([rows[1], rows[3]], [rows[0], rows[2]])]


def test_floors_learn_words_that_tell_experts_apart(benchmark):
    rows = [{"text": f"sum of {n} apples", "expert": "math", "source": "m"} for n in range(8)]
    rows += [{"text": f"def f{n}(): return", "expert": "code", "source": "c"} for n in range(8)]
    test = [
        {"text": "the sum of pears", "expert": "math", "source": "t"},
        {"text": "def g(): pass", "expert": "code", "source": "u"},
    ]
    for floor in (benchmark.naive_bayes(["math", "code"]), benchmark.tf_idf(["math", "code"])):
        result = benchmark.measure(floor, [(rows, test)], ["math", "code"])
        assert result["sources"] == {"t": 1, "u": 1} and result["macro"] == 1 and 0 <= result["ece"] < 0.5
    json.dumps(result)
