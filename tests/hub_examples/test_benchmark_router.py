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
    rows = [{"text": str(n), "expert": "a", "source": "xyz"[n % 3]} for n in range(9)]
    rounds = benchmark.experiments(rows, [])
    assert [{row["source"] for row in test} for _, test in rounds] == [{"x"}, {"y"}, {"z"}]
    for train, test in rounds:
        assert not {row["source"] for row in train} & {row["source"] for row in test}
    assert benchmark.experiments(rows, rows[:1]) == [(rows, rows[:1])]


def test_styles_are_added_as_in_training(benchmark):
    rows = [{"text": str(n), "expert": "math", "source": "x"} for n in range(3)]
    rows += [{"text": str(n), "expert": "law", "source": "y"} for n in range(5)]
    more = benchmark.add_styles(rows, 1000, 0, ["law", "math"])
    assert more[:8] == rows and [row["expert"] for row in more[8:]] == ["math"] * 9
    assert benchmark.add_styles(rows, 0, 0, ["law", "math"]) == rows


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
