"""Calibration texts are what an expert reads and writes when it is served, or are refused with their row."""

import json
import logging

import pytest
import torch
from tokenizers import Regex, normalizers
from transformers import AutoTokenizer

from conversion.calibrate import calibrate
from conversion.checkpoints.merged_checkpoint import read_merged_config
from conversion.merging.calibration_file import read_calibration
from conversion.merging.plan import make_plan
from conversion.vocabulary.calibration_texts import CalibrationText, read_calibration_texts
from conversion.vocabulary.expert_tokenizer import ExpertTokenizer

from .conftest import BASE_SIZE, NUM_BASE_TOKENS, UNION, Experts, extended, model_of_size, save

ROWS = [{"prompt": "2 + 3?", "completion": "5", "expert": name} for name in ("math", "chat", "code")]


def vocabulary_of(experts: Experts, *names: str, source: str = "union"):
    return make_plan(experts.recipe(*names, tokenizer_source=source)).vocabulary


@pytest.fixture
def read(llama, tmp_path):
    """`read(rows, **keys)`: the texts of a JSONL file of these rows, by default for three experts in a union."""

    def read(rows, vocabulary=None, name="data.jsonl", **keys) -> list[CalibrationText]:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        vocabulary = vocabulary or vocabulary_of(llama, "math", "chat", "code")
        return read_calibration_texts(str(file), vocabulary, **keys)

    return read


@pytest.mark.parametrize("source", ["union", "base"])
def test_each_expert_reads_its_own_template(llama, read, source):
    """The prompt as the merged checkpoint serves it, then the answer, then the end; all in merged ids."""
    vocabulary = vocabulary_of(llama, "math", "chat", "code", source=source)
    texts = read(ROWS, vocabulary)
    assert [text.expert for text in texts] == [0, 1, 2]
    shown = {
        "math": ("[2 + 3?]</s>", "5", "</s>"),  # the base's template, for the expert has none
        "chat": ("<|im_start|>user\n2 + 3?<|im_end|>\n", "5", "<|im_end|>"),
        "code": ("\n<s>2 + 3?</s><fim>", "5", "</s>"),
    }
    for text, (name, parts) in zip(texts, shown.items(), strict=True):
        channels = vocabulary.channels[text.expert]
        tokenizer = llama.tokenizer(name)
        expected = [tokenizer.encode(part, add_special_tokens=False) for part in parts]
        assert text.input_ids == channels[torch.tensor(sum(expected, []))].tolist(), name
        assert text.answer_start == len(expected[0])


@pytest.mark.parametrize("source", ["union", "base"])
def test_prompts_are_those_of_the_merged_checkpoint(llama, read, tmp_path, source):
    """Ids of the prompts equal what `generate` gives the merged model."""
    names = ("math", "chat", "code")
    out = llama.convert(tmp_path / "out", *names, tokenizer_source=source)
    texts = read(ROWS, vocabulary_of(llama, *names, source=source))
    merged = AutoTokenizer.from_pretrained(out)
    for text, name in zip(texts, names, strict=True):
        speaker = ExpertTokenizer.of_checkpoint(out, read_merged_config(out), merged, name)
        assert text.input_ids[: text.answer_start] == speaker.encode("2 + 3?", chat=True)


def test_a_text_can_be_for_every_expert(read):
    """In each one's own template."""
    assert read([{**ROWS[0], "expert": "*"}]) == read(ROWS)


def test_a_conversations_loss_is_on_its_last_answer(llama, read):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "de")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = read([*ROWS, {"messages": messages, "expert": "chat"}])[-1]
    own = llama.tokenizer("chat")
    prompt = own.apply_chat_template(messages[:-1], tokenize=False)
    expected = own.encode(prompt + "de<|im_end|>", add_special_tokens=False)
    assert [UNION["chat"][number] for number in expected] == text.input_ids
    assert len(text.input_ids) - text.answer_start == 3


SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q {{ m['content'] }} A:{% else %} {{ m['content'] }};"
    "{% endif %}{% endfor %}"
)
TURNS = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
USER_ONLY = "{% for m in messages %}{{ m['content'] if m['role'] == 'user' else raise_exception('no') }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        (SPACED, "yes", "Q q A:| yes</s>"),
        (SPACED, "\nyes", "Q q A:|\nyes</s>"),
        (TURNS, "yes", "q||yes</s>"),
        (USER_ONLY, "yes", "q|yes</s>"),
        (None, "yes", "q|yes</s>"),
    ],
)
def test_white_space_before_an_answer(llama, read, tmp_path, template, answer, expected):
    """It is the template's, unless the answer begins with some; a text without a template stands as it is."""
    base = save(model_of_size("llama", BASE_SIZE, 0), extended(template=template), tmp_path / "base")
    vocabulary = vocabulary_of(Experts(base, llama.folders), "math", "small")
    rows = [{"prompt": "q", "completion": answer, "expert": name} for name in ("math", "small")]
    tokenizer = llama.tokenizer("math")
    for text in read(rows, vocabulary):
        parts = [text.input_ids[: text.answer_start], text.input_ids[text.answer_start :]]
        prompt, _, rest = expected.rpartition("|")
        assert [tokenizer.decode(part) for part in parts] == [prompt, rest]


def test_the_end_is_written_once(read):
    rows = [*ROWS, {"prompt": "a", "completion": "b<|im_end|>", "expert": "chat"}]
    assert read(rows)[-1].input_ids == [*read([*ROWS, {**rows[-1], "completion": "b"}])[-1].input_ids]


def test_long_texts_lose_the_beginning_of_the_prompt(read, caplog):
    """Never the whole answer, and a part of the prompt stays."""
    rows = [*ROWS, {"prompt": "p" * 20, "completion": "abcdefgh", "expert": "math"}]
    whole = read(rows)[-1]
    assert not [record for record in caplog.records if "tokens" in record.message]
    with caplog.at_level(logging.WARNING):
        cut = read(rows, max_length=16)
    assert "1 of 4 texts have more than 16 tokens" in caplog.text
    assert cut[-1].input_ids == whole.input_ids[-16:] and cut[-1].answer_start == 16 - 9
    shorter = read(rows, max_length=8)[-1]
    start = whole.answer_start
    assert shorter == CalibrationText(0, whole.input_ids[start - 2 : start + 6], 2)


def test_few_texts_are_warned_of(read, caplog):
    with caplog.at_level(logging.WARNING):
        read(ROWS * 15 + ROWS[:1])
    assert "has few texts of chat (15), code (15): give at least 16" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"expert": "maths"}, r"row 4: unknown expert 'maths', the recipe has \['math', 'chat', 'code'\]"),
        ({"expert": None}, "row 4: unknown expert None"),
        ({"prompt": " "}, "row 4: the prompt is empty"),
        ({"completion": ""}, "row 4: the completion is empty"),
        ({"completion": None}, "row 4: the completion is empty"),
        ({"prompt": 3}, "row 4: the prompt is 3, expected text"),
        ({"messages": "x"}, "row 4: messages is 'x', expected a list of role and content"),
        ({"messages": [{"role": "user", "content": "x"}]}, "row 4: the messages are of user, expected a question"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "row 4: the messages are of assistant, expected"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]},
            "row 4: the assistant's turn is empty",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
            "row 4: messages is .* expected a list of role and content",
        ),
    ],
)
def test_bad_rows_are_named(read, row, message):
    with pytest.raises(ValueError, match=f"data.jsonl, {message}"):
        read([*ROWS, {"prompt": "a", "completion": "b", "expert": "math", **row}])


def test_what_is_missing_is_named(read, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*nowhere.jsonl"):
        read_calibration_texts(str(tmp_path / "nowhere.jsonl"), None)
    for row in ({"prompt": "a", "completion": "b"}, {"prompt": "a", "expert": "math"}):
        with pytest.raises(ValueError, match="data.jsonl has the columns .*expected 'expert', and 'prompt' and 'comp"):
            read([row])
    with pytest.raises(ValueError, match="data.jsonl has no text of expert 'code'"):
        read(ROWS[:2])


def test_answers_without_tokens_are_refused(llama, read, tmp_path):
    tokenizer = extended(template=None)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("z"), "")
    folder = save(model_of_size("llama", BASE_SIZE, 7), tokenizer, tmp_path / "deaf")
    vocabulary = vocabulary_of(Experts(llama.base, {**llama.folders, "deaf": folder}), "math", "deaf")
    with pytest.raises(ValueError, match="row 1: the tokenizer of deaf makes no token of the answer 'zz'"):
        read([{"prompt": "a", "completion": "zz", "expert": "deaf"}], vocabulary)


def test_tokens_that_an_expert_lacks_are_refused(llama, read, tmp_path):
    """Of its own tokenizer, beyond its embedding; and of the merged one, where that serves."""
    lost = save(model_of_size("llama", NUM_BASE_TOKENS, 7), extended("<lost>"), tmp_path / "lost")
    bare = save(model_of_size("llama", NUM_BASE_TOKENS, 8), None, tmp_path / "bare")
    base = save(model_of_size("llama", BASE_SIZE, 0), extended("<new>"), tmp_path / "base")
    experts = Experts(base, {"lost": lost, "bare": bare})
    vocabulary = vocabulary_of(experts, "lost", "bare", source="base")
    with pytest.raises(ValueError, match="row 1: expert 'lost' has no row for the token '<lost>'"):
        read([{"prompt": "a", "completion": "<lost>", "expert": "lost"}], vocabulary)
    with pytest.raises(ValueError, match="row 1: expert 'bare' does not have the token '<new>' of this text"):
        read([{"prompt": "a<new>", "completion": "b", "expert": "bare"}], vocabulary)
    own = [{"prompt": "a", "completion": "b", "expert": name} for name in ("lost", "bare")]
    texts = read([*own, {"prompt": "a<new>", "completion": "b", "expert": "*"}], vocabulary)
    assert [text.expert for text in texts] == [0, 1, 0]


def test_half_a_surrogate_pair_is_replaced(read):
    rows = [*ROWS, {"prompt": "a", "completion": "b", "expert": "math"}]
    broken = [*ROWS, {**rows[-1], "completion": "b\ud800"}]
    assert len(read(broken)[-1].input_ids) > len(read(rows)[-1].input_ids)


def test_experts_of_a_union_are_measured(llama, tmp_path):
    """Nothing flows to the tokens that an expert does not have; its own head's inputs and outputs are all measured."""
    file = tmp_path / "texts.jsonl"
    rows = [{**row, "prompt": f"{number} + 3?"} for number in range(17) for row in ROWS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = llama.recipe("math", "chat", "code", tokenizer_source="union", calibration={"data": str(file)})
    calibrate(recipe, tmp_path / "out", progress=False)
    plan = make_plan(recipe)
    calibration = read_calibration(tmp_path / "out", plan)
    squares, present = calibration.gradient_squares("lm_head"), plan.vocabulary.present
    assert not present.all() and (squares[present] > 0).all() and not squares[~present].any()
    assert calibration.covariance("lm_head").isfinite().all()
    read = calibration.gradient_squares("model.embed_tokens")
    for number, name in enumerate(plan.expert_names):
        seen = {
            token
            for text in read_calibration_texts(str(file), plan.vocabulary)
            if text.expert == number
            for token in text.input_ids[:-1]
        }
        assert set(read[number].nonzero()[:, 0].tolist()) == seen, name
