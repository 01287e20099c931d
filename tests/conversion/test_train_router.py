import json
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, EvalPrediction

from conversion.generate import load_tokenizer
from conversion.train_router import (
    RouterCollator,
    add_to_card,
    confusion_matrix,
    encode_rows,
    evaluation_tables,
    load_rows,
    main,
    parse_arguments,
    recalls,
    router_metrics,
    split_by_expert,
)

QUERIES = {
    "instruct": ["please", "write", "hello"],
    "math": ["one", "two", "plus"],
    "code": ["def", "print", "return"],
}
EXPERTS = list(QUERIES)


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        expert = EXPERTS[number % 3]
        rows.append(
            {"text": " ".join(generator.choices(QUERIES[expert], k=generator.randint(1, 9))), "expert": expert}
        )
    return rows


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture
def train(stored, tmp_path):
    """Run the recipe on easy data; further arguments as on the command line."""

    def run(*arguments, out="routed"):
        data = write_jsonl(tmp_path / "train.jsonl", make_rows(90, seed=0))
        evaluation = write_jsonl(tmp_path / "eval.jsonl", make_rows(30, seed=1))
        return main(
            [
                *("--checkpoint", str(stored.folder), "--train-data", data, "--eval-data", evaluation),
                *("--output-dir", str(tmp_path / out), "--learning-rate", "0.1", "--num-train-epochs", "10"),
                *("--disable-tqdm", "true", "--use-cpu", *arguments),
            ]
        )

    return run


def test_trains_the_router_and_nothing_else(stored, train, tmp_path):
    """Separable queries are learned; every other tensor of the checkpoint stays bit for bit."""
    metrics = train()
    assert metrics["accuracy"] == metrics["macro_recall"] == 1.0
    assert metrics["confusion_matrix"] == [[10, 0, 0], [0, 10, 0], [0, 0, 10]]
    assert metrics["training"]["queries"] == 90 and metrics["queries"] == 30
    before, after = (load_file(folder / "model.safetensors") for folder in (stored.folder, tmp_path / "routed"))
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]) != key.startswith("router."), key
        assert before[key].dtype == after[key].dtype


def test_output_is_a_complete_checkpoint(stored, train, tmp_path):
    """Weights, code, tokenizer, card with the router's numbers, report and metrics are there; routing works."""
    metrics = train()
    out = tmp_path / "routed"
    names = {file.name for file in out.iterdir()}
    assert names >= {file.name for file in stored.folder.iterdir()}
    assert {"modeling_channel_merged.py", "configuration_channel_merged.py", "router_eval.json"} <= names
    assert json.loads((out / "router_eval.json").read_text()) == metrics
    card = (out / "README.md").read_text()
    assert (
        card.index("# Merged")
        < card.index("## Router")
        < card.index("| math | 0 | 10 | 0 |")
        < card.index("## Limits")
    )
    tokenizer, model = load_tokenizer(out), AutoModelForCausalLM.from_pretrained(out)
    inputs = tokenizer(["one plus", "def", "please hello write"], padding=True, return_tensors="pt")
    routing = model.route(inputs["input_ids"], inputs["attention_mask"])
    assert routing.expert_index.tolist() == [1, 2, 0]


def test_training_is_deterministic(train, tmp_path):
    """Two runs with one seed give the same router, bit for bit."""
    train(out="first")
    train(out="second")
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("first", "second"))
    assert torch.equal(first["router.head.weight"], second["router.head.weight"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_pads_on_the_tokenizers_side(stored, side):
    tokenizer = load_tokenizer(stored.folder)
    tokenizer.padding_side = side
    queries = encode_rows(make_rows(6, seed=3), "data", tokenizer, EXPERTS, max_length=64)
    batch = RouterCollator(tokenizer)(queries)
    assert batch["expert_labels"].tolist() == [0, 1, 2, 0, 1, 2] and batch["expert_labels"].dtype == torch.int64
    for query, input_ids, mask in zip(queries, batch["input_ids"], batch["attention_mask"]):
        assert input_ids[mask.bool()].tolist() == query["input_ids"]
        missing = len(mask) - len(query["input_ids"])
        assert not (mask[:missing] if side == "left" else mask[len(mask) - missing :]).any()


def test_padding_side_does_not_change_the_loss(stored):
    """Router loss and logits are the same on either side, up to float32 rounding."""
    tokenizer, model = load_tokenizer(stored.folder), AutoModelForCausalLM.from_pretrained(stored.folder).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.router.head.weight)
    queries = encode_rows(make_rows(7, seed=3), "data", tokenizer, EXPERTS, max_length=64)
    outputs = []
    for tokenizer.padding_side in ("left", "right"):
        with torch.no_grad():
            outputs.append(model(**RouterCollator(tokenizer)(queries)))
    torch.testing.assert_close(outputs[0].router_logits, outputs[1].router_logits)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)


def test_long_queries_are_cut(stored):
    rows = [{"text": "one two three " * 20, "expert": "math"}]
    (query,) = encode_rows(rows, "data", load_tokenizer(stored.folder), EXPERTS, max_length=5)
    assert query["input_ids"] == [3, 4, 5, 3, 4]


def test_queries_fit_the_models_positions(tmp_path, write_checkpoint):
    """A query longer than the model has learned positions is cut, whatever max_length says."""
    stored = write_checkpoint(tmp_path / "merged", "gpt2-tied")
    data = write_jsonl(
        tmp_path / "long.jsonl", [{"text": "one two " * 50, "expert": expert} for expert in EXPERTS * 2]
    )
    options = ("--max-steps", "1", "--disable-tqdm", "true", "--use-cpu")
    main(["--checkpoint", str(stored.folder), "--train-data", data, "--output-dir", str(tmp_path / "out"), *options])


def test_messages_use_the_chat_template(stored, write_tokenizer):
    rows = [{"messages": [{"role": "user", "content": "one two"}], "expert": "math", "text": None}]
    with pytest.raises(ValueError, match="row 1 has messages, but the tokenizer has no chat template"):
        encode_rows(rows, "data", load_tokenizer(stored.folder), EXPERTS, max_length=64)
    write_tokenizer(stored.folder, chat=True)
    (query,) = encode_rows(rows, "data", load_tokenizer(stored.folder), EXPERTS, max_length=64)
    assert query == {"input_ids": [16, 3, 4], "expert_labels": 1}
    rows[0]["messages"].append({"role": "assistant", "content": "three"})
    assert encode_rows(rows, "data", load_tokenizer(stored.folder), EXPERTS, max_length=64) == [query]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_file_formats(tmp_path, suffix):
    rows = make_rows(5, seed=0)
    file = str(tmp_path / f"data.{suffix}")
    getattr(Dataset.from_list(rows), "to_json" if suffix == "jsonl" else f"to_{suffix}")(file)
    assert load_rows(file) == rows


def test_split_takes_the_same_share_of_every_expert():
    """Stratified, disjoint, complete, the same for one seed; an expert with one query keeps it for training."""
    queries = [
        {"input_ids": [i], "expert_labels": label} for i, label in enumerate([0] * 40 + [1] * 20 + [2] * 2 + [3])
    ]
    train, evaluation = split_by_expert(queries, 0.1, seed=5)
    assert [sum(query["expert_labels"] == label for query in evaluation) for label in range(4)] == [4, 2, 1, 0]
    assert sorted(query["input_ids"][0] for query in train + evaluation) == list(range(63))
    assert split_by_expert(queries, 0.1, seed=5) == (train, evaluation)
    assert split_by_expert(queries, 0.1, seed=6) != (train, evaluation)


def test_metrics_against_a_plain_count():
    labels, logits = np.array([0, 0, 0, 1, 1]), np.eye(3)[[0, 2, 0, 1, 0]]
    assert confusion_matrix(labels, logits.argmax(-1), 3).tolist() == [[2, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert recalls(confusion_matrix(labels, logits.argmax(-1), 3)) == [2 / 3, 1 / 2, None]
    metrics = router_metrics(EvalPrediction(predictions=logits, label_ids=labels), EXPERTS)
    assert metrics == pytest.approx(
        {"accuracy": 0.6, "macro_recall": 7 / 12, "recall_instruct": 2 / 3, "recall_math": 0.5}
    )


def test_card_section_is_replaced(tmp_path):
    """Training twice leaves one router section, the later one."""
    card = tmp_path / "README.md"
    card.write_text("# Merged\n\n## Use\n\nText.\n\n## Limits\n\nSome.\n")
    metrics = {
        **{"expert_names": ["a", "b"], "queries": 4, "accuracy": 0.75, "macro_recall": 0.75, "loss": 0.1},
        **{"recall": {"a": 1.0, "b": None}, "confusion_matrix": [[2, 0], [0, 0]], "training": {"queries": 9}},
    }
    add_to_card(card, metrics)
    once = card.read_text()
    add_to_card(card, metrics)
    assert card.read_text() == once
    assert once.count("## Router") == 1 and "| b | 0 | 0 | - |" in once and once.endswith("## Limits\n\nSome.\n")
    assert evaluation_tables(metrics)[-1] == "accuracy 0.750, macro recall 0.750 on 4 queries"


def test_yaml_values_and_overrides(tmp_path):
    file = tmp_path / "router.yaml"
    file.write_text(
        "checkpoint: merged\ntrain-data: train.jsonl\nlearning_rate: 1e-3\nmax_length: 99\nuse_cpu: true\n"
    )
    config = ["--config", str(file), "--output-dir", str(tmp_path / "out")]
    args, training_args = parse_arguments([*config, "--max-length", "7"])
    assert (args.checkpoint, args.train_data, args.max_length) == ("merged", "train.jsonl", 7)
    assert (training_args.learning_rate, training_args.use_cpu) == (1e-3, True)
    file.write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match="unknown option 'learning_rat'"):
        parse_arguments(config)


REQUIRED = ["--checkpoint", "merged", "--train-data", "train.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "merged"], "required: --train"),
        (REQUIRED, "required: --output"),
        ([*REQUIRED, "--output-dir", "out", "--learning-rat", "1"], "unknown arguments: --learning-rat 1"),
        ([*REQUIRED, "--output-dir", "out", "--max-length", "0"], "max_length is 0"),
        ([*REQUIRED, "--output-dir", "out", "--learning-rate", "fast"], "invalid float value: 'fast'"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        parse_arguments([*arguments, "--use-cpu"])


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
    ],
)
def test_bad_rows(train, tmp_path, row, message):
    data = write_jsonl(tmp_path / "bad.jsonl", [*make_rows(2, seed=0), row])
    with pytest.raises(ValueError, match=f"bad.jsonl, {message}"):
        train("--train-data", data)
    assert not (tmp_path / "routed" / "config.json").exists()


def test_bad_messages(stored):
    tokenizer = load_tokenizer(stored.folder)
    for messages, problem in (
        ([], "messages hold no query"),
        ([{"role": "assistant", "content": "three"}], "messages hold no query"),
        ([{"role": "user", "content": " "}], "a message has no content"),
    ):
        with pytest.raises(ValueError, match=f"data, row 1: {problem}"):
            encode_rows([{"messages": messages, "expert": "math"}], "data", tokenizer, EXPERTS, max_length=64)


def test_bad_files(train, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.jsonl"):
        train("--train-data", str(tmp_path / "nowhere.jsonl"))
    columns = write_jsonl(tmp_path / "columns.jsonl", [{"question": "one", "expert": "math"}])
    with pytest.raises(ValueError, match=r"has the columns \['question', 'expert'\], expected 'expert', and 'text'"):
        train("--train-data", columns)


def test_experts_without_queries_and_shared_queries_are_warned_of(train, tmp_path, caplog):
    rows = [row for row in make_rows(30, seed=0) if row["expert"] != "code"]
    data = write_jsonl(tmp_path / "partial.jsonl", rows)
    train("--train-data", data, "--eval-data", data, "--max-steps", "1")
    assert "no training query names expert code" in caplog.text
    assert "20 of 20 evaluation queries are training queries too" in caplog.text


def test_output_with_a_model_is_kept(stored, train, tmp_path):
    """A model in the output folder is replaced only when asked for, the trained checkpoint itself never."""
    train("--max-steps", "1")
    with pytest.raises(ValueError, match="routed holds a model"):
        train("--max-steps", "1")
    train("--max-steps", "1", "--overwrite")
    with pytest.raises(ValueError, match="is the checkpoint that is trained"):
        train("--overwrite", out=stored.folder.name)
