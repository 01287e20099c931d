"""Answers from the command line: what the router reads and says, and prompts of any kind."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import conversion.generate as room
from conversion.__main__ import main
from conversion.generate import answer_prompts
from conversion.router.choices import fallback_reasons
from conversion.vocabulary.prompts import render
from modeling_channel_merged import ChannelMergedConfig, ChannelMergedForCausalLM

TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
SYSTEM = {"role": "system", "content": "You write Python."}
TURNS = [
    {"role": "user", "content": "two plus three"},
    {"role": "assistant", "content": "def five(): return 5"},
    {"role": "user", "content": "再来一次 🙂"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Three random experts, a random router, and a tokenizer of bytes that drops zero-width spaces."""
    folder = tmp_path_factory.mktemp("merged")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<pad>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    text_config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    config = ChannelMergedConfig(
        text_config=text_config, expert_names=["math", "code", "chinese"], router={"max_tokens": 40}
    )
    model = ChannelMergedForCausalLM(config)
    nn.init.normal_(model.router.head.weight)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def change_router(checkpoint):
    """Change fields of the router's config, for one test."""
    file = checkpoint / "config.json"
    before = file.read_text()

    def change(**fields):
        config = json.loads(before)
        config["router"].update(fields)
        file.write_text(json.dumps(config))

    yield change
    file.write_text(before)


@pytest.fixture
def read(monkeypatch, checkpoint):
    """The texts that the router reads, batch by batch."""
    texts, encode = [], room.encode_prompts

    def record(tokenizer, *args):
        inputs = encode(tokenizer, *args)
        texts.append(tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True))
        return inputs

    monkeypatch.setattr(room, "encode_prompts", record)
    return texts


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ("last_user_turn", "user: 再来一次 🙂\n"),
        ("conversation", "user: two plus three\n\n再来一次 🙂\n"),
    ],
)
def test_system_prompts_and_answers_do_not_decide(checkpoint, change_router, read, context, expected):
    """The router reads turns of the user only, and gives the same probability with and without the rest."""
    change_router(context=context)
    conversations = [TURNS, [SYSTEM, *TURNS], [SYSTEM, TURNS[0], TURNS[2]], [TURNS[0], SYSTEM, *TURNS[1:]]]
    answers = answer_prompts(checkpoint, conversations, max_new_tokens=2)
    assert read == [[expected] * 4]
    assert len({answer.expert for answer in answers}) == 1
    assert [answer.probability for answer in answers] == pytest.approx([answers[0].probability] * 4)


def test_the_expert_reads_the_whole_conversation(checkpoint):
    """What the router leaves out is there for the answer."""
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)
    (answer,) = answer_prompts(checkpoint, [[SYSTEM, *TURNS]], max_new_tokens=8)
    text = tokenizer.apply_chat_template([SYSTEM, *TURNS], tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    sequence = model.generate(**inputs, expert_index=answer.expert, max_new_tokens=8)[0]
    assert answer.text == tokenizer.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


STRANGE = {
    "code-switching": "请解释 why `for i in range(10)` 打印 ten 行, por favor",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽 ❤️",
    "right-to-left": "ما هو مجموع 2 + 3؟ \u202eabc\u202c",
    "combining": "Z" + "\u0351\u0300" * 40,
    "control": "".join(map(chr, range(1, 32))) + "x",
    "null": "\x00\x00\x00",
    "bytes": bytes(range(256)).decode("utf-8", "surrogateescape"),
    "latin-1": bytes(range(128, 256)).decode("latin-1"),
    "half-a-pair": json.loads(r'"\ud83d and \ude42"'),
    "noncharacters": "\uffff\ufffe\U0010ffff",
    "special": "<pad><eos><pad>",
    "long": "word " * 100,
    "one-word": "a" * 300,
}


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_prompts_of_any_kind(checkpoint, chat):
    """Each is routed and answered, in one batch as alone; what is no Unicode text is replaced."""
    prompts = list(STRANGE.values())
    answers = answer_prompts(checkpoint, prompts, max_new_tokens=3, chat=chat)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert 1 / 3 <= answer.probability <= 1 and answer.choice == f"{answer.probability:.3f}"
        assert answer.prompt.encode() and (answer.prompt == prompt or "\ufffd" in answer.prompt)
    for kind, answer in zip(STRANGE, answers, strict=True):
        if kind in ("emoji", "bytes", "long"):
            (alone,) = answer_prompts(checkpoint, [STRANGE[kind]], max_new_tokens=3, chat=chat)
            assert alone.expert == answer.expert and alone.probability == pytest.approx(answer.probability, abs=1e-4)


def test_lone_surrogates_are_replaced_and_pairs_are_not(checkpoint):
    prompts = [
        json.loads(r'"\ud83d and \ude42, \ud83d\ude42"'),
        b"caf\xe9 \xf0\x9f\x99\x82".decode("utf-8", "surrogateescape"),
    ]
    chats = [[{"role": "user", "content": prompts[0]}]]
    answers = answer_prompts(checkpoint, [*prompts, *chats], max_new_tokens=1)
    assert [answer.question for answer in answers] == [
        "\ufffd and \ufffd, 🙂",
        "caf\ufffd 🙂",
        "\ufffd and \ufffd, 🙂",
    ]


def test_a_prompt_that_the_tokenizer_drops(checkpoint):
    with pytest.raises(ValueError, match="prompt 2 of 2 has no tokens: its tokenizer drops all of it"):
        answer_prompts(checkpoint, ["one", "\u200b\u200b"], chat=False)
    with pytest.raises(ValueError, match="prompt 1 of 1 has no tokens"):
        answer_prompts(checkpoint, ["\u200b"], chat=False)


def test_a_conversation_without_a_query(checkpoint, monkeypatch):
    """Said before the model is loaded; a named expert needs none."""
    answer_prompts(checkpoint, [[SYSTEM]], expert="code", max_new_tokens=1)
    monkeypatch.setattr(room, "AutoModelForCausalLM", None)
    with pytest.raises(ValueError, match="prompt 2 of 2: messages hold no query: none has the role 'user'"):
        answer_prompts(checkpoint, ["one", [SYSTEM]])


def test_messages_that_the_template_does_not_take(checkpoint):
    """Many templates know no system role: said with the template's own words, not as a traceback."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = {"default": TEMPLATE, "code": "{{ raise_exception('no ' + messages[0]['role']) }}"}
    with pytest.raises(ValueError, match="the chat template 'code' does not take .* roles system, user: no system"):
        render(tokenizer, [SYSTEM, TURNS[0]], "code")
    assert render(tokenizer, [SYSTEM, TURNS[0]]) == "system: You write Python.\nuser: two plus three\n"


def test_the_command_says_who_answers_and_why(checkpoint, change_router, capsys):
    """The expert and the router's probability for it; below the threshold also what the router would have chosen."""

    def lines():
        with pytest.raises(SystemExit) as stop:
            main(["generate", str(checkpoint), *STRANGE_SHORT, "--max-new-tokens", "1"])
        assert stop.value.code == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]

    answers = answer_prompts(checkpoint, STRANGE_SHORT, max_new_tokens=1)
    assert lines() == [f"[{answer.expert} {answer.probability:.3f}] {answer.question}" for answer in answers]
    sure = sorted(answer.probability for answer in answers)
    threshold = (sure[0] + sure[-1]) / 2
    default = next(name for name in ("math", "code", "chinese") if name != answers[0].expert)
    change_router(threshold=threshold, default_expert=default)
    unsure = answer_prompts(checkpoint, STRANGE_SHORT, max_new_tokens=1)
    expected = []
    for before, after in zip(answers, unsure, strict=True):
        if before.probability >= threshold:
            assert after == before
            expected.append(f"[{before.expert} {before.probability:.3f}] {before.question}")
        else:
            assert after.expert == default and after.probability <= before.probability
            reason = f"{before.expert} has {before.probability:.3f}, below the threshold {threshold:.3f}"
            expected.append(f"[{default} {after.probability:.3f}, default: {reason}] {before.question}")
    assert lines() == expected and any("default" in line for line in expected)


STRANGE_SHORT = ["two plus three", "def", "再来一次 🙂", "x"]


def test_why_the_default_expert_answers(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    input_ids, mask = torch.tensor([[5, 6], [5, 6]]), torch.tensor([[0, 0], [1, 1]])
    routing = model.route(input_ids, mask, top_k=1)
    assert fallback_reasons(model, routing, mask) == ["the router has nothing to read", None]
    nn.init.zeros_(model.router.head.weight)
    routing = model.route(input_ids, mask, top_k=1)
    assert fallback_reasons(model, routing, mask) == ["the router is untrained"] * 2
