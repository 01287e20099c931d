import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from conversion import train_router
from conversion.router.metrics import calibration, probabilities
from conversion.train_router import main
from conversion.vocabulary.prompts import load_tokenizer

ROOT = Path(__file__).parents[2]
EXPERTS = ["instruct", "math", "code"]
NEW_NAMES = {"instruct": "code", "math": "b", "code": "my-coder"}


@pytest.fixture
def train(stored, tmp_path, router_rows, write_jsonl):
    """Run the recipe on easy data; further arguments as on the command line."""

    def run(*arguments, out="routed", queries=30):
        data = write_jsonl(tmp_path / "train.jsonl", router_rows(90, seed=0))
        evaluation = write_jsonl(tmp_path / "eval.jsonl", router_rows(queries, seed=1))
        return main(
            [
                *("--checkpoint", str(stored.folder), "--train-data", data, "--eval-data", evaluation),
                *("--output-dir", str(tmp_path / out)),
                *("--augment", "false", "--disable-tqdm", "true", "--use-cpu", *arguments),
            ]
        )

    return run


@pytest.fixture
def router_of(tmp_path):
    """The router's tensors in an output folder."""

    def read(out: str) -> dict[str, torch.Tensor]:
        tensors = load_file(tmp_path / out / "model.safetensors")
        return {name: value for name, value in tensors.items() if name.startswith("router.")}

    return read


def test_trains_the_router_and_nothing_else(stored, train, tmp_path):
    """Separable queries are learned; every other tensor of the checkpoint stays bit for bit."""
    metrics = train()
    assert metrics["accuracy"] == metrics["macro_accuracy"] == 1.0
    assert metrics["confusion_matrix"] == [[10, 0, 0], [0, 10, 0], [0, 0, 10]]
    assert metrics["training"]["queries"] == 90 and metrics["queries"] == 30
    before, after = (load_file(folder / "model.safetensors") for folder in (stored.folder, tmp_path / "routed"))
    assert {key for key in before if not key.startswith("router.")} == {
        key for key in after if not key.startswith("router.")
    }
    assert after["router.ngrams.weight"].any()
    for key in before:
        assert key.startswith("router.") or torch.equal(before[key], after[key]), key
        assert before[key].dtype == after[key].dtype


def test_output_is_a_complete_checkpoint(stored, train, tmp_path):
    """Weights, code, tokenizer, card with the router's numbers, report and metrics are there; routing works."""
    metrics = train()
    out = tmp_path / "routed"
    names = {file.name for file in out.iterdir()}
    assert names >= {file.name for file in stored.folder.iterdir()}
    assert {"modeling_channel_merged.py", "configuration_channel_merged.py", "router_eval.json"} <= names
    assert "router_confusion.png" in names and (out / "router_confusion.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "router_eval.json").read_text()) == metrics
    card = (out / "README.md").read_text()
    assert (
        card.index("# 3 experts in one model")
        < card.index("## Router")
        < card.index("| math | 0 | 10 | 0 |")
        < card.index("](router_confusion.png)")
        < card.index("| eval | 30 | 100.0% |")
        < card.index("## Limits")
    )
    tokenizer, model = load_tokenizer(out), AutoModelForCausalLM.from_pretrained(out)
    inputs = tokenizer(["one plus", "def", "please hello write"], padding=True, return_tensors="pt")
    routing = model.route(inputs["input_ids"], inputs["attention_mask"])
    assert routing.expert_index.tolist() == [1, 2, 0]


def test_the_card_is_of_the_last_training(train, tmp_path):
    """Training a trained checkpoint again replaces what its card says of the router."""
    train("--max-steps", "1", "--learning-rate", "1e-9")
    assert (tmp_path / "routed" / "README.md").read_text().count("## Router") == 1
    metrics = train("--checkpoint", str(tmp_path / "routed"), out="again")
    results = ModelCard.load(tmp_path / "again" / "README.md", ignore_metadata_errors=False).data.eval_results
    assert [result.metric_value for result in results] == [metrics["accuracy"], metrics["macro_accuracy"]]
    assert {(result.dataset_name, result.dataset_type) for result in results} == {("eval.jsonl", "generator")}
    card = (tmp_path / "again" / "README.md").read_text()
    assert card.count("## Router") == 1 and "No evaluation of this model's router is known" not in card
    assert metrics["accuracy"] == 1.0 and "100.0% of 30 evaluation queries" in card


@pytest.mark.parametrize("report", ["{}", "[]", '{"experts": 5}', "{", None])
def test_without_a_report_the_card_stays(stored, train, tmp_path, caplog, report):
    """A folder whose report is none of a conversion keeps its card, which is said."""
    (stored.folder / "README.md").write_text("# Mine\n")
    file = stored.folder / "conversion_report.json"
    file.unlink() if report is None else file.write_text(report)
    train("--max-steps", "1")
    assert (tmp_path / "routed" / "README.md").read_text() == "# Mine\n"
    assert "is no report of a conversion" in caplog.text


def test_no_local_paths_are_written(stored, train, tmp_path, router_rows, write_jsonl):
    """Files and folders are shown by their names."""
    metrics = train("--checkpoint", str(stored.folder) + "/../merged/")
    assert metrics["training"]["checkpoint"] == "merged"
    assert metrics["training"]["train_data"] == ["train.jsonl"] and metrics["training"]["eval_data"] == ["eval.jsonl"]
    for file in (tmp_path / "routed").rglob("*"):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes(), file


def test_training_is_deterministic(train, router_of):
    """Two runs with one seed give the same router, bit for bit."""
    train(out="first")
    train(out="second")
    assert all(map(torch.equal, router_of("first").values(), router_of("second").values()))


def test_cached_features_change_nothing(train, router_of):
    """The trunk run once for all epochs, or in every step: the same router, up to rounding in other batches."""
    cached = train("--num-train-epochs", "2", out="cached", queries=60)
    plain = train("--num-train-epochs", "2", "--cache-features", "false", out="plain", queries=60)
    assert cached["confusion_matrix"] == plain["confusion_matrix"]
    assert cached["calibration"] == pytest.approx(plain["calibration"], rel=1e-3)
    first, second = router_of("cached"), router_of("plain")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cached", ["true", "false"])
def test_accumulated_batches_equal_a_larger_one(train, router_of, cached):
    """Batches of 4, four a step, are batches of 16, the uneven end of an epoch included."""
    options = ("--cache-features", cached, "--num-train-epochs", "2")
    train(*options, "--per-device-train-batch-size", "16", out="large")
    train(*options, "--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "4", out="small")
    first, second = router_of("large"), router_of("small")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


def test_probabilities_are_calibrated(train, tmp_path, router_rows, write_jsonl):
    """The temperature comes from sources left out of the training data; what is reported is what the model does."""
    sources = [[{**row, "source": f"s{seed}"} for row in router_rows(60, seed)] for seed in (3, 4)]
    data = write_jsonl(tmp_path / "two.jsonl", sources[0] + sources[1])
    metrics = train("--train-data", data, queries=60)
    assert metrics["training"]["temperature_from"] == "training queries of 2 sources, each left out in turn"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "routed"), load_tokenizer(tmp_path / "routed")
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    routing = model.route(inputs["input_ids"], inputs["attention_mask"])
    logits, labels = routing.logits.numpy(), np.array([EXPERTS.index(row["expert"]) for row in rows])
    temperature = model.config.router["temperature"]
    assert temperature == metrics["calibration"]["temperature"] != 1.0
    assert routing.probabilities.numpy() == pytest.approx(probabilities(logits, temperature), abs=1e-6)
    expected = calibration(logits, labels, ["eval"] * 60, temperature)
    assert metrics["calibration"]["ece"] == pytest.approx(expected["ece"], abs=1e-4)
    again = train("--train-data", data, "--eval-data", data, out="other")
    assert again["calibration"]["temperature"] == pytest.approx(temperature)  # whatever is evaluated


def test_training_again_counts_anew(train, router_of, tmp_path):
    """What an earlier training left has no part in it."""
    train()
    train("--checkpoint", str(tmp_path / "routed"), out="again")
    first, second = router_of("routed"), router_of("again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_threshold_is_stored(stored, train, tmp_path):
    metrics = train("--threshold", "0.7", "--max-length", "40")
    config = json.loads((tmp_path / "routed" / "config.json").read_text())
    assert (config["router"]["threshold"], config["router"]["max_tokens"]) == (0.7, 40)
    assert metrics["threshold"] == 0.7
    assert (
        "Where the default expert is itself more probable than 0.3, it answers"
        in (tmp_path / "routed" / "README.md").read_text()
    )
    train("--max-steps", "1", out="plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (
        config["router"]["threshold"] == 0.0 and config["router"]["max_tokens"] == stored.config.router["max_tokens"]
    )


def test_variants_are_counted(train, router_of):
    """By default a variant of each training query counts beside it; the number of queries stays what it is."""
    metrics = train("--augment", "true", out="both")
    train(out="plain")
    assert metrics["training"]["queries"] == 90
    both, plain = (router_of(name)["router.ngrams.weight"].any(-1).sum() for name in ("both", "plain"))
    assert both > plain


def test_generated_queries_train_and_are_not_held_out(train, tmp_path, router_rows, write_jsonl):
    data = write_jsonl(tmp_path / "own.jsonl", router_rows(30, seed=0))
    generated = [{**row, "generated": True} for row in router_rows(60, seed=2)]
    more = write_jsonl(tmp_path / "more.jsonl", generated)
    options = ("--checkpoint", str(tmp_path / "merged"), "--output-dir", str(tmp_path / "out"), "--use-cpu")
    metrics = main([*options, "--train-data", data, more, "--max-steps", "1", "--disable-tqdm", "true"])
    assert metrics["training"]["queries"] == 27 and metrics["training"]["generated_queries"] == 60
    assert metrics["queries"] == 3 and metrics["sources"].keys() == {"own"}


def test_names_of_experts_decide_nothing(stored, train, router_of, tmp_path, write_jsonl, router_rows):
    """Other names, the same router, bit for bit, and the same evaluation."""
    first = train("--max-steps", "5", "--augment", "true", out="first")
    file = stored.folder / "config.json"
    names = re.compile("|".join(f'"{name}"' for name in NEW_NAMES))
    file.write_text(names.sub(lambda found: f'"{NEW_NAMES[found[0][1:-1]]}"', file.read_text()))
    rows = {seed: [{**row, "expert": NEW_NAMES[row["expert"]]} for row in router_rows(90, seed)] for seed in (0, 1)}
    files = [write_jsonl(tmp_path / f"{seed}.jsonl", part[: 90 - 60 * seed]) for seed, part in rows.items()]
    options = ("--train-data", files[0], "--eval-data", files[1], "--max-steps", "5", "--augment", "true")
    second = train(*options, out="second")
    assert all(map(torch.equal, router_of("first").values(), router_of("second").values()))
    assert list(second["recall"]) == list(NEW_NAMES.values()) != list(first["recall"])
    for key in ("confusion_matrix", "calibration", "thresholds"):
        assert first[key] == second[key]


def test_several_sources(train, tmp_path, router_rows, write_jsonl):
    """Several files train together, and each is a source of its own in the report."""
    files = [write_jsonl(tmp_path / f"{name}.jsonl", router_rows(30, seed)) for seed, name in enumerate("ab")]
    metrics = train("--train-data", *files, "--eval-data", *files)
    assert metrics["training"]["queries"] == 60
    assert {name: source["queries"] for name, source in metrics["sources"].items()} == {"a": 30, "b": 30}


def test_held_out_queries_are_named(train, tmp_path, router_rows, write_jsonl, caplog):
    """Without evaluation data even a handful of queries gives some up, and the log says how many."""
    data = write_jsonl(tmp_path / "few.jsonl", router_rows(9, seed=0))
    with caplog.at_level("INFO", logger="conversion"):
        metrics = main(
            [
                *("--checkpoint", str(tmp_path / "merged"), "--train-data", data, "--max-steps", "1", "--use-cpu"),
                *("--output-dir", str(tmp_path / "few"), "--disable-tqdm", "true"),
            ]
        )
    assert (metrics["training"]["queries"], metrics["queries"]) == (6, 3)
    assert "3 of 9 training queries are held out to evaluate and not trained on: instruct 1 of 3" in caplog.text


def stop_at_step(monkeypatch, step):
    """Let training be interrupted when it comes to a step."""
    training_step, calls = Trainer.training_step, []

    def stop(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == step:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stop)


def test_resumed_training_equals_uninterrupted(train, router_of, tmp_path, monkeypatch):
    """`--resume-from-checkpoint true` goes on from the last checkpoint, which holds the router alone."""
    saving = ("--save-strategy", "steps", "--save-steps", "25", "--num-train-epochs", "10")
    train(*saving, out="whole")
    saved = load_file(tmp_path / "whole" / "checkpoint-50" / "model.safetensors")
    assert saved.keys() == router_of("whole").keys()
    stop_at_step(monkeypatch, 60)
    with pytest.raises(KeyboardInterrupt):
        train(*saving, out="parts")
    assert not (tmp_path / "parts").exists()
    (kept,) = tmp_path.glob(".parts.partial-*")
    (kept / "checkpoint-55").mkdir()  # as if it had been killed while it saved that
    monkeypatch.undo()
    train(*saving, "--resume-from-checkpoint", "true", out="parts")
    assert not list(tmp_path.glob(".parts.*"))
    first, second = router_of("whole"), router_of("parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_best_router_is_kept(train):
    """The Trainer's own options work: evaluation in between, and the best checkpoint at the end."""
    metrics = train(
        *("--learning-rate", "20", "--num-train-epochs", "3", "--eval-strategy", "epoch", "--save-strategy", "best"),
        *("--load-best-model-at-end", "true", "--metric-for-best-model", "macro_accuracy"),
    )
    assert metrics["macro_accuracy"] == 1.0


def test_without_matplotlib(train, tmp_path, monkeypatch, caplog):
    """The picture is left out, and the log says how to get it."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level("INFO", logger="conversion"):
        train("--max-steps", "1")
    assert "pip install 'channel-merged[plot]'" in caplog.text
    assert not (tmp_path / "routed" / "router_confusion.png").exists()
    assert "router_confusion.png" not in (tmp_path / "routed" / "README.md").read_text()


@pytest.mark.slow
def test_two_processes(stored, tmp_path, router_rows, write_jsonl, run_on_two_processes):
    """`torchrun` on two CPU processes: both train on their share, and one of them speaks and saves."""
    data = write_jsonl(tmp_path / "train.jsonl", router_rows(90, seed=0))
    evaluation = write_jsonl(tmp_path / "eval.jsonl", router_rows(31, seed=1))  # odd: one process has one more
    result = run_on_two_processes(
        *("train-router", str(stored.folder)),
        *("--train-data", data, "--eval-data", evaluation, "--output-dir", str(tmp_path / "routed")),
        *("--learning-rate", "0.1", "--num-train-epochs", "10", "--disable-tqdm", "true"),
        *("--per-device-train-batch-size", "8", "--max-grad-norm", "0", "--use-cpu"),
    )
    assert result.stdout.count("Queries by source") == result.stderr.count("saved the trained checkpoint") == 1
    metrics = json.loads((tmp_path / "routed" / "router_eval.json").read_text())
    assert (metrics["queries"], metrics["accuracy"]) == (31, 1.0)
    assert np.array(metrics["confusion_matrix"]).sum() == 31
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "routed")
    assert model.route(torch.tensor([[3, 6], [8, 8]])).expert_index.tolist() == [1, 2]


def test_queries_fit_the_models_positions(tmp_path, write_checkpoint, write_jsonl):
    """A query longer than the model has learned positions is shortened."""
    stored = write_checkpoint(tmp_path / "merged", "gpt2-tied")
    data = write_jsonl(
        tmp_path / "long.jsonl", [{"text": "one two " * 50, "expert": expert} for expert in EXPERTS * 2]
    )
    options = ("--max-steps", "1", "--disable-tqdm", "true", "--use-cpu")
    main(["--checkpoint", str(stored.folder), "--train-data", data, "--output-dir", str(tmp_path / "out"), *options])


def test_bad_data_are_found_before_training(train, tmp_path, router_rows, write_jsonl):
    """The file and the row are named, and no output appears."""
    data = write_jsonl(tmp_path / "bad.jsonl", [*router_rows(2, seed=0), {"text": "one", "expert": "maths"}])
    with pytest.raises(ValueError, match="bad.jsonl, row 3: unknown expert 'maths'"):
        train("--train-data", data)
    assert not (tmp_path / "routed" / "config.json").exists()


def test_experts_without_queries_and_shared_queries_are_warned_of(train, tmp_path, router_rows, write_jsonl, caplog):
    rows = [row for row in router_rows(30, seed=0) if row["expert"] != "code"]
    data = write_jsonl(tmp_path / "partial.jsonl", rows)
    train("--train-data", data, "--eval-data", data, "--max-steps", "1")
    assert "no training query names expert code" in caplog.text
    assert "20 of 20 evaluation queries are training queries too" in caplog.text


def test_output_with_a_model_is_kept(stored, train, tmp_path):
    """A model in the output folder is replaced only when asked for, the trained checkpoint itself never."""
    train("--max-steps", "1")
    with pytest.raises(ValueError, match="routed is not empty"):
        train("--max-steps", "1")
    train("--max-steps", "1", "--overwrite")
    with pytest.raises(ValueError, match="does not say what was written there"):
        train("--overwrite", out=stored.folder.name)


def test_a_failure_changes_nothing(stored, train, tmp_path, monkeypatch):
    """Neither a folder that is not there yet, nor an old model that is to be replaced."""
    monkeypatch.setattr(train_router, "plot_confusion", fail)
    with pytest.raises(OSError, match="no more"):
        train("--max-steps", "1")
    assert not list(tmp_path.glob("*routed*"))
    monkeypatch.undo()
    train("--max-steps", "1")
    before = {file: file.read_bytes() for file in (tmp_path / "routed").rglob("*") if file.is_file()}
    monkeypatch.setattr(train_router, "plot_confusion", fail)
    with pytest.raises(OSError, match="no more"):
        train("--max-steps", "2", "--overwrite")
    assert {file: file.read_bytes() for file in (tmp_path / "routed").rglob("*") if file.is_file()} == before
    assert not list(tmp_path.glob(".routed*"))


def fail(*args):
    raise OSError("no more")


def test_a_checkpoint_that_changes_during_training_is_not_mixed(stored, train, tmp_path, monkeypatch):
    plot = train_router.plot_confusion

    def change(*args):
        os.utime(stored.folder / "model.safetensors")
        return plot(*args)

    monkeypatch.setattr(train_router, "plot_confusion", change)
    with pytest.raises(ValueError, match="merged/model.safetensors was changed while it was read"):
        train("--max-steps", "1")
    assert not (tmp_path / "routed").exists()


def test_a_model_is_replaced_only_when_asked(train, tmp_path):
    """Going on from a checkpoint elsewhere does not ask for it; from the output's own last one it does."""
    saving = ("--save-strategy", "steps", "--save-steps", "1", "--max-steps", "1")
    train(*saving, out="first")
    before = (tmp_path / "first" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is not empty: choose another, or replace a model with --overwrite"):
        train(*saving, "--resume-from-checkpoint", str(tmp_path / "first" / "checkpoint-1"), out="first")
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == before


def test_nothing_to_go_on_from_is_said(train):
    with pytest.raises(ValueError, match="there is no checkpoint-\\* of the same training to go on from"):
        train("--resume-from-checkpoint", "true")
