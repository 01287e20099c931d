"""Answers of experts that read and write with their own tokenizers and chat templates."""

import json

import pytest
from transformers import AutoTokenizer

import conversion.generate as room
from conversion.__main__ import main
from conversion.generate import answer_prompts
from conversion.vocabulary.prompts import read_conversations

from .conftest import BASE_SIZE, Experts, extended, model_of_size, save


@pytest.mark.parametrize("source", ["union", "base"])
def test_an_expert_answers_as_it_did_alone(llama, tmp_path, source):
    """Messages and texts in one mixed batch: each answer is what the expert's own model says to its own rendering."""
    out = llama.convert(tmp_path / "out", "math", "chat", "code", tokenizer_source=source)
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    for name in ("math", "chat", "code"):
        tokenizer, model = llama.tokenizer(name), llama.dense(name)
        (answer,) = answer_prompts(out, [messages], expert=name, max_new_tokens=12)
        rendering = AutoTokenizer.from_pretrained(llama.base) if name == "math" else tokenizer
        text = rendering.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
        expected = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True), name
        (alone,) = answer_prompts(out, ["What is 12 + 30?"], expert=name, max_new_tokens=12)
        assert alone.text == answer.text


def test_routing_reads_the_default_template(llama, merged_llama, monkeypatch):
    """The router sees what it was trained on, whichever expert is picked in the end."""
    seen = []
    encode = room.encode_prompts
    monkeypatch.setattr(room, "encode_prompts", lambda *args: seen.append(encode(*args)) or seen[-1])
    answers = answer_prompts(merged_llama, ["hi", [{"role": "user", "content": "ho"}]], max_new_tokens=2)
    assert [answer.expert for answer in answers] == ["math", "math"] and answers[0].probability is not None
    tokenizer = AutoTokenizer.from_pretrained(merged_llama)
    assert tokenizer.batch_decode(seen[0]["input_ids"]) == ["[hi]</s>", "[ho]</s>"]


def test_messages_need_a_template(llama, tmp_path):
    with pytest.raises(ValueError, match="messages need a chat template"):
        base = save(model_of_size("llama", BASE_SIZE, 0), extended(), tmp_path / "base")
        out = Experts(base, llama.folders).convert(tmp_path / "out", "math", "small")
        answer_prompts(out, [[{"role": "user", "content": "hi"}]])


def test_conversations_from_the_command_line(merged_llama, tmp_path, capsys):
    file = tmp_path / "conversations.jsonl"
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "he"},
    ]
    file.write_text(json.dumps({"messages": turns}) + "\n\n" + json.dumps({"messages": turns[:1]}) + "\n")
    with pytest.raises(SystemExit) as stop:
        main(
            ["generate", str(merged_llama), "so", "--messages", str(file), "--max-new-tokens", "2", "--expert", "chat"]
        )
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert [line for line in lines if line.startswith("[chat given]")] == [
        f"[chat given] {q}" for q in ("so", "he", "hi")
    ]
    assert read_conversations(file) == [turns, turns[:1]]
    file.write_text(json.dumps({"messages": turns}) + '\n{"messages": [{"role": "user"}]}\n')
    with pytest.raises(ValueError, match="conversations.jsonl, line 2: expected"):
        read_conversations(file)
    with pytest.raises(ValueError, match="there is no prompt to answer"):
        answer_prompts(merged_llama, [])


REFUSES = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
    "[{{ m['content'] }}]{% endfor %}"
)
LEAVES_OUT = "{% for m in messages if m['role'] != 'system' %}[{{ m['content'] }}]{% endfor %}"


@pytest.mark.parametrize("own", [True, False], ids=["own tokenizer", "merged one"])
def test_a_system_message_is_never_lost(llama, tmp_path, own):
    """An expert whose template has no system role says so; the others read it."""
    folders = {"math": llama.folders["math"]}
    for name, template in {"strict": REFUSES, "deaf": LEAVES_OUT}.items():
        folders[name] = save(model_of_size("llama", BASE_SIZE, 3), extended(template=template), tmp_path / name)
    out = Experts(llama.base, folders).convert(tmp_path / "out")
    if not own:
        for name in folders:
            (out / "experts" / name / "tokenizer_config.json").unlink()
    user = {"role": "user", "content": "hi"}
    messages = [{"role": "system", "content": "Be brief."}, user]
    assert answer_prompts(out, [messages], expert="math", max_new_tokens=1)
    for name, why in {
        "strict": "does not take messages of the roles system, user: no system",
        "deaf": "leaves",
    }.items():
        assert answer_prompts(out, [[user], "hi"], expert=name, max_new_tokens=1)
        with pytest.raises(ValueError, match=f"expert '{name}' has no system role .*{why}.*: put what"):
            answer_prompts(out, [messages], expert=name, max_new_tokens=1)
