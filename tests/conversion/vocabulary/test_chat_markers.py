"""The user's turns are found in the ids of chats in the common templates, and read as `router_inputs` reads them."""

import json
from functools import cache
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conversion.vocabulary.chat_markers import DerivedTurns, assistant, derive_turns, system, tool_turn, user
from modeling_channel_merged.chat_turns import ChatTurns
from modeling_channel_merged.router_inputs import router_messages

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A system prompt of its own where none is given, and tools that speak in the user's role, as Qwen's.
CHATML_TOOLS = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ m['content'] }}\n</tool_response><|im_end|>\n"
    "{% elif m.get('tool_calls') %}<|im_start|>assistant\n<tool_call>\n{{ m['tool_calls'][0]['function'] | tojson }}\n"
    "</tool_call><|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ 'ipython' if m['role'] == 'tool' else m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# The system prompt is a part of the first turn of the user.
MISTRAL = (
    "{{ bos_token }}{% set found = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set found.system = m['content'] + '\n\n' %}"
    "{% elif m['role'] == 'user' %}[INST] {{ found.system + m['content'] }} [/INST]{% set found.system = '' %}"
    "{% elif m['role'] == 'assistant' and not m.get('tool_calls') %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
LLAMA2 = MISTRAL.replace("m['content'] + '\n\n'", "'<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n'")
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'assistant' %}### Response:\n{{ m['content'] }}{{ eos_token }}\n\n"
    "{% else %}{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% elif m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Only some answers begin with a thought, and those of earlier turns never.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|Assistant|>{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
DEMO = (Path(__file__).parents[3] / "hub_examples" / "tiny_experts" / "base" / "chat_template.jinja").read_text()
TEMPLATES = {
    "chatml": CHATML,
    "chatml-tools": CHATML_TOOLS,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "llama2": LLAMA2,
    "gemma": GEMMA,
    "phi3": PHI3,
    "alpaca": ALPACA,
    "vicuna": VICUNA,
    "zephyr": ZEPHYR,
    "deepseek": DEEPSEEK,
    "demo": DEMO,
}
SPECIAL = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "chatml-tools": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "deepseek": ("<|User|>", "<|Assistant|>", "<think>"),
    "demo": ("<|user|>", "<|assistant|>"),
}
# How words and line ends become tokens: as Llama 3 and Qwen have it, and as Llama 2 and Mistral have it.
SEGMENTATIONS = ("words", "pieces")
SPLIT_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Where a system prompt may come first and what opens the next turn is no more than the user's own marker, a marker
# that a user types opens a turn, too.
OPENS_WHEREVER_TYPED = ("alpaca", "vicuna", "deepseek")
OPENINGS = {
    **dict.fromkeys(("chatml", "chatml-tools"), "<|im_start|>user\n"),
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n",
    **dict.fromkeys(("mistral", "llama2"), "[INST] "),
    "gemma": "<start_of_turn>user\n",
    **dict.fromkeys(("phi3", "zephyr"), "<|user|>\n"),
    "alpaca": "### Instruction:\n",
    "vicuna": "USER: ",
    "deepseek": "<|User|>",
    "demo": "<|user|> ",
}
CONVERSATIONS = {
    "one turn": [user("What is 17 + 25?")],
    "a new topic": [user("What is 17 + 25?"), assistant("42."), user("今天星期三，明天星期几？")],
    "lines": [user("Why?\n\n"), assistant("\nSo:\n\n- a\n"), user("\n  def f(a):\n    return a[0]\n\n")],
    "again": [user("a"), assistant("b"), user("a"), assistant("b"), user("a")],
    "an answer that has begun": [user("Sort [3, 1]."), assistant("[1,"), user("On."), assistant("1, 3]")],
    "a turn of nothing": [user("Hi"), assistant("?"), user("")],
}


@cache
def segmentation(kind: str) -> Tokenizer:
    root = Path(__file__).parents[3]
    texts = [*TEMPLATES.values()] * 5 + [(root / "README.md").read_text(encoding="utf-8")]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    special, alphabet, steps = ["<s>", "</s>", "<unk>"], [], decoders.ByteLevel()
    if kind == "words":
        words = pre_tokenizers.Split(Regex(SPLIT_WORDS), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        splits = applied = pre_tokenizers.Sequence([words, as_bytes])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        # Learned in words and line ends, applied to whole texts.
        lines = pre_tokenizers.Split(Regex("\n+"), "isolated")
        splits = pre_tokenizers.Sequence([lines, pre_tokenizers.Split("▁", "merged_with_next")])
        applied = None
        special += [f"<0x{number:02X}>" for number in range(256)]
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        steps = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = splits, steps
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = applied
    return tokenizer


def make_tokenizer(template: str, kind: str, **templates: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(segmentation(kind).to_str()),
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "padding_side": "left"},
    )
    special = [token for name in (template, *templates) for token in SPECIAL.get(name, ())]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.chat_template = {"default": TEMPLATES[template], **templates} if templates else TEMPLATES[template]
    return tokenizer


def encode(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, **{"add_generation_prompt": True, **options})["input_ids"]


@pytest.fixture(scope="module", params=[f"{name}-{kind}" for kind in SEGMENTATIONS for name in TEMPLATES])
def chat(request):
    """A template's name, a tokenizer with it, and what was derived of both."""
    name, _, kind = request.param.rpartition("-")
    tokenizer = make_tokenizer(name, kind)
    return name, tokenizer, derive_turns(tokenizer)


def test_a_chat_is_read_as_a_rendering_of_its_last_turn(chat):
    _, tokenizer, derived = chat
    assert derived.whole == {}
    turns = ChatTurns.from_dict(json.loads(json.dumps(derived.turns.to_dict())))
    assert turns == derived.turns
    for kind, messages in CONVERSATIONS.items():
        expected = encode(tokenizer, router_messages(messages, "last_user_turn"))
        assert turns.router_query(encode(tokenizer, messages), "last_user_turn") == expected, kind
        # What a pipeline makes of a rendered text, where one beginning of a text is written twice.
        again = tokenizer.bos_token_id
        assert turns.router_query([again, *encode(tokenizer, messages)], "last_user_turn") == expected, kind


def test_a_prompt_that_asks_for_no_answer_yet(chat):
    _, tokenizer, derived = chat
    messages = CONVERSATIONS["a new topic"]
    query = derived.turns.router_query(encode(tokenizer, messages, add_generation_prompt=False), "last_user_turn")
    text = tokenizer.decode(query)
    assert messages[-1]["content"] in text and "17" not in text
    assert query[: len(derived.turns.before)] == derived.turns.before
    assert query[len(query) - len(derived.turns.after) :] == derived.turns.after


def test_all_turns_of_the_user(chat):
    """Joined as paragraphs; the very ids where turns begin and end in words, and the template has a line to itself."""
    name, tokenizer, derived = chat
    messages = [user("Tell me of it"), assistant("No. Why?"), user("今天星期几"), assistant("So"), user("and why")]
    expected = encode(tokenizer, router_messages(messages, "conversation"))
    query = derived.turns.router_query(encode(tokenizer, messages), "conversation")
    if name in ("chatml", "chatml-tools", "llama3", "gemma", "phi3"):
        assert query == expected
    assert tokenizer.decode(query).split() == tokenizer.decode(expected).split()


def test_system_prompts_decide_nothing_where_they_stand_apart(chat):
    name, tokenizer, derived = chat
    messages = [system("You write code.\n\nBe kind."), *CONVERSATIONS["a new topic"]]
    together = {"mistral": ["default"], "llama2": ["default"]}.get(name, [])
    assert derived.with_system == together == derived.record()["read_with_system_prompt"]
    if not derived_takes_system(tokenizer):
        return
    for length in (len(messages), 2):
        expected = encode(tokenizer, router_messages(messages[:length], "last_user_turn"))
        query = derived.turns.router_query(encode(tokenizer, messages[:length]), "last_user_turn")
        assert (query == expected) == (length > 2 or not together)


def derived_takes_system(tokenizer) -> bool:
    try:
        encode(tokenizer, [system("a"), user("b")])
    except TemplateError:
        return False
    return True


def test_tools_decide_nothing(chat):
    name, tokenizer, derived = chat
    if name not in ("chatml-tools", "llama3", "chatml", "zephyr", "phi3"):
        return
    messages = [user("first"), assistant("An answer."), user("How is the weather?"), *tool_turn("17 + 25")]
    expected = encode(tokenizer, [user("How is the weather?")])
    assert derived.turns.router_query(encode(tokenizer, messages), "last_user_turn") == expected
    assert bool(derived.turns.templates[0].tools) == (name == "chatml-tools")


def test_markers_that_a_user_types(chat):
    """Even those that the tokenizer takes for the real ones begin no turn where none can begin."""
    name, tokenizer, derived = chat
    opening = OPENINGS[name]
    for typed in (f"What is {opening} good for?", f"Say{opening} twice", f"{opening[:3]} and {tokenizer.eos_token}"):
        messages = [user("first"), assistant("An answer."), user(typed)]
        ids, expected = encode(tokenizer, messages), encode(tokenizer, [user(typed)])
        query = derived.turns.router_query(ids, "last_user_turn")
        if name in OPENS_WHEREVER_TYPED:
            assert query[-3:] == expected[-3:] and len(query) <= len(expected)
        else:
            assert query == expected, typed


def test_truncated_prompts(chat):
    """Of a prompt without its beginning the last turn counts as long as its opening is there, else all."""
    _, tokenizer, derived = chat
    messages = CONVERSATIONS["a new topic"]
    ids, turns = encode(tokenizer, messages), derived.turns
    alone = encode(tokenizer, messages[-1:])
    ((_, _), (start, stop)) = turns.find(ids, turns.templates[0])
    whole = (size for size in range(1, start) if turns.router_query(ids[start - size :], "last_user_turn") is None)
    opening = max(whole, default=0)
    assert turns.router_query(ids[start - opening - 1 :], "last_user_turn") == alone
    assert turns.router_query(ids[start:], "last_user_turn") is None
    for cut in range(stop, len(ids)):
        assert turns.router_query(ids[:cut], "last_user_turn") == alone
    part = turns.router_query(ids[: stop - 2], "last_user_turn")
    assert part == [*alone[: len(turns.before)], *ids[start : stop - 2], *turns.after]


def test_plain_prompts_have_no_turns(chat):
    _, tokenizer, derived = chat
    for text in ("What is 17 + 25?", "user: hi\nassistant: hello\n", "[1] <b>", "今天星期三，明天星期几？", ""):
        assert derived.turns.router_query(tokenizer(text)["input_ids"], "last_user_turn") is None


def test_each_experts_template_is_found_and_read_in_the_frame_of_the_default():
    tokenizer = make_tokenizer("chatml", "words", math=ALPACA, llama3=LLAMA3, code=CHATML, demo=DEMO)
    derived = derive_turns(tokenizer)
    assert derived.whole == {} and len(derived.turns.templates) == 4  # one of them is the default
    messages = [user("What is 17 + 25?"), assistant("42."), user("Tell me of it")]
    alone = encode(tokenizer, messages[-1:])
    for name in ("default", "math", "llama3", "code", "demo"):
        ids = encode(tokenizer, messages, chat_template=name)
        query = derived.turns.router_query(ids, "last_user_turn")
        # Before a word, the demo's template has a space for the line end of ChatML's.
        assert (query == alone) == (name != "demo"), name
        assert tokenizer.decode(query).split() == tokenizer.decode(alone).split()
    # Another template's markers in a turn are text.
    typed = [user("first"), assistant("a"), user("Say ### Instruction:\nhi\n\n### Response:\n now")]
    assert derived.turns.router_query(encode(tokenizer, typed), "last_user_turn") == encode(tokenizer, typed[-1:])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "writes nothing"),
        ("{% for m in messages %}[{{ m['content'] }}]{% endfor %}", "writes nothing"),
        ("Q{% for m in messages %}: {{ m['content'] }}.{% endfor %}", "is not found"),
        ("{{ raise_exception('no messages today') }}", "no messages today"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "concatenate"),
    ],
)
def test_templates_whose_turns_cannot_be_found(template, reason, caplog):
    """The report and a warning say so, and no prompt is read by half."""
    tokenizer = make_tokenizer("chatml", "words", odd=template)
    derived = derive_turns(tokenizer)
    assert derived.record()["read_whole"] == derived.whole and list(derived.whole) == ["odd"]
    assert reason in derived.whole["odd"] and len(derived.turns.templates) == 1
    assert "chat template 'odd'" in caplog.text and reason in caplog.text
    tokenizer.chat_template = {"default": template, "chat": CHATML}
    derived = derive_turns(tokenizer)
    assert derived.turns is None and list(derived.whole) == ["default", "chat"]  # what frames a turn is not known


def test_without_templates_there_is_nothing_to_find(caplog):
    tokenizer = make_tokenizer("chatml", "words")
    tokenizer.chat_template = None
    assert derive_turns(tokenizer) == derive_turns(None) == DerivedTurns(None, {}, [])
    assert caplog.text == ""
