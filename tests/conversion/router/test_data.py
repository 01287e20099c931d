import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, normalizers
from transformers import AutoModelForCausalLM

from conversion.router.data import (
    RouterCollator,
    check_splits,
    encode_queries,
    hold_out,
    load_queries,
    load_rows,
    read_rows,
    with_variants,
)
from conversion.vocabulary.prompts import load_tokenizer
from modeling_channel_merged.chat_turns import ChatMarkers, ChatTurns

EXPERTS = ["instruct", "math", "code"]


def encode_rows(rows, data, tokenizer, config):
    return encode_queries(read_rows(rows, data, tokenizer, config), tokenizer, config)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_pads_on_the_tokenizers_side(stored, router_rows, side):
    tokenizer = load_tokenizer(stored.folder)
    tokenizer.padding_side = side
    queries = encode_rows(router_rows(6, seed=3), "data", tokenizer, stored.config)
    batch = RouterCollator(tokenizer)(queries)
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1, 2] and batch["labels"].dtype == torch.int64
    for query, input_ids, mask in zip(queries, batch["input_ids"], batch["attention_mask"]):
        assert input_ids[mask.bool()].tolist() == query["input_ids"]
        missing = len(mask) - len(query["input_ids"])
        assert not (mask[:missing] if side == "left" else mask[len(mask) - missing :]).any()


def test_collator_stacks_features(stored):
    features = np.arange(6, dtype=np.float32).reshape(2, 3)
    queries = [{"features": row, "labels": label, "source": "a"} for row, label in zip(features, (2, 0))]
    batch = RouterCollator(load_tokenizer(stored.folder))(queries)
    assert batch.keys() == {"features", "labels"} and batch["labels"].tolist() == [2, 0]
    assert torch.equal(batch["features"], torch.arange(6.0).reshape(2, 3))


def test_padding_side_does_not_change_the_loss(stored, router_rows):
    """Router loss and logits are the same on either side, up to float32 rounding."""
    tokenizer, model = load_tokenizer(stored.folder), AutoModelForCausalLM.from_pretrained(stored.folder).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.router.head.weight)
    queries = encode_rows(router_rows(7, seed=3), "data", tokenizer, stored.config)
    outputs = []
    for tokenizer.padding_side in ("left", "right"):
        with torch.no_grad():
            outputs.append(model(**RouterCollator(tokenizer)(queries)))
    torch.testing.assert_close(outputs[0].router_logits, outputs[1].router_logits)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)


def test_messages_use_the_chat_template(stored, write_tokenizer):
    """Of a conversation the router reads what the config says: by default the last turn of the user."""
    rows = [{"messages": [{"role": "user", "content": "one two"}], "expert": "math", "text": None}]
    with pytest.raises(ValueError, match="row 1 has messages, but the tokenizer has no chat template"):
        encode_rows(rows, "data", load_tokenizer(stored.folder), stored.config)
    write_tokenizer(stored.folder, chat=True)
    tokenizer = load_tokenizer(stored.folder)
    known = {"text": "one two", "chat": True, "labels": 1, "source": "data", "generated": False}
    expected = [{**known, "input_ids": [16, 3, 4]}]
    assert encode_rows(rows, "data", tokenizer, stored.config) == expected
    rows[0]["messages"].append({"role": "assistant", "content": "three"})
    rows[0]["messages"].insert(0, {"role": "system", "content": "please"})
    assert encode_rows(rows, "data", tokenizer, stored.config) == expected
    rows[0]["messages"].append({"role": "user", "content": "plus"})
    assert encode_rows(rows, "data", tokenizer, stored.config)[0]["input_ids"] == [16, 6]
    stored.config.router["context"] = "conversation"
    assert encode_rows(rows, "data", tokenizer, stored.config)[0]["input_ids"] == [16, 3, 4, 6]


def test_text_without_tokens_is_refused(stored):
    """Here a tokenizer that drops all characters."""
    tokenizer = load_tokenizer(stored.folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("."), "")
    with pytest.raises(ValueError, match="makes no token of the text 'hello'"):
        encode_rows([{"text": "hello", "expert": "math"}], "data", tokenizer, stored.config)


def test_long_queries_are_shortened_as_the_model_does(stored):
    rows = [{"text": "one two three " * 20 + "plus", "expert": "math"}]
    stored.config.router["max_tokens"] = 5
    (query,) = encode_rows(rows, "data", load_tokenizer(stored.folder), stored.config)
    assert query["input_ids"] == [3, 4, 5, 5, 6]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_file_formats(tmp_path, router_rows, suffix):
    rows = router_rows(5, seed=0)
    file = str(tmp_path / f"data.{suffix}")
    getattr(Dataset.from_list(rows), "to_json" if suffix == "jsonl" else f"to_{suffix}")(file)
    assert load_rows(file) == [{**row, "source": "data"} for row in rows]


def test_several_files_and_their_sources(stored, tmp_path, write_jsonl, router_rows):
    """A `source` column names the source; a file without it, or a row with an empty one, is a source by its name."""
    rows = router_rows(3, seed=0)
    first = write_jsonl(tmp_path / "gsm8k.jsonl", rows)
    sourced = [{**row, "source": source} for row, source in zip(rows, ("web", None, ""))]
    second = write_jsonl(tmp_path / "mixed.jsonl", sourced)
    queries = load_queries([first, second], load_tokenizer(stored.folder), stored.config)
    assert [query["source"] for query in queries] == ["gsm8k"] * 3 + ["web", "mixed", "mixed"]
    assert [query["labels"] for query in queries] == [0, 1, 2] * 2


def test_variants(stored, router_rows):
    """They follow the queries, differ in the text alone, and another seed gives others; a chat message has none."""
    queries = read_rows(router_rows(20, seed=0), "data", load_tokenizer(stored.folder), stored.config)
    both = with_variants(queries, seed=5)
    assert both[:20] == queries and len(both) == 40
    for query, variant in zip(queries, both[20:]):
        assert {**variant, "text": ""} == {**query, "text": "", "original": queries.index(query)}
    assert [query["text"] for query in both[20:]] != [query["text"] for query in queries]
    assert with_variants(queries, seed=5) == both != with_variants(queries, seed=6)
    chat = [{**query, "chat": True} for query in queries]
    assert with_variants(chat, seed=5) == chat


def test_hold_out_takes_the_same_share_of_every_expert(caplog):
    """Disjoint, complete, the same for one seed; an expert with one query keeps it for training; all is logged."""
    labels = [0] * 40 + [1] * 20 + [2] * 2 + [3]
    queries = [
        {"input_ids": [i], "labels": label, "source": "all", "generated": False} for i, label in enumerate(labels)
    ]
    names = ["a", "b", "c", "d"]
    with caplog.at_level("INFO", logger="conversion"):
        train, evaluation = hold_out(queries, 0.1, 5, names)
    assert [sum(query["labels"] == label for query in evaluation) for label in range(4)] == [4, 2, 1, 0]
    assert sorted(query["input_ids"][0] for query in train + evaluation) == list(range(63))
    assert "7 of 63 training queries are held out" in caplog.text
    assert "a 4 of 40, b 2 of 20, c 1 of 2, d 0 of 1" in caplog.text
    assert hold_out(queries, 0.1, 5, names) == (train, evaluation)
    assert hold_out(queries, 0.1, 6, names) != (train, evaluation)


@pytest.mark.parametrize("seed", range(5))
def test_hold_out_takes_of_every_source(seed):
    """Of each expert's sources in proportion to their size, to less than one query."""
    sizes = {("math", "gsm8k"): 100, ("math", "web"): 30, ("code", "mbpp"): 55, ("code", "web"): 25}
    queries = [
        {"input_ids": [number], "labels": ["math", "code"].index(expert), "source": source, "generated": False}
        for (expert, source), size in sizes.items()
        for number in range(size)
    ]
    _, evaluation = hold_out(queries, 0.1, seed, ["math", "code"])
    assert len(evaluation) == 13 + 8
    for (expert, source), size in sizes.items():
        label = ["math", "code"].index(expert)
        count = sum((query["labels"], query["source"]) == (label, source) for query in evaluation)
        assert abs(count - size / 10) < 1


def test_generated_queries_are_held_out_only_of_experts_without_others():
    queries = [{"labels": n % 2, "source": "a", "generated": n % 2 == 1 or n > 20, "number": n} for n in range(60)]
    train, evaluation = hold_out(queries, 0.2, 0, ["a", "b"])
    assert [sum(query["labels"] == label for query in evaluation) for label in range(2)] == [2, 6]
    assert not any(query["generated"] for query in evaluation if query["labels"] == 0)
    assert sorted(query["number"] for query in train + evaluation) == list(range(60))


def test_split_without_queries_is_refused():
    query = {"text": "one", "labels": 0, "source": "a"}
    with pytest.raises(ValueError, match="there are no evaluation queries: 1 for training, 0 to evaluate"):
        check_splits([query], [], ["a"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "one", "expert": "maths"},
            r"row 3: unknown expert 'maths', the checkpoint has \['instruct', 'math'",
        ),
        ({"text": "one", "expert": None}, "row 3: unknown expert None"),
        ({"text": "  ", "expert": "math"}, "row 3: the text is empty"),
        ({"text": None, "expert": "math"}, "row 3: the text is empty"),
        ({"text": "one", "expert": "math", "generated": "no"}, "row 3: generated is 'no', expected true or false"),
    ],
)
def test_bad_rows(stored, router_rows, row, message):
    with pytest.raises(ValueError, match=f"bad.jsonl, {message}"):
        encode_rows([*router_rows(2, seed=0), row], "bad.jsonl", load_tokenizer(stored.folder), stored.config)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages hold no query"),
        ([{"role": "assistant", "content": "three"}], "messages hold no query"),
        ([{"role": "user", "content": " "}], "a message has no content"),
        ([{"role": "user", "content": None}], "a message's content is None, expected text"),
    ],
)
def test_bad_messages(stored, messages, problem):
    with pytest.raises(ValueError, match=f"data, row 1: {problem}"):
        encode_rows([{"messages": messages, "expert": "math"}], "data", load_tokenizer(stored.folder), stored.config)


def test_bad_files(tmp_path, write_jsonl):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.jsonl"):
        load_rows(str(tmp_path / "nowhere.jsonl"))
    columns = write_jsonl(tmp_path / "columns.jsonl", [{"question": "one", "expert": "math"}])
    with pytest.raises(ValueError, match=r"has the columns \['question', 'expert'\], expected 'expert', and 'text'"):
        load_rows(columns)


def test_a_text_that_is_a_whole_chat_is_read_as_the_model_will_read_it(stored):
    """Its last turn of the user; a text that is none stays whole."""
    tokenizer = load_tokenizer(stored.folder)
    user, answer, eos = tokenizer.convert_tokens_to_ids(["user", "hello", "<eos>"])
    markers = ChatMarkers(first=[user], openings=[[eos, user]], end=[answer], tools=[], lead=[], tail=[])
    frame = {"before": [user], "after": [answer], "lead": [], "tail": [], "separator": [], "bos": []}
    stored.config.router["turns"] = ChatTurns(**frame, templates=[markers]).to_dict()
    rows = [
        {"text": text, "expert": "code"}
        for text in ("user one hello two <eos> user print def hello", "print user def")
    ]
    queries = encode_rows(rows, "data", tokenizer, stored.config)
    read = [tokenizer.convert_ids_to_tokens(query["input_ids"]) for query in queries]
    assert read == [["user", "print", "def", "hello"], ["print", "user", "def"]]
