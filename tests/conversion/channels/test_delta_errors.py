import json
import math

import pytest
import torch
from safetensors.torch import load_file

from conversion.channels.delta_errors import DeltaErrors, relative_error
from conversion.convert import convert
from conversion.export import export_expert
from conversion.merging.recipe import parse_recipe


def squares(folder, other, names):
    """Squared distance of two plain checkpoints in some of their tensors, in float64."""
    ours, theirs = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    return sum((ours[name].double() - theirs[name].double()).square().sum().item() for name in names)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("preset", ["paper-ties", "paper-dare"])
def test_relative_errors_are_those_of_the_exports(make_experts, write_recipe, tmp_path, family, preset):
    """By module and over all: the distance of an export from its expert over that of the expert from the base."""
    base, experts = make_experts(family, 4, shared=0.3)
    result = convert(parse_recipe(write_recipe(base, experts, preset=preset)), tmp_path / "out", progress=False)
    written = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert written["relative_errors"] == result.report["relative_errors"]
    present = load_file(base / "model.safetensors").keys()
    for number, expert in enumerate(experts):
        export = tmp_path / f"export{number}"
        export_expert(tmp_path / "out", f"e{number}", export)
        lost = whole = 0.0
        for path, module in result.report["modules"].items():
            names = [f"{path}.{kind}" for kind in ("weight", "bias") if f"{path}.{kind}" in present]
            error, delta = squares(export, expert, names), squares(expert, base, names)
            assert module["relative_errors"][f"e{number}"] == pytest.approx(math.sqrt(error / delta), rel=1e-4)
            lost, whole = lost + error, whole + delta
        assert 0.1 < result.report["relative_errors"][f"e{number}"] < 2
        assert result.report["relative_errors"][f"e{number}"] == pytest.approx(math.sqrt(lost / whole), rel=1e-4)


def test_nothing_is_lost_with_as_many_groups_as_experts(make_experts, write_recipe, tmp_path):
    base, experts = make_experts("llama", 3, num_hidden_layers=1)
    recipe = parse_recipe(write_recipe(base, experts, grouping={"num_groups": 3}))
    report = convert(recipe, tmp_path / "out", progress=False).report
    assert report["relative_errors"] == {"e0": 0, "e1": 0, "e2": 0}


def test_an_expert_that_is_the_base_has_no_relative_error(make_experts, write_recipe, tmp_path):
    """Merged with another one it changes, but there was no delta to compare that with: null, which JSON knows."""
    base, experts = make_experts("llama", 1, num_hidden_layers=1, shared=0.0)
    recipe = parse_recipe(write_recipe(base, [base, *experts], grouping={"num_groups": 1}))
    report = convert(recipe, tmp_path / "out", progress=False).report
    assert report["relative_errors"]["e0"] is None and 0 < report["relative_errors"]["e1"] < 1
    assert "Infinity" not in (tmp_path / "out" / "conversion_report.json").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_change_nothing(dtype):
    """Whatever parts the channels come in, the sums are the same to the last bit."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 63, 100, generator=generator).to(dtype)
    merged = rows.float().mean(0)
    sums = []
    for size in (63, 10, 1):
        errors = DeltaErrors(num_experts=4)
        errors.start("q_proj", 63)
        for channels in torch.arange(63).split(size):
            errors.add("q_proj", (1, 3), channels, rows[:, channels], merged[channels])
        sums.append(errors.finish("q_proj"))
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
    expected = (rows.double() - merged.double()).square().sum((1, 2))
    torch.testing.assert_close(sums[0][[1, 3]], expected, rtol=1e-6, atol=0)
    assert sums[0][0] == sums[0][2] == 0


def test_relative_error():
    assert relative_error(1.0, 4.0) == 0.5
    assert relative_error(0.0, 0.0) == 0.0
    assert relative_error(1.0, 0.0) is None
