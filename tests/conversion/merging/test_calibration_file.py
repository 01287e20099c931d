"""A calibration file is read for the experts it was measured on, or refused by what is wrong with it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conversion.channels.packed_symmetric import SquareSum, unpack_symmetric
from conversion.merging.calibration_file import (
    METADATA_KEY,
    Calibration,
    Measured,
    covariance_name,
    expert_record,
    gradients_name,
    parts_of,
    read_calibration,
    write_calibration,
)
from conversion.merging.plan import make_plan
from conversion.merging.recipe import parse_recipe

SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def random_covariance(size: int, generator: torch.Generator) -> torch.Tensor:
    """Packed."""
    total = SquareSum(size)
    total.add(torch.randn(2 * size, size, generator=generator))
    return total.packed_mean(2 * size)


@pytest.fixture
def plan(make_experts, write_recipe):
    return make_plan(parse_recipe(write_recipe(*make_experts("llama", 3))))


@pytest.fixture
def written(plan, tmp_path):
    """A calibration file of random values, and these by their names."""
    generator, values, parts = torch.Generator().manual_seed(0), {}, []
    inputs = {}
    for path, module in plan.modules.channel.items():
        *folder, leaf = path.split(".")
        if module.kind != "embedding":
            inputs[path] = ".".join([*folder, SHARED.get(leaf, leaf)])
        for name in plan.expert_names:
            gradients = torch.rand(module.out_features, generator=generator, dtype=torch.float64)
            values[gradients_name(name, path)] = gradients
            if inputs.get(path) == path:
                values[covariance_name(name, path)] = random_covariance(module.in_features, generator)
    for number, (name, value) in enumerate(values.items()):
        parts.append(tmp_path / f"part{number}")
        save_file({name: value}, parts[-1])
    experts = {name: expert_record(plan, number) for number, name in enumerate(plan.expert_names)}
    counts = {name: 20 + number for number, name in enumerate(plan.expert_names)}
    measured = Measured(experts, counts, counts, inputs, "texts.jsonl", "abc")
    file = tmp_path / "calibration.safetensors"
    write_calibration(Calibration("a run", measured, parts_of(parts), plan), file, {"torch": "2"})
    return file, values


def change(file, tensors=None, **metadata):
    """Write a calibration file again with other tensors or metadata."""

    with safe_open(file, framework="pt") as opened:
        values = json.loads(opened.metadata()[METADATA_KEY])
    values = {key: value for key, value in (values | metadata).items() if value is not None}
    save_file({**load_file(file), **(tensors or {})}, file, {METADATA_KEY: json.dumps(values)})


def test_what_was_written_is_read(plan, written):
    file, values = written
    calibration = read_calibration(file, plan)
    assert calibration.texts == {"e0": 20, "e1": 21, "e2": 22}
    for path, module in plan.modules.channel.items():
        gradients = torch.stack([values[gradients_name(name, path)] for name in plan.expert_names])
        assert torch.equal(calibration.gradient_squares(path), gradients)
        covariance = calibration.covariance(path)
        if module.kind == "embedding":
            assert covariance is None and calibration.inputs_of(path) is None
        else:
            stored = calibration.inputs_of(path)
            for matrix, name in zip(covariance, plan.expert_names, strict=True):
                packed = values[covariance_name(name, stored)]
                assert torch.equal(matrix, unpack_symmetric(packed, torch.empty_like(matrix)))
    assert calibration.inputs_of("model.layers.1.mlp.up_proj") == "model.layers.1.mlp.gate_proj"
    calibration.close()


def test_a_file_serves_some_of_its_experts_in_any_order(plan, written, write_recipe, tmp_path):
    """By content: a copy of a checkpoint is the same expert."""
    file, values = written
    shutil.copytree(plan.experts[0].folder, tmp_path / "copy")
    recipe = write_recipe(plan.base.folder, [plan.experts[2].folder, tmp_path / "copy"])
    for expert, name in zip(recipe["experts"], ("e2", "e0"), strict=True):
        expert["name"] = name
    some = read_calibration(file, make_plan(parse_recipe(recipe)))
    expected = torch.stack([values[gradients_name(name, "lm_head")] for name in ("e2", "e0")])
    assert torch.equal(some.gradient_squares("lm_head"), expected)
    assert some.texts == {"e2": 22, "e0": 20}


def test_other_experts_are_refused(plan, written, write_recipe):
    file, _ = written
    folders = [source.folder for source in plan.experts]
    swapped = make_plan(parse_recipe(write_recipe(plan.base.folder, [folders[0], folders[2], folders[1]])))
    with pytest.raises(ValueError, match="was measured on another expert 'e1': its weights differ, calibrate again"):
        read_calibration(file, swapped)
    more = make_plan(parse_recipe(write_recipe(plan.base.folder, [*folders, folders[0]])))
    with pytest.raises(ValueError, match="was not measured on expert 'e3', but on e0, e1, e2"):
        read_calibration(file, more)
    channels = (torch.arange(259).flip(0), *plan.vocabulary.channels[1:])
    other_ids = replace(plan, vocabulary=replace(plan.vocabulary, channels=channels))
    with pytest.raises(ValueError, match="measured on another expert 'e0': its vocabulary differ"):
        read_calibration(file, other_ids)


def test_what_is_no_calibration_is_refused(plan, written, tmp_path):
    file, _ = written
    with pytest.raises(FileNotFoundError, match="there is no calibration file .*nothing"):
        read_calibration(tmp_path / "nothing", plan)
    with pytest.raises(ValueError, match="model.safetensors is no calibration file, expected one that channel-merge"):
        read_calibration(plan.base.folder / "model.safetensors", plan)
    (tmp_path / "text").write_text("no")
    with pytest.raises(ValueError, match="text: "):
        read_calibration(tmp_path / "text", plan)
    content = file.read_bytes()
    (tmp_path / "short").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="short"):
        read_calibration(tmp_path / "short", plan)
    change(file, format_version=7)
    with pytest.raises(ValueError, match="has format_version 7, this version reads 1"):
        read_calibration(file, plan)
    change(file, format_version=1, texts=None)
    with pytest.raises(ValueError, match="its metadata have no texts"):
        read_calibration(file, plan)


def test_damaged_values_are_refused(plan, written, tmp_path):
    """The tensor is named: one that is missing, of another shape, NaN."""
    file, _ = written
    name = gradients_name("e1", "lm_head")
    whole = load_file(file)
    for values, message in (
        (torch.full_like(whole[name], torch.nan), "the gradient squares of lm_head are negative, NaN or infinite"),
        (whole[name] - 2, "the gradient squares of lm_head are negative, NaN or infinite"),
        (whole[name][1:].clone(), r"e1.gradients.lm_head is F64 of shape \[258\], expected F64 of shape \[259\]"),
        (whole[name].float(), r"e1.gradients.lm_head is F32 of shape \[259\], expected F64"),
    ):
        copy = tmp_path / "copy.safetensors"
        shutil.copy(file, copy)
        change(copy, {name: values})
        with pytest.raises(ValueError, match=message):
            read_calibration(copy, plan)
    change(
        file, {covariance_name("e2", "lm_head"): torch.full_like(whole[covariance_name("e2", "lm_head")], torch.inf)}
    )
    calibration = read_calibration(file, plan)
    with pytest.raises(ValueError, match="covariance of lm_head of expert 'e2' holds NaN or infinity"):
        calibration.covariance("lm_head")
    with pytest.raises(ValueError, match="a run has no e0.gradients.model.embed_tokens"):
        Calibration("a run", calibration.measured, {}, plan)
