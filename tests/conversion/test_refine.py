"""Refinement from end to end, on tiny experts whose merge has changed them much."""

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from conversion import refine as door
from conversion.__main__ import app
from conversion.__main__ import main as command
from conversion.convert import convert
from conversion.io.foreign_files import read_json
from conversion.merging.recipe import parse_recipe
from conversion.refine import main, refine
from conversion.refinement import teachers
from conversion.router.metrics import evaluate_router

ROOT = Path(__file__).parents[2]
NAMES = ["e0", "e1", "e2"]
WITHOUT_TORCHAO = pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed")
OPTIONS = {
    **{"max_steps": 20, "per_device_train_batch_size": 12, "learning_rate": 2e-2, "top_k": 300},
    **{"disable_tqdm": True, "use_cpu": True, "patience": 9, "eval_steps": 0.25, "save_steps": 0.25},
}


def calibration_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """So many texts of each expert, of random letters."""
    generator = random.Random(seed)

    def text(length):
        return "".join(generator.choices("abcdefgh ", k=length)) + "x"

    return [
        {"prompt": text(generator.randint(1, 9)), "completion": text(generator.randint(1, 9)), "expert": name}
        for _ in range(count)
        for name in NAMES
    ]


@pytest.fixture
def make_merged(tmp_path, make_experts, write_recipe, write_jsonl):
    """Factory of a recipe, and of the merged checkpoint beside it: `make_merged(family, dtype=, **keys)`."""

    def make(family="llama", dtype=torch.float32, count=20, **keys):
        base, experts = make_experts(family, 3, dtype=dtype, delta_scale=0.3, initializer_range=0.3)
        write_jsonl(tmp_path / "texts.jsonl", calibration_rows(count))
        keys = {"grouping": {"num_groups": 2, "similarity": "l2"}, "calibration": {"data": "texts.jsonl"}, **keys}
        write_recipe(base, experts, tmp_path / "recipe.json", **keys)
        recipe = parse_recipe(json.loads((tmp_path / "recipe.json").read_text()), tmp_path)
        convert(recipe, tmp_path / "merged", progress=False)
        return recipe

    return make


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_rows_come_nearer_to_their_experts(make_merged, tmp_path, family):
    """Every expert's divergence on held-out texts falls; only rows change, each in its place and dtype."""
    recipe = make_merged(family)
    record = refine(tmp_path / "merged", recipe, tmp_path / "refined", **OPTIONS)
    assert record["improved"] and record["kl_after"] < 0.8 * record["kl_before"]
    for own in record["experts"].values():
        assert own["kl_after"] < own["kl_before"] and (own["texts"], own["held_out"]) == (16, 4)
    before, after = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "refined")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype and before[name].shape == after[name].shape
        assert torch.equal(before[name], after[name]) != (".rows." in name), name


def test_what_is_reported_is_what_was_saved(make_merged, tmp_path):
    """The reported divergence is that of the output from the experts' own checkpoints, over all tokens."""
    recipe = make_merged(dtype=torch.bfloat16)
    record = refine(tmp_path / "merged", recipe, tmp_path / "refined", **OPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "refined")
    plan = door.make_plan(recipe)
    texts = door.read_texts(plan, str(tmp_path / "texts.jsonl"))
    _, held_out = door.hold_out(texts, 0.1, 42, NAMES)
    assert tokenizer.decode(held_out[0].input_ids).startswith(tuple("abcdefgh "))
    for folder, key in (("merged", "kl_before"), ("refined", "kl_after")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        for number, name in enumerate(NAMES):
            expert = AutoModelForCausalLM.from_pretrained(recipe.experts[number].model, dtype=torch.float32)
            total = count = 0
            for text in held_out:
                if text.expert == number:
                    ids = torch.tensor([text.input_ids])
                    with torch.no_grad():
                        p = expert(ids).logits[0, :-1].log_softmax(-1)
                        q = model(ids, expert_index=name).logits[0, :-1].log_softmax(-1)
                    total, count = total + (p.exp() * (p - q)).sum().item(), count + len(p)
            assert record["experts"][name][key] == pytest.approx(total / count, rel=1e-3), (folder, name)


def test_output_is_a_complete_checkpoint(make_merged, tmp_path, without_package):
    """It loads offline without this package, generates as each expert, and its card says what was done."""
    recipe = make_merged()
    record = refine(tmp_path / "merged", recipe, tmp_path / "refined", **OPTIONS)
    out = tmp_path / "refined"
    assert {file.name for file in out.iterdir()} == {file.name for file in (tmp_path / "merged").iterdir()}
    report = read_json(out / "conversion_report.json")
    assert report["refinement"] == json.loads(json.dumps(record))
    assert {key: value for key, value in report.items() if key != "refinement"} == read_json(
        tmp_path / "merged" / "conversion_report.json"
    )
    card = (out / "README.md").read_text()
    assert card.index("## How it was made") < card.index("## Refinement of the stored rows") < card.index("## Limits")
    assert f"| all | 48 | 12 | {record['kl_before']:.4f} | {record['kl_after']:.4f} |" in card
    (result,) = ModelCard(card, ignore_metadata_errors=False).data.eval_results
    assert (result.metric_type, result.metric_value) == ("kl_divergence", record["kl_after"])
    assert result.dataset_name.endswith(".jsonl, a part held out") and "/" not in result.dataset_name
    assert json.loads((out / "config.json").read_text())["merge"]["refinement"]["improved"] is True
    script = f"""
{without_package}
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(out)!r}, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)
print(model.generate(**tokenizer(["ab"], return_tensors="pt"), expert_index="e1", max_new_tokens=2).shape[0])
"""
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.strip() == "1", result.stderr


def test_never_worse_than_the_input(make_merged, tmp_path):
    """A training that gains nothing gives the input's tensors bit for bit, and says so."""
    recipe = make_merged()
    record = refine(
        tmp_path / "merged", recipe, tmp_path / "out", **{**OPTIONS, "learning_rate": 100, "warmup_steps": 0}
    )
    assert not record["improved"] and record["kl_before"] == record["kl_after"]
    assert min(value for step, value in record["evaluations"].items() if step) > record["kl_before"]
    before, after = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "bit for bit as they were" in card


def test_gains_that_rounding_takes_are_no_gains(make_merged, tmp_path, monkeypatch):
    """What is measured last is what would be stored: rows that are worse once rounded are not."""
    recipe = make_merged()

    def badly(model, dtypes):
        assert dtypes["model.lm_head.rows.weight"] == torch.float32
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-3)

    monkeypatch.setattr(door, "round_to_stored", badly)
    record = refine(tmp_path / "merged", recipe, tmp_path / "out", **OPTIONS)
    assert min(record["evaluations"].values()) < record["kl_before"] and not record["improved"]
    before, after = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_best_rows_are_kept(make_merged, tmp_path):
    """What ends worse than it once was is stored as it was at its best."""
    recipe = make_merged()
    options = {**OPTIONS, "learning_rate": 0.2, "lr_scheduler_type": "linear", "max_steps": 40}
    record = refine(tmp_path / "merged", recipe, tmp_path / "out", **options)
    evaluations = record["evaluations"]
    assert record["improved"] and record["kl_after"] == pytest.approx(min(evaluations.values()), rel=1e-5)
    assert evaluations[record["best_step"]] == min(evaluations.values())


def test_training_stops_without_progress(make_merged, tmp_path):
    recipe = make_merged()
    options = {**OPTIONS, "learning_rate": 0, "patience": 2, "max_steps": 100}
    assert refine(tmp_path / "merged", recipe, tmp_path / "out", **options)["steps"] == 75


def test_a_loss_that_is_not_finite_ends_the_training(make_merged, tmp_path, monkeypatch, caplog):
    """The rows do not see it, and the best ones so far are stored."""
    recipe = make_merged()
    compute_loss, calls = door.RefinementTrainer.compute_loss, []

    def overflow(self, *args, **kwargs):
        calls.append(None)
        return compute_loss(self, *args, **kwargs) * (float("nan") if len(calls) == 13 else 1)

    monkeypatch.setattr(door.RefinementTrainer, "compute_loss", overflow)
    record = refine(tmp_path / "merged", recipe, tmp_path / "out", **OPTIONS)
    assert "the loss of step 13 is not finite: training ends here" in caplog.text
    assert (record["steps"], record["best_step"], record["improved"]) == (13, 10, True)
    assert all(tensor.isfinite().all() for tensor in tensors_of(tmp_path / "out").values())


def test_rows_of_a_single_owner_can_stay(make_merged, tmp_path):
    """Bit for bit, while the shared ones train."""
    recipe = make_merged("qwen2")
    refine(tmp_path / "merged", recipe, tmp_path / "out", freeze_single_owner_rows=True, **OPTIONS)
    before, after = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for path, module in model.channel_modules().items():
        owners = torch.zeros(module.num_rows)
        for index in module.channel_index.long():
            owners[index.unique()] += 1
        for name in (f"model.{path}.rows.weight", f"model.{path}.rows.bias"):
            if name in before:
                same = (before[name] == after[name]).flatten(1).all(1) if before[name].dim() == 2 else None
                if same is not None:
                    assert torch.equal(same, owners <= 1), name
                else:
                    assert torch.equal(before[name][owners <= 1], after[name][owners <= 1]), name


def test_what_is_kept_per_expert_can_train(make_merged, tmp_path):
    """It is asked for, and a refinement of the result still knows its experts."""
    recipe = make_merged()
    refine(tmp_path / "merged", recipe, tmp_path / "out", train_per_expert=True, **OPTIONS)
    before, after = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".rows." in name or ".experts." in name}
    assert refine(tmp_path / "out", recipe, tmp_path / "again", **{**OPTIONS, "learning_rate": 1e-3})["experts"]


def test_the_result_is_deterministic(make_merged, tmp_path):
    recipe = make_merged()
    for name in ("first", "second"):
        refine(tmp_path / "merged", recipe, tmp_path / name, **OPTIONS)
    first, second = tensors_of(tmp_path / "first"), tensors_of(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_accumulated_batches_equal_a_larger_one(make_merged, tmp_path):
    """Four of three texts are one of twelve, to rounding."""
    recipe = make_merged()
    options = {**OPTIONS, "max_steps": 4, "adam_epsilon": 1e-3}
    refine(tmp_path / "merged", recipe, tmp_path / "large", **options)
    small = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    refine(tmp_path / "merged", recipe, tmp_path / "small", **{**options, **small})
    first, second = tensors_of(tmp_path / "large"), tensors_of(tmp_path / "small")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)


def test_a_stopped_run_goes_on(make_merged, tmp_path, monkeypatch):
    """The same call gives what an uninterrupted one does, and no teacher runs a second time."""
    recipe = make_merged()
    refine(tmp_path / "merged", recipe, tmp_path / "whole", **OPTIONS)
    training_step, calls = Trainer.training_step, []

    def stop(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        refine(tmp_path / "merged", recipe, tmp_path / "parts", **OPTIONS)
    assert not (tmp_path / "parts").exists()
    (kept,) = tmp_path.glob(".parts.partial-*")
    (kept / ".journal" / "checkpoint-14").mkdir()  # as if it had been killed while it saved that
    monkeypatch.undo()
    monkeypatch.setattr(teachers, "distributions", fail)
    refine(tmp_path / "merged", recipe, tmp_path / "parts", **OPTIONS)
    assert not list(tmp_path.glob(".parts.*"))
    first, second = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    records = [read_json(tmp_path / name / "conversion_report.json")["refinement"] for name in ("whole", "parts")]
    assert records[0] | {"seconds": 0} == records[1] | {"seconds": 0}


def fail(*args):
    raise OSError("no more")


def test_a_failure_leaves_nothing_that_loads(make_merged, tmp_path, monkeypatch):
    """Neither a new folder, nor a change of the old one that was to be replaced."""
    recipe = make_merged()
    options = {**OPTIONS, "max_steps": 2}
    refine(tmp_path / "merged", recipe, tmp_path / "out", **options)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    monkeypatch.setattr(door, "write_files", fail)
    with pytest.raises(OSError, match="no more"):
        refine(tmp_path / "merged", recipe, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
    with pytest.raises(OSError, match="no more"):
        refine(tmp_path / "merged", recipe, tmp_path / "out", overwrite=True, **options)
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before


def test_a_trained_router_is_compared(make_merged, tmp_path, caplog):
    """Its trunk is an expert's first blocks: prompts that go elsewhere than before are counted, and it is said."""
    recipe = make_merged()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        model.router.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    tensors = tensors_of(tmp_path / "merged") | {"router.head.weight": model.router.head.weight.detach()}
    save_file(tensors, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    record = refine(tmp_path / "merged", recipe, tmp_path / "out", **OPTIONS)
    assert record["router"]["prompts"] == 60 and 0 < record["router"]["moved"] < 60
    text = f"{record['router']['moved']} of 60 prompts to another expert than before"
    assert f"the router sends {text}" in caplog.text and "train it again" in caplog.text
    assert f"sends {record['router']['moved']} to another expert than before" in (
        tmp_path / "out" / "README.md"
    ).read_text().replace("\n", " ")
    assert torch.equal(tensors["router.head.weight"], tensors_of(tmp_path / "out")["router.head.weight"])


def test_command_line(make_merged, tmp_path):
    """The same as the function; `refine:` of the recipe gives options, which the command line overrides."""
    own = {**OPTIONS, "max_steps": 7, "learning_rate": "2e-2"}
    make_merged(refine=own)
    command = [sys.executable, "-m", "conversion", "refine", str(tmp_path / "merged")]
    command += ["--recipe", str(tmp_path / "recipe.json"), "--output-dir", str(tmp_path / "out"), "--top-k", "9"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    record = read_json(tmp_path / "out" / "conversion_report.json")["refinement"]
    assert (record["steps"], record["options"]["top_k"], record["options"]["learning_rate"]) == (7, 9, 2e-2)
    assert "KL a token before" in result.stdout and "the best of 7 steps" in result.stdout
    assert str(tmp_path) not in json.dumps(record)


def test_convert_refines_where_the_recipe_says_so(make_merged, tmp_path):
    """One command; what was converted on the way is gone, and the result is that of the two commands."""
    recipe = make_merged()
    refine(tmp_path / "merged", recipe, tmp_path / "refined", **OPTIONS)
    data = json.loads((tmp_path / "recipe.json").read_text())
    own = {key: value for key, value in OPTIONS.items() if key not in ("disable_tqdm", "use_cpu")}
    (tmp_path / "recipe.json").write_text(json.dumps({**data, "refine": own}))
    app(["convert", str(tmp_path / "recipe.json"), str(tmp_path / "out"), "--no-progress"], standalone_mode=False)
    assert not list(tmp_path.glob(".out*"))
    assert read_json(tmp_path / "out" / "conversion_report.json")["refinement"]["improved"]
    expected, found = tensors_of(tmp_path / "refined"), tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def with_refine(tmp_path, **own) -> list[str]:
    """The command line of a conversion whose recipe refines; `own` are keys of the recipe."""
    data = json.loads((tmp_path / "recipe.json").read_text())
    options = {key: value for key, value in OPTIONS.items() if key not in ("disable_tqdm", "use_cpu")}
    (tmp_path / "recipe.json").write_text(json.dumps({**data, "refine": options, **own}))
    return ["convert", str(tmp_path / "recipe.json"), str(tmp_path / "out"), "--no-progress"]


@pytest.mark.parametrize("stop", ["teachers", "training"])
def test_a_conversion_that_refines_goes_on(make_merged, tmp_path, monkeypatch, caplog, stop):
    """Stopped while it refines, it converts nothing twice, asks no expert twice, and gives the same bytes."""
    make_merged()
    arguments = with_refine(tmp_path)
    asked, load = [], door.load_expert_model

    def load_counted(plan, number, *args):
        asked.append(number)
        if stop == "teachers" and len(asked) == 2:
            raise KeyboardInterrupt
        return load(plan, number, *args)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(door, "load_expert_model", load_counted)
    with monkeypatch.context() as patch:
        if stop == "training":
            patch.setattr(door, "round_to_stored", interrupt)
        with pytest.raises(SystemExit):
            command(arguments)
    kept = tmp_path / ".out.unrefined" / "merged"
    assert not (tmp_path / "out").exists() and f"the merged model, not refined, is kept in {kept}" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr("conversion.convert.group_modules", None)  # nothing is grouped again
        app(arguments, standalone_mode=False)
    assert asked == ([0, 1, 1, 2] if stop == "teachers" else [0, 1, 2])
    assert not list(tmp_path.glob(".out*"))
    refined = tensors_of(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "stopped")
    app(arguments, standalone_mode=False)
    assert all(torch.equal(tensor, refined[name]) for name, tensor in tensors_of(tmp_path / "out").items())


def test_a_conversion_on_the_cpu_may_refine_in_bfloat16(make_merged, tmp_path):
    make_merged()
    app(with_refine(tmp_path, refine={"max_steps": 2, "bf16": True}), standalone_mode=False)
    assert read_json(tmp_path / "out" / "conversion_report.json")["refinement"]["options"]["bf16"]


def test_a_dry_run_says_what_refining_takes(make_merged, tmp_path, capsys):
    """It refuses what the conversion would refuse, too."""
    make_merged()
    app([*with_refine(tmp_path), "--dry-run"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "to read, 3 times" in said
    assert "refinement  20 steps, 12 texts at a time; about " in said and f"{300 * 8 + 4:,} bytes a token" in said
    with pytest.raises(ValueError, match="no calibration texts to refine on"):
        app([*with_refine(tmp_path, calibration={"file": "f.safetensors"}), "--dry-run"], standalone_mode=False)
    assert not list(tmp_path.glob("*out*"))


def test_a_conversion_that_refines_no_more_leaves_nothing(make_merged, tmp_path, monkeypatch):
    make_merged()
    arguments = with_refine(tmp_path)
    monkeypatch.setattr(door, "load_expert_model", None)
    with pytest.raises(TypeError):
        app(arguments, standalone_mode=False)
    assert (tmp_path / ".out.unrefined").exists()
    app(with_refine(tmp_path, refine=None)[:-1] + ["--no-progress"], standalone_mode=False)
    assert (tmp_path / "out" / "config.json").exists() and not list(tmp_path.glob(".out*"))


def test_a_refined_conversion_has_the_folder_and_shards_that_were_asked_for(make_merged, tmp_path):
    make_merged()
    (tmp_path / "out").mkdir()  # as a mount point: it stays the folder that it is
    inode = (tmp_path / "out").stat().st_ino
    app([*with_refine(tmp_path), "--max-shard-size", "30KB"], standalone_mode=False)
    assert (tmp_path / "out").stat().st_ino == inode and not list(tmp_path.rglob(".out*"))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"calibration": {"file": "calibration.safetensors"}}, "no calibration texts to refine on"),
        ({"refine": {"train_data": "nothing.jsonl"}}, "there is no file .*nothing.jsonl"),
        ({"refine": {"train_data": "one.jsonl"}}, "expert 'e1' has 1 texts, expected at least 2"),
    ],
)
def test_texts_that_cannot_refine_are_told_before_it_is_converted(make_merged, tmp_path, write_jsonl, keys, message):
    make_merged()
    rows = calibration_rows(2)
    write_jsonl(tmp_path / "one.jsonl", rows[:4])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        app(with_refine(tmp_path, **keys), standalone_mode=False)
    assert not list(tmp_path.glob(".out*"))


def test_train_data_of_a_recipe_lies_beside_it(make_merged, tmp_path, write_jsonl, monkeypatch):
    """What is written down names it without its folder."""
    make_merged()
    write_jsonl(tmp_path / "more.jsonl", calibration_rows(6, seed=1))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    app(
        with_refine(tmp_path, refine={**OPTIONS, "train_data": "../" + tmp_path.name + "/more.jsonl"}),
        standalone_mode=False,
    )
    report = read_json(tmp_path / "out" / "conversion_report.json")
    assert report["refinement"]["data"] == report["recipe"]["refine"]["train_data"] == "more.jsonl"
    assert report["recipe"]["calibration"] == {"data": "texts.jsonl"}


def test_texts_longer_than_the_model_are_cut(make_merged, tmp_path, write_jsonl, caplog):
    """A GPT-2 of 64 positions has no others."""
    recipe = make_merged("gpt2")
    rows = calibration_rows(4)
    rows[0]["prompt"] = "abcdefgh" * 20
    write_jsonl(tmp_path / "texts.jsonl", rows)
    record = refine(tmp_path / "merged", recipe, tmp_path / "out", **{**OPTIONS, "max_steps": 2})
    assert "1 of 12 texts have more than 64 tokens" in caplog.text and record["experts"]["e0"]["texts"] == 2


@pytest.mark.slow
def test_two_processes(make_merged, tmp_path, run_on_two_processes):
    """`torchrun` on two CPU processes: one asks the teachers, both train, one speaks and saves."""
    make_merged()
    # One step on all texts, whose gradient no order of the texts changes.
    own = {**OPTIONS, "max_steps": 1, "eval_steps": 1, "save_steps": 1, "warmup_steps": 0, "optim": "sgd"}
    own |= {"learning_rate": 1.0, "per_device_train_batch_size": 24}
    options = [text for name, value in own.items() for text in (f"--{name}", str(value))]
    result = run_on_two_processes(
        *("refine", str(tmp_path / "merged"), "--recipe", str(tmp_path / "recipe.json")),
        *("--output-dir", str(tmp_path / "out"), *options),
    )
    assert result.stdout.count("KL a token") == result.stderr.count("saved the refined checkpoint") == 1
    own["per_device_train_batch_size"] = 48
    alone = refine(tmp_path / "merged", tmp_path / "recipe.json", tmp_path / "alone", **own)
    record = read_json(tmp_path / "out" / "conversion_report.json")["refinement"]
    assert record["kl_before"] == pytest.approx(alone["kl_before"], rel=1e-4)
    assert alone["improved"] and record["kl_after"] == pytest.approx(alone["kl_after"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rat": 1}, "refine: unknown option 'learning_rat'"),
        ({"top_k": 0}, "top_k is 0, expected at least 1"),
        ({"eval_share": 1}, "eval_share is 1.0, expected a share"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of float32"),
        ({"freeze_single_owner_rows": True, "weight_decay": 0.1}, "weight_decay is 0.1, expected 0 with"),
        ({"variants": -1}, "variants is -1, expected at least 0"),
        pytest.param({"optim": "adamw_torch_8bit"}, "You need to have `torchao", marks=WITHOUT_TORCHAO),
        ({"train_data": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
    ],
)
def test_bad_options(make_merged, tmp_path, options, message):
    recipe = make_merged(count=2)
    with pytest.raises((ValueError, OSError, TypeError), match=message):
        refine(tmp_path / "merged", recipe, tmp_path / "out", **options, use_cpu=True)
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_texts_is_an_error(make_merged, tmp_path):
    recipe = make_merged(calibration=None)
    with pytest.raises(
        ValueError, match=r"no calibration texts to refine on: give calibration.data there or --train-"
    ):
        refine(tmp_path / "merged", recipe, tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"output_dir": "elsewhere"}, "refine.output_dir of the recipe is given where the recipe is used"),
        ({"max_shard_size": "1GB"}, "refine.max_shard_size of the recipe is given where the recipe is used"),
        pytest.param(
            *({"deepspeed": "zero.json"}, "deepspeed.* was not found"),
            marks=pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed"),
        ),
        ({"learning_rat": 1}, "refine: unknown option 'learning_rat'"),
        ({"max_steps": "many"}, "invalid int value: 'many'"),
        ({"max_steps": 2.5}, "invalid int value: '2.5'"),
    ],
)
def test_options_of_a_recipe_are_checked_before_it_is_converted(make_merged, tmp_path, own, message):
    with pytest.raises(ValueError, match=message):
        make_merged(refine=own)
    assert not (tmp_path / "merged").exists()


def test_other_experts_are_refused(make_merged, make_experts, write_recipe, tmp_path):
    """By their names, their number, what the checkpoint keeps of them exactly, or their architecture."""
    recipe = make_merged()
    base, experts = (Path(recipe.base_model), [Path(spec.model) for spec in recipe.experts])
    keys = {"calibration": {"data": "texts.jsonl"}}

    def attempt(base, experts, **changes):
        data = write_recipe(base, experts, **keys) | changes
        refine(tmp_path / "merged", parse_recipe(data, tmp_path), tmp_path / "out", **OPTIONS)

    with pytest.raises(ValueError, match="the experts of merged are e0, e1, e2, those of the recipe e0, e1"):
        attempt(base, experts[:2])
    swapped = [experts[1], experts[0], experts[2]]
    with pytest.raises(
        ValueError, match=r"expert 'e0' of merged is not the recipe's .*expert1: model.layers.0.*differs"
    ):
        attempt(base, swapped)
    other, others = make_experts("llama", 3, seed=5, intermediate_size=48)
    with pytest.raises(ValueError, match="merged is of another architecture"):
        attempt(other, others)
    assert not (tmp_path / "out").exists()


def test_an_output_with_a_model_is_kept(make_merged, tmp_path):
    recipe = make_merged(count=2)
    with pytest.raises(ValueError, match="merged is not empty"):
        refine(tmp_path / "merged", recipe, tmp_path / "merged", **OPTIONS)
    with pytest.raises(ValueError, match="merged holds the checkpoint that is refined"):
        refine(tmp_path / "merged", recipe, tmp_path / "merged", **OPTIONS, overwrite=True)


def test_few_texts_are_an_error(make_merged, tmp_path):
    recipe = make_merged(count=1)
    with pytest.raises(ValueError, match="expert 'e0' has 1 texts, expected at least 2"):
        refine(tmp_path / "merged", recipe, tmp_path / "out", **OPTIONS)


def test_the_command_line_needs_a_recipe():
    with pytest.raises(ValueError, match="required: --recipe"):
        main(["--checkpoint", "merged"])


def test_variants_train_too(make_merged, tmp_path):
    """Prompts with other tokens, answered by their experts: trained on, never evaluated on."""
    recipe = make_merged()
    options = {**OPTIONS, "variants": 2}
    record = refine(tmp_path / "merged", recipe, tmp_path / "plain", **OPTIONS)
    varied = refine(tmp_path / "merged", recipe, tmp_path / "varied", **options)
    assert varied["improved"] and varied["options"]["variants"] == 2
    assert (
        varied["kl_before"] == pytest.approx(record["kl_before"], rel=1e-5)
        and varied["kl_after"] != record["kl_after"]
    )
    assert "and 2 variants of each" in (tmp_path / "varied" / "README.md").read_text().replace("\n", " ")


def test_variants_are_no_longer_than_their_texts(make_merged, tmp_path, write_jsonl):
    """A long prompt has a short answer, and a variant of it too: a GPT-2 of 64 positions has no others."""
    recipe = make_merged("gpt2")
    lengths = [(52, 6), (20, 40), (30, 20), (10, 9)]
    rows = [
        {"prompt": "abcdefgh"[number:] * 8, "completion": "xy" * 30, "expert": name}
        for name in NAMES
        for number, _ in enumerate(lengths)
    ]
    for row, (prompt, answer) in zip(rows, lengths * len(NAMES)):
        row["prompt"], row["completion"] = row["prompt"][:prompt], row["completion"][:answer]
    write_jsonl(tmp_path / "texts.jsonl", rows)
    record = refine(tmp_path / "merged", recipe, tmp_path / "out", **{**OPTIONS, "max_steps": 2, "variants": 6})
    assert record["steps"] == 2


def test_the_routers_evaluation_stays_while_it_routes_as_before(make_merged, tmp_path):
    """Files and section of the router's evaluation are kept where no prompt moves, and left out where some do."""
    recipe = make_merged()
    router = {"threshold": 0.0, "temperature": 1.0, "default_expert": "e0", "fallback": "doubt"}
    evaluation = evaluate_router(np.eye(3)[[0, 1, 2]], np.arange(3), ["eval"] * 3, NAMES, router)
    evaluation["training"] = {"queries": 9, "train_data": ["train.jsonl"], "eval_data": ["eval.jsonl"]}
    (tmp_path / "merged" / "router_eval.json").write_text(json.dumps(evaluation))
    refine(tmp_path / "merged", recipe, tmp_path / "out", **OPTIONS)
    assert json.loads((tmp_path / "out" / "router_eval.json").read_text()) == evaluation
    assert "100.0% of 3 evaluation queries" in (tmp_path / "out" / "README.md").read_text()
