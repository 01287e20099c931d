"""Conversions whose rows share one budget: what is stored, what it costs, and what is refused before data is read."""

import io
import json
import math

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conversion.channels.grouping import gram_matrices, partition_costs
from conversion.checkpoints.checkpoint_report import inspect_checkpoint
from conversion.checkpoints.report_plot import plot_report
from conversion.convert import convert
from conversion.io.row_reader import CheckpointReader
from conversion.merging import grouping_pass
from conversion.merging.dry_run import plan_conversion
from conversion.merging.plan import make_plan
from conversion.merging.recipe import parse_recipe
from conversion.report import report_tables


def load_tensors(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("budget", [0.32, 0.5, 0.713])
def test_a_budget_is_met_and_never_exceeded(make_experts, write_recipe, tmp_path, family, budget):
    """Counted in the files: rows, biases and what is kept per expert; a tied head counts once."""
    base, experts = make_experts(family, 4, shared=0.1)
    recipe = parse_recipe(write_recipe(base, experts, grouping={"budget": budget}))
    bound = plan_conversion(recipe, tmp_path / "out")["output"]
    report = convert(recipe, tmp_path / "out", progress=False).report
    stored = {name: value for name, value in load_tensors(tmp_path / "out").items() if "router." not in name}
    parameters = sum(value.numel() for name, value in stored.items() if not name.endswith("channel_index"))
    experts_own = sum(
        value.numel() for folder in experts for value in AutoModelForCausalLM.from_pretrained(folder).parameters()
    )
    rest = budget - parameters / experts_own
    assert 0 <= rest < max(0.001, 25 / experts_own)  # no row of 24 inputs would fit
    assert report["parameters"]["stored"] == parameters and report["parameters"]["experts"] == experts_own
    assert inspect_checkpoint(tmp_path / "out").share == parameters / experts_own
    rows = sum(module["rows"] for module in report["modules"].values())
    assert rows <= bound["rows_at_most"]
    assert sum(value.nbytes for value in stored.values()) <= bound["bytes_at_most"]


def test_the_predicted_loss_is_the_groups_own(make_experts, write_recipe, tmp_path):
    """The report's numbers from the checkpoint's files, and channels by their number of rows."""
    base, experts = make_experts("llama", 3, num_hidden_layers=1)
    report = convert(
        parse_recipe(write_recipe(base, experts, grouping={"budget": 0.6})), tmp_path / "out", progress=False
    ).report
    tensors, own = load_tensors(tmp_path / "out"), [load_tensors(folder) for folder in experts]
    before = load_tensors(base)
    for path, module in report["modules"].items():
        index = tensors[f"model.{path}.channel_index"].long()
        gram = gram_matrices(torch.stack([expert[f"{path}.weight"] - before[f"{path}.weight"] for expert in own]))
        assert module["predicted_loss"] == pytest.approx(partition_costs(gram, index).sum().item(), rel=1e-9)
        one = partition_costs(gram, torch.zeros_like(index)).sum().item()
        assert module["one_row_loss"] == pytest.approx(one, rel=1e-9)
        rows = index.sort(0).values.diff(dim=0).ne(0).sum(0) + 1
        counts = rows.bincount().tolist()
        assert module["channels_by_rows"] == {str(k): count for k, count in enumerate(counts) if count}


def test_a_larger_budget_never_costs_more(make_experts, write_recipe, tmp_path):
    base, experts = make_experts("qwen2", 4, num_hidden_layers=1)
    losses = []
    for budget in (0.3, 0.4, 0.6, 0.8, 1.0):
        recipe = parse_recipe(write_recipe(base, experts, grouping={"budget": budget}))
        report = convert(recipe, tmp_path / str(budget), progress=False).report
        losses.append(sum(module["predicted_loss"] for module in report["modules"].values()))
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0
    parameters = report["parameters"]
    assert parameters["stored"] == parameters["experts_distinct"] < parameters["experts"]


def test_chunks_threads_and_shards_change_nothing(make_experts, write_recipe, tmp_path):
    results, before = [], torch.get_num_threads()
    for number, (shards, threads, keys) in enumerate(
        [(1, 1, {}), (3, 2, {"chunk_bytes": 1}), (2, 3, {"chunk_bytes": 5000, "max_shard_size": "20KB"})]
    ):
        base, experts = make_experts("qwen2", 4, shards=shards, folder=tmp_path / f"in{number}")
        torch.set_num_threads(threads)
        recipe = parse_recipe(
            write_recipe(base, experts, preset="paper-ties", grouping={"budget": 0.5, "similarity": "l2"})
        )
        convert(recipe, tmp_path / f"out{number}", progress=False, **keys)
        torch.set_num_threads(before)
        results.append(load_tensors(tmp_path / f"out{number}"))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_nine_experts_share_a_budget_too(make_experts, write_recipe, tmp_path):
    """More than enumeration goes to."""
    base, experts = make_experts("llama", 9, num_hidden_layers=1)
    recipe = parse_recipe(write_recipe(base, experts, grouping={"budget": 0.4}))
    parameters = convert(recipe, tmp_path / "out", progress=False).report["parameters"]
    assert 0.399 < parameters["stored"] / parameters["experts"] <= 0.4


def test_bounds_hold_and_the_last_that_fits_counts(make_experts, write_recipe, tmp_path):
    base, experts = make_experts("llama", 4, shared=0.3)
    bounds = [
        {"modules": "*.mlp.*", "max_rows": 1},
        {"modules": "model.layers.1.mlp.up_proj", "min_rows": 3},
        {"modules": "lm_head", "min_rows": 2, "max_rows": 2},
    ]
    recipe = parse_recipe(write_recipe(base, experts, grouping={"budget": 0.5, "bounds": bounds}))
    modules = convert(recipe, tmp_path / "out", progress=False).report["modules"]
    rows = {path: set(map(int, module["channels_by_rows"])) for path, module in modules.items()}
    assert rows["model.layers.0.mlp.up_proj"] == rows["model.layers.1.mlp.down_proj"] == {1}
    assert rows["lm_head"] == {1, 2}  # 1 where no expert changed the row
    assert max(rows["model.layers.1.mlp.up_proj"]) >= 3
    assert modules["model.layers.1.mlp.up_proj"]["channels_by_rows"].get("2", 0) < 40 // 2


@pytest.fixture
def no_data(monkeypatch):
    def refuse(*args):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(CheckpointReader, "_read_into", refuse)


def test_what_cannot_be_met_is_refused_before_data_is_read(make_experts, write_recipe, tmp_path, no_data):
    base, experts = make_experts("llama", 4)
    kept = 5 * 24  # norms
    whole = sum(value.numel() for value in AutoModelForCausalLM.from_pretrained(base).parameters())

    def plan(**grouping):
        return make_plan(parse_recipe(write_recipe(base, experts, grouping=grouping)), tmp_path / "out")

    least = math.ceil((whole - kept + 4 * kept) / (4 * whole) * 10**4) / 10**4
    with pytest.raises(ValueError, match=rf"budget is 0.2, expected at least {least}: one row per channel takes"):
        plan(budget=0.2)
    plan(budget=least)
    with pytest.raises(ValueError, match="expected at least 0.5.*: the bounds ask for"):
        plan(budget=0.5, bounds=[{"modules": "*", "min_rows": 2}])
    with pytest.raises(ValueError, match=r"has a path like 'mlp'; their kinds are embed_tokens, q_proj, .*lm_head"):
        plan(budget=0.5, bounds=[{"modules": "mlp"}])
    assert not (tmp_path / "out").exists()


def test_a_tied_head_has_no_bounds_of_its_own(make_experts, write_recipe, no_data):
    base, experts = make_experts("qwen2", 2)
    keys = {"grouping": {"budget": 0.7, "bounds": [{"modules": "lm_head", "max_rows": 1}]}}
    with pytest.raises(ValueError, match="no module that stores rows has a path like 'lm_head'"):
        make_plan(parse_recipe(write_recipe(base, experts, **keys)))


def test_a_stopped_conversion_weighs_nothing_twice(make_experts, write_recipe, tmp_path, monkeypatch):
    base, experts = make_experts("llama", 3)
    recipe = parse_recipe(write_recipe(base, experts, grouping={"budget": 0.5}))
    weighed, weigh_module, spend_budget = [], grouping_pass.weigh_module, grouping_pass.spend_budget

    def count(plan, blocks, path, bar):
        weighed.append(path)
        return weigh_module(plan, blocks, path, bar)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(grouping_pass, "weigh_module", count)
    monkeypatch.setattr(grouping_pass, "spend_budget", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(recipe, tmp_path / "out", progress=False)
    monkeypatch.setattr(grouping_pass, "spend_budget", spend_budget)
    convert(recipe, tmp_path / "out", progress=False)
    assert len(weighed) == len(set(weighed)) == 2 * 7 + 2
    convert(recipe, tmp_path / "again", progress=False)
    first, second = (load_tensors(tmp_path / name) for name in ("out", "again"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert json.loads((tmp_path / "out" / "conversion_report.json").read_text())["modules"]


def test_what_the_budget_bought_is_shown(make_experts, write_recipe, tmp_path):
    """In the terminal within 80 columns, as a picture, and on the card; rows per channel are the checkpoint's."""
    base, experts = make_experts("llama", 3)
    out = tmp_path / "out"
    report = convert(parse_recipe(write_recipe(base, experts, grouping={"budget": 0.5})), out, progress=False).report
    inspected = inspect_checkpoint(out)
    modules = report["modules"].values()
    lost = sum(module["predicted_loss"] for module in modules) / sum(module["one_row_loss"] for module in modules)
    assert inspected.budget == 0.5 and inspected.lost_share == pytest.approx(lost)
    values = json.loads(json.dumps(inspected.to_dict()))
    assert (values["budget"], values["lost_share"]) == (0.5, inspected.lost_share)
    console = Console(width=80, file=io.StringIO())
    console.print(*report_tables(inspected), sep="\n")
    text = console.file.getvalue()
    (block,) = [line for line in text.splitlines() if line.split()[:1] == ["1"]]
    paths = [path for path in report["modules"] if ".layers.1." in path]
    assert block.split()[1:] == [f"{len_rows(out, path):.2f}" for path in paths]
    assert "50.0%" in text and f"{lost:.1%} of that of one row per channel" in text
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"The predicted loss is {lost:.1%} of that" in card and "within 50.0% of the experts' parameters" in card
    plot_report(inspected, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def len_rows(out, path) -> float:
    """Rows per channel."""
    index = load_tensors(out)[f"model.{path}.channel_index"]
    return (int(index.max()) + 1) / index.shape[1]
