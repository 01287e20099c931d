"""Conversions whose rows are grouped and merged by what they do, against plain dense arithmetic on whole matrices.

What a calibration measures is made up here, but at the end: the conversion's side is tested, not the measuring.
"""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conversion import convert as convert_module
from conversion.channels.channel_loss import DAMPING, EMBEDDING_DAMPING, FLOOR, POWER
from conversion.checkpoints.checkpoint_report import inspect_checkpoint
from conversion.convert import convert
from conversion.io.journal import Journal
from conversion.merging import calibration as calibration_room
from conversion.merging import regmean
from conversion.merging.calibration_file import write_calibration
from conversion.merging.calibration_source import CalibrationFile, find_calibration
from conversion.merging.dry_run import plan_conversion
from conversion.merging.recipe import parse_recipe
from modeling_channel_merged.channel_merged_layers import find_modules


def load_tensors(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


class MadeUpCalibration:
    """Covariances of few random inputs, and random gradients; or the identity and gradients that are all alike."""

    def __init__(self, base, num_experts: int, plain: bool = False):
        self.modules = find_modules(AutoModelForCausalLM.from_pretrained(base)).channel
        self.num_experts, self.plain = num_experts, plain
        self.tied = {module.tied_to for module in self.modules.values()} - {None}
        self.texts = {f"e{number}": 10 + number for number in range(num_experts)}

    def covariance(self, path):
        module = self.modules[path]
        if module.kind == "embedding":
            return None
        if self.plain:
            return torch.eye(module.in_features).expand(self.num_experts, -1, -1).clone()
        generator = torch.Generator().manual_seed(len(path))
        inputs = torch.randn(self.num_experts, 9, module.in_features, generator=generator)
        inputs *= 1 + torch.arange(self.num_experts)[:, None, None]
        return inputs.mT @ inputs / 9

    def gradient_squares(self, path):
        module = self.modules[path]
        if self.plain:
            each = 1.0 if module.kind != "embedding" else 0.0 if path in self.tied else 1 / module.in_features
            return torch.full((self.num_experts, module.out_features), each, dtype=torch.float64)
        generator = torch.Generator().manual_seed(len(path) + 1)
        shape = (self.num_experts, module.out_features)
        return torch.rand(shape, generator=generator, dtype=torch.float64) ** 4 * 1e-6

    def close(self):
        pass


@pytest.fixture
def calibrate(monkeypatch):
    """Lets the next conversions take a calibration for the file that their recipe names."""

    def use(calibration):
        monkeypatch.setattr(convert_module, "find_calibration", lambda *args: CalibrationFile(calibration, None))
        return {"calibration": {"file": "made-up.safetensors"}}

    return use


def weights_of(calibration, path) -> torch.Tensor:
    """The g of one module, (N, O)."""
    linear = [other for other, module in calibration.modules.items() if module.kind != "embedding"]
    squares = {other: calibration.gradient_squares(other) for other in {*linear, path}}
    mean = torch.cat([squares[other] for other in linear], dim=1).mean(1)
    own, module = squares[path], calibration.modules[path]
    if module.kind == "embedding":
        own = own * module.in_features
    if path in calibration.tied:
        own = own + squares["lm_head"]
    plain = (own / mean[:, None]) ** POWER
    return plain + FLOOR * plain.mean()


def damped(calibration, path) -> torch.Tensor | None:
    tied = path in calibration.tied
    raw = calibration.covariance("lm_head" if tied else path)
    if raw is None:
        return None
    raw, damping = raw.double(), EMBEDDING_DAMPING if tied else DAMPING
    scaled = raw / raw.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return (1 - damping) * scaled + damping * torch.eye(raw.shape[1])


def merged_rows(calibration, path, members, rows, expert_weights) -> torch.Tensor:
    """The row of a group for all channels of a weight: rows (N, O, I) float64 to (O, I)."""
    weights, metric = weights_of(calibration, path) * expert_weights[:, None], damped(calibration, path)
    if metric is None:
        return sum(weights[m, :, None] * rows[m] for m in members) / sum(weights[m, :, None] for m in members)
    means = weights.mean(1)
    left = sum(means[m] * metric[m] for m in members)
    return torch.linalg.solve(left, sum(means[m] * metric[m] @ rows[m].T for m in members)).T


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("grouping", [{"num_groups": 1}, {"num_groups": 2}, {"budget": 0.5}], ids=str)
def test_every_stored_row_is_the_minimiser_of_its_group(
    make_experts, write_recipe, tmp_path, calibrate, family, grouping
):
    """With one group it is RegMean of the whole model. Copied rows are the experts' own, bit for bit."""
    base, experts = (
        make_experts(family, 3, num_hidden_layers=1) if family != "gpt2" else make_experts(family, 3, n_layer=1)
    )
    calibration = MadeUpCalibration(base, 3)
    data = write_recipe(base, experts, merge_method="regmean", grouping=grouping, **calibrate(calibration))
    expert_weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    for expert, weight in zip(data["experts"], expert_weights.tolist()):
        expert["weight"] = weight
    report = convert(parse_recipe(data), tmp_path / "out", progress=False).report
    for module in report["modules"].values():
        assert 0 < module["predicted_loss"] <= module["one_row_loss"]
        assert (module["predicted_loss"] == module["one_row_loss"]) == (module["channels_by_rows"].keys() == {"1"})
    tensors, own = load_tensors(tmp_path / "out"), [AutoModelForCausalLM.from_pretrained(path) for path in experts]
    merged_somewhere = 0
    for path, module in calibration.modules.items():
        if module.tied_to:
            continue
        index = tensors[f"model.{path}.channel_index"].long()
        weights = torch.stack([expert.get_parameter(f"{path}.weight") for expert in own]).detach()
        weights = weights.mT if module.kind == "conv1d" else weights
        stored = tensors[f"model.{path}.rows.weight"]
        owners = {tuple((index[:, c] == row).tolist()) for c in range(index.shape[1]) for row in index[:, c].unique()}
        for mask in owners:
            members = [e for e in range(3) if mask[e]]
            here = torch.tensor(mask)[:, None] == (index == index[members[0]])
            channels = here.all(0).nonzero()[:, 0]
            rows = stored[index[members[0], channels]]
            same = (weights[members][:, channels] == weights[members[0], channels]).all(0).all(-1)
            if module.bias:
                biases = torch.stack([expert.get_parameter(f"{path}.bias") for expert in own]).detach()
                bias = tensors[f"model.{path}.rows.bias"][index[members[0], channels]]
                same &= (biases[members][:, channels] == biases[members[0], channels]).all(0)
                g = (weights_of(calibration, path) * expert_weights[:, None]).mean(1)[members]
                mean = (g[:, None] * biases[members][:, channels]).sum(0) / g.sum()
                torch.testing.assert_close(bias[~same].double(), mean[~same], rtol=1e-5, atol=1e-6)
            assert torch.equal(rows[same], weights[members[0], channels][same])
            expected = merged_rows(calibration, path, members, weights.double(), expert_weights)[channels]
            torch.testing.assert_close(rows[~same].double(), expected[~same], rtol=1e-4, atol=1e-5)
            merged_somewhere += int((~same).sum())
    assert merged_somewhere


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("grouping", [{"num_groups": 2}, {"budget": 0.5}], ids=str)
def test_with_the_identity_and_equal_gradients_nothing_changes(
    make_experts, write_recipe, tmp_path, calibrate, family, grouping
):
    base, experts = make_experts(family, 4, num_hidden_layers=1)
    convert(parse_recipe(write_recipe(base, experts, grouping=grouping)), tmp_path / "plain", progress=False)
    keys = calibrate(MadeUpCalibration(base, 4, plain=True))
    data = write_recipe(base, experts, grouping=grouping, merge_method="regmean", **keys)
    convert(parse_recipe(data), tmp_path / "calibrated", progress=False)
    plain, calibrated = load_tensors(tmp_path / "plain"), load_tensors(tmp_path / "calibrated")
    assert plain.keys() == calibrated.keys()
    for name, value in plain.items():
        if name.endswith("channel_index"):
            assert torch.equal(calibrated[name], value), name
        else:
            torch.testing.assert_close(calibrated[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("grouping", [{"num_groups": 4}, {"budget": 1.0}], ids=str)
def test_with_room_for_all_rows_nothing_is_merged(make_experts, write_recipe, tmp_path, calibrate, grouping):
    base, experts = make_experts("qwen2", 3, dtype=torch.bfloat16)
    keys = calibrate(MadeUpCalibration(base, 3))
    data = write_recipe(base, experts, grouping=grouping, merge_method="regmean", **keys)
    report = convert(parse_recipe(data), tmp_path / "out", progress=False).report
    assert all(module["merged_rows"] == 0 for module in report["modules"].values())
    tensors = load_tensors(tmp_path / "out")
    for number, folder in enumerate(experts):
        own = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
        for path in report["modules"]:
            index = tensors[f"model.{path}.channel_index"][number].long()
            assert torch.equal(tensors[f"model.{path}.rows.weight"][index], own[f"{path}.weight"])


def test_memory_threads_shards_and_passes_change_nothing(make_experts, write_recipe, tmp_path, calibrate, monkeypatch):
    """Matrices of more channels than a chunk; an owner set's factor at a time, or all of them."""
    results, before = [], torch.get_num_threads()
    for number, (shards, threads, factor_bytes, keys) in enumerate(
        [
            (1, 1, 1 << 30, {}),
            (3, 2, 1, {"max_memory": "700MB", "chunk_bytes": 1}),
            (2, 3, 200_000, {"max_shard_size": "200KB", "chunk_bytes": 1 << 20}),
        ]
    ):
        sizes = {"intermediate_size": 600, "vocab_size": 600, "num_hidden_layers": 1}
        base, experts = make_experts("qwen2", 4, shards=shards, folder=tmp_path / f"in{number}", **sizes)
        calibration = calibrate(MadeUpCalibration(base, 4))
        monkeypatch.setattr(regmean, "FACTOR_BYTES", factor_bytes)
        torch.set_num_threads(threads)
        data = write_recipe(base, experts, preset="recommended", **calibration)
        convert(parse_recipe(data), tmp_path / f"out{number}", progress=False, **keys)
        torch.set_num_threads(before)
        results.append(load_tensors(tmp_path / f"out{number}"))
    assert (tmp_path / "out2" / "model.safetensors.index.json").exists()
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_memory_counts_the_covariances(make_experts, write_recipe, tmp_path, calibrate):
    """Too little memory is told with the least that is needed, before data is read."""
    base, experts = make_experts("llama", 2, intermediate_size=2000)
    keys = calibrate(MadeUpCalibration(base, 2))
    data = write_recipe(base, experts, preset="recommended", **keys)
    with pytest.raises(ValueError, match=r"max_memory is 0.50 GB, expected at least 0.\d\d GB for 2 experts"):
        convert(parse_recipe(data), tmp_path / "out", progress=False, max_memory="500MB")


def test_an_expert_whose_texts_moved_nothing_is_named(make_experts, write_recipe, tmp_path, calibrate):
    base, experts = make_experts("llama", 2)
    calibration = MadeUpCalibration(base, 2)
    squares = calibration.gradient_squares
    calibration.gradient_squares = lambda path: squares(path) * torch.tensor([[1.0], [0.0]])
    data = write_recipe(base, experts, merge_method="regmean", **calibrate(calibration))
    with pytest.raises(ValueError, match="calibration: no channel of expert 'e1' has a gradient"):
        convert(parse_recipe(data), tmp_path / "out", progress=False)


def test_without_texts_the_recommended_preset_says_once_what_is_lost(make_experts, write_recipe, tmp_path, caplog):
    base, experts = make_experts("llama", 2)
    data = write_recipe(base, experts, preset="recommended")
    with caplog.at_level(logging.WARNING):
        report = convert(parse_recipe(data), tmp_path / "out", progress=False).report
    assert sum("recommended preset has no calibration texts" in line for line in caplog.messages) == 1
    assert report["method"] == "linear" and "calibration_texts" not in report
    parameters = report["parameters"]
    assert 0.74 < parameters["stored"] / parameters["experts"] <= 0.75  # two experts: one row per channel is 0.5


def write_texts(file, num_experts: int, count: int = 20) -> str:
    rows = [
        {"prompt": f"{number} plus {number} is", "completion": f" {2 * number}" * (1 + expert), "expert": f"e{expert}"}
        for number in range(count)
        for expert in range(num_experts)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file.name


def test_texts_are_measured_once_and_a_file_of_them_gives_the_same_bytes(
    make_experts, write_recipe, tmp_path, monkeypatch
):
    """A conversion that is stopped after measuring goes on without; the recipe's path is beside the recipe."""
    base, experts = make_experts("qwen2", 3, num_hidden_layers=1)
    keys = {"preset": "recommended", "calibration": {"data": write_texts(tmp_path / "texts.jsonl", 3)}}
    recipe = parse_recipe(write_recipe(base, experts, **keys), folder=tmp_path)
    measured, group_modules = [], convert_module.group_modules

    def keep(plan, *args):
        source = find_calibration(plan, 10**9, 1)
        calibration = source.open(Journal(folder, {}), torch.device("cpu"), False)
        write_calibration(calibration, tmp_path / "measured.safetensors", {})
        raise KeyboardInterrupt

    folder = tmp_path / "journal"
    folder.mkdir()
    monkeypatch.setattr(convert_module, "group_modules", keep)
    with pytest.raises(KeyboardInterrupt):
        convert(recipe, tmp_path / "out", progress=False)
    monkeypatch.setattr(convert_module, "group_modules", group_modules)
    monkeypatch.setattr(calibration_room, "load_expert_model", lambda *args: measured.append(args))
    report = convert(recipe, tmp_path / "out", progress=False).report
    assert not measured
    assert report["calibration_texts"] == {"e0": 20, "e1": 20, "e2": 20}
    assert report["recipe"]["calibration"] == {"data": "texts.jsonl"}
    assert "20 of `e1`" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    file = {"preset": "recommended", "calibration": {"file": "measured.safetensors"}}
    convert(parse_recipe(write_recipe(base, experts, **file), folder=tmp_path), tmp_path / "again", progress=False)
    first, second = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
    assert inspect_checkpoint(tmp_path / "again").share <= 0.5

    _, others = make_experts("qwen2", 3, num_hidden_layers=1, seed=1)
    wrong = parse_recipe(write_recipe(base, others, **file), folder=tmp_path)
    for refuse in (
        lambda: convert(wrong, tmp_path / "no", progress=False),
        lambda: plan_conversion(wrong, tmp_path / "no"),
    ):
        with pytest.raises(ValueError, match="measured on another expert 'e0': its weights differ"):
            refuse()
    assert not (tmp_path / "no").exists()
