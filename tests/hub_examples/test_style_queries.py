"""Generated router queries are reproducible, different, and ordinary router data."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "hub_examples"
KINDS = ("instruct", "math", "code", "chinese")


@pytest.fixture
def styles(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import style_queries

    return style_queries


@pytest.mark.parametrize("kind", KINDS)
def test_reproducible_and_different(styles, kind):
    texts = styles.style_queries(kind, 200, seed=1)
    assert texts == styles.style_queries(kind, 200, seed=1)
    assert len(set(texts)) == 200 and all(text.strip() for text in texts)
    assert texts != styles.style_queries(kind, 200, seed=2)


def test_chinese_queries_are_chinese(styles):
    texts = styles.style_queries("chinese", 100, seed=0)
    assert all(any("\u4e00" <= character <= "\u9fff" for character in text) for text in texts)


def test_names_of_experts_only_label(styles, tmp_path):
    styles.main(["a=b=code", "math=math", "--count", "5", "--output-file", str(tmp_path / "out.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["expert"] for row in rows] == ["a=b"] * 5 + ["math"] * 5 and all(row["generated"] for row in rows)
    assert [row["text"] for row in rows[:5]] == styles.style_queries("code", 5, 0)


@pytest.mark.parametrize("argument", ["math", "=math", "math=law"])
def test_an_unknown_kind_is_refused(styles, tmp_path, capsys, argument):
    with pytest.raises(SystemExit):
        styles.main([argument, "--output-file", str(tmp_path / "out.jsonl")])
    assert "is not an expert's name = one of instruct, math, code, chinese" in capsys.readouterr().err
