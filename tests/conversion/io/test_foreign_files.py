"""What others wrote is read within limits, and refused by file, field, value and expectation."""

import json
import os

import pytest
from transformers import AutoTokenizer

from conversion.__main__ import DEBUG_VARIABLE, main
from conversion.io.foreign_files import check_counts, foreign, parse_json, read_json, read_yaml
from conversion.io.sources import find_source
from conversion.merging.plan import make_plan
from conversion.merging.recipe import parse_recipe
from conversion.router.data import load_rows, read_rows
from conversion.vocabulary.prompts import read_conversations


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"is \[\], expected a JSON object"),
        ("null", "is None, expected a JSON object"),
        ("{", "is not JSON: "),
        ("[" * 100_000, "is not JSON: maximum recursion depth"),
        ('{"a":' * 100 + "1" + "}" * 100, "is nested more than 50 levels deep"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands there twice"),
        (r'{"a": ["\ud800"]}', "which is no Unicode text"),
    ],
)
def test_json(tmp_path, text, message):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        read_json(file)
    assert str(refused.value).startswith(str(file)) and len(str(refused.value)) < 500


def test_text_that_is_none(tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_json(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="is no ordinary file"):
        read_json(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "line 5: the key 'c' stands there again, first in line 3"),
        ("a: [", "is not YAML"),
        ("[" * 100_000, "is not YAML"),
        ("? [a]\n: b\n", "is not YAML"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ('a: "\\uD800"', "which is no Unicode text"),
    ],
)
def test_yaml(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        read_yaml(file)
    assert str(file) in str(refused.value)


def test_yaml_merge_keys_are_no_duplicates(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert read_yaml(file) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}


def test_a_value_of_any_size_makes_a_short_line():
    bomb = ["x"]
    for _ in range(40):
        bomb = [bomb, bomb]
    with pytest.raises(ValueError) as refused:
        parse_recipe({"base_model": bomb, "experts": bomb})
    assert len(str(refused.value)) < 10_000


@pytest.mark.parametrize("field", ["num_hidden_layers", "n_layer", "num_experts", "vocab_size", "num_labels"])
@pytest.mark.parametrize("place", [None, "text_config"])
def test_counts(field, place):
    values = {field: 10**9}
    with pytest.raises(ValueError, match=f"config.json: {field} is 1000000000, expected at most"):
        check_counts(values if place is None else {place: values}, "config.json")
    check_counts({field: 62}, "config.json")


def test_whatever_a_library_raises_is_one_line():
    for error in (
        RecursionError("deep"),
        KeyError("x"),
        AssertionError(),
        Exception("one\n  line"),
        ValueError("value"),
    ):
        with pytest.raises(ValueError, match="^a.json: [^\n]+$"), foreign("a.json"):
            raise error
    with pytest.raises(ValueError, match=r"^a.json: it cannot be used \(TypeError: no number\)$"), foreign("a.json"):
        raise TypeError("no number")
    with pytest.raises(KeyboardInterrupt), foreign("a.json"):
        raise KeyboardInterrupt


def test_parsed_bytes_need_not_be_text():
    with pytest.raises(ValueError, match="^header is not JSON"):
        parse_json(b"\xff\xff", "header")


def test_line_separators_are_part_of_a_line(tmp_path):
    """U+2028 and the like end a line for str.splitlines, and not in a JSON text."""
    text = "one\u2028two\u0085three\x1c"
    file = tmp_path / "messages.jsonl"
    row = json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=False)
    file.write_text(f"{row}\r\n\n{row}\n", encoding="utf-8", newline="")
    assert [conversation[0]["content"] for conversation in read_conversations(file)] == [text] * 2


def test_auto_map_and_no_quantization_change_nothing(make_experts, write_recipe):
    """The code that `auto_map` names is never run: the installed family of this name is."""
    base, experts = make_experts("llama", 2)
    file = experts[0] / "config.json"
    values = json.loads(file.read_text())
    code = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    file.write_text(json.dumps({**values, "auto_map": code, "quantization_config": None}))
    make_plan(parse_recipe(write_recipe(base, experts)))
    file.write_text(json.dumps({**values, "quantization_config": ["x"]}))
    with pytest.raises(ValueError, match=r"is quantized \(unknown method\)"):
        make_plan(parse_recipe(write_recipe(base, experts)))


def test_a_leftover_adapter_config(make_experts):
    _, (model, _) = make_experts("llama", 2)
    (model / "adapter_config.json").write_text("{}")
    assert not find_source("e0", str(model), model).is_adapter
    (model / "adapter_model.safetensors").touch()
    assert find_source("e0", str(model), model).is_adapter


@pytest.mark.parametrize(("value", "shown"), [("0", False), ("false", False), ("1", True)])
def test_debug_says_yes_or_no(monkeypatch, tmp_path, capsys, value, shown):
    monkeypatch.setenv(DEBUG_VARIABLE, value)
    with pytest.raises(ValueError if shown else SystemExit):
        main(["inspect", str(tmp_path / "nowhere")])
    assert capsys.readouterr().err.count("\n") == (not shown)


@pytest.mark.parametrize("name", ["out", "out/below"])
def test_an_output_that_leads_in_a_circle(tmp_path, capsys, name):
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(tmp_path / "merged"), "--expert", "math", str(tmp_path / name)])
    assert "a symbolic link to itself" in (error := capsys.readouterr().err) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "has no rows"),
        (b"junk", "line 1 is not JSON"),
        (b"null", "line 1 has None, expected a JSON object"),
        (b'{"text": "a", "expert": "x"}\n[1]', r"line 2 has \[1\], expected a JSON object"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_router_data_that_is_none(tmp_path, text, message):
    """`datasets` names neither file nor line, and ends the process on some of them."""
    file = tmp_path / "data.jsonl"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=rf"data.jsonl,? ?.*{message}"):
        load_rows(str(file))


@pytest.mark.parametrize("indent", [None, 2])
def test_router_data_in_one_array(tmp_path, indent):
    rows = [{"text": "one\u2028two", "expert": "math"}, {"text": "three", "expert": "code"}]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert load_rows(str(file)) == [{**row, "source": "data"} for row in rows]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 3, "expert": "math"}, "row 1: text is 3, expected text"),
        ({"text": "a", "expert": ["math"]}, r"row 1: unknown expert \['math'\]"),
        ({"text": "a"}, "row 1: unknown expert None"),
        ({"messages": "x", "expert": "math"}, "row 1: messages is 'x', expected a list"),
        ({"messages": [["user", "x"]], "expert": "math"}, "row 1: messages is .* expected a list of role and content"),
    ],
)
def test_mistyped_router_data(stored, row, message):
    with pytest.raises(ValueError, match=message):
        read_rows([row], "data", AutoTokenizer.from_pretrained(stored.folder), stored.config)


def test_half_a_surrogate_pair_in_router_data(stored):
    tokenizer = AutoTokenizer.from_pretrained(stored.folder)
    (query,) = read_rows([{"text": "a \ud800", "expert": "math"}], "data", tokenizer, stored.config)
    assert query["text"] == "a \ufffd"
