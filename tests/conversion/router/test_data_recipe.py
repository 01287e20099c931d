"""Fine-tuning data of any columns become router queries, and what does not fit is named."""

import json

import pytest

from conversion.router.data_recipe import read_recipe

ALPACA = [{"instruction": "Add.", "input": "1 2"}, {"instruction": "Name a bird.", "input": ""}]
CHATS = [
    {"turns": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]},
    {"turns": []},
    {"turns": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]},
]


@pytest.fixture
def recipe(tmp_path, write_jsonl):
    write_jsonl(tmp_path / "alpaca.jsonl", ALPACA)
    write_jsonl(tmp_path / "chats.jsonl", CHATS)
    write_jsonl(tmp_path / "many.jsonl", [{"q": str(number)} for number in range(10)])

    def read(recipe):
        file = tmp_path / "data.yaml"
        file.write_text(recipe if isinstance(recipe, str) else json.dumps(recipe))
        return read_recipe(file)

    return read


def test_columns_conversations_and_descriptions(recipe):
    parts = recipe(
        {
            "datasets": [
                {"path": "alpaca.jsonl", "column": ["instruction", "input"], "expert": "a"},
                {"path": "chats.jsonl", "column": "turns", "expert": "b"},
                {"path": "many.jsonl", "column": "q", "expert": "a", "max": 2},
            ],
            "experts": {"c": {"description": "Birds.", "examples": ["Do owls sleep?"]}},
        }
    )
    rows = [row for _, part in parts for row in part]
    assert [row["text"] for row in rows if "text" in row] == [
        *("Add.\n\n1 2", "Name a bird.", "0", "5", "Birds.", "Do owls sleep?")
    ]
    assert [row["messages"][-1]["content"] for row in rows if "messages" in row] == ["Hello.", "Why?"]
    assert rows[2]["messages"][0] == {"role": "user", "content": "Hi."}
    assert [row["expert"] for row in rows] == list("aabbaacc")
    assert [row["source"] for row in rows] == ["alpaca"] * 2 + ["chats"] * 2 + ["many"] * 2 + ["descriptions"] * 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "expected the keys 'datasets'"),
        ({"dataset": []}, "expected the keys 'datasets'"),
        ({"datasets": {}, "experts": []}, "datasets must be a list|expected the keys"),
        ({"datasets": [{"path": "alpaca.jsonl"}]}, "dataset 1 is .*, expected path, expert"),
        ({"datasets": [{"path": "alpaca.jsonl", "expert": "a", "colum": "x"}]}, "dataset 1 is .*, expected path"),
        (
            {"datasets": [{"path": "alpaca.jsonl", "expert": "a"}]},
            r"has the columns \['instruction', 'input'\], expected",
        ),
        (
            {"datasets": [{"path": "many.jsonl", "column": "q", "expert": "a", "max": 0}]},
            "max is 0, expected a number",
        ),
        ({"datasets": [{"path": "some/data", "expert": "a", "streaming": True}]}, "streaming needs max"),
        ({"experts": {"c": {"descriptions": "Birds."}}}, "expert c is .*, expected description and examples"),
        ({"experts": {"c": {"examples": [5]}}}, "expert c: 5 is no text"),
    ],
)
def test_what_does_not_fit(recipe, bad, message):
    with pytest.raises(ValueError, match=message):
        recipe(bad)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_recipe(tmp_path / "none.yaml")
