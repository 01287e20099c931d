"""The figures of the 7B recipes are those of the planner."""

import re
from pathlib import Path

import pytest

from conversion.merging.recipe import load_recipe
from conversion.router.training_arguments import parse_arguments

FOLDER = Path(__file__).parents[2] / "hub_examples"


@pytest.fixture
def planner(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import plan_without_weights

    return plan_without_weights


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mistral_7b/recipe.yaml", "qwen_7b_lora/recipe.yaml"])
def test_figures_of_the_readme(planner, tmp_path, recipe):
    """What is there, and what would be written at most, as the folder's README has it for this recipe."""
    plan = planner.plan(FOLDER / recipe, tmp_path)
    (row,) = [
        line for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines() if f"`{recipe}`" in line
    ]
    there = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    figures = [f"{there / 1e9:.1f} GB", f"{plan['output']['bytes_at_most'] / 1e9:.1f} GB"]
    assert re.findall(r"[\d.]+ GB", row)[:2] == figures


def test_the_other_files_are_valid():
    recipe, recommended = (load_recipe(FOLDER / "mistral_7b" / f"{name}.yaml") for name in ("recipe", "recommended"))
    assert (recipe.base_model, recipe.experts) == (recommended.base_model, recommended.experts)
    assert recommended.resolved().grouping.budget == 0.5
    options = ["--checkpoint", "merged", "--config", str(FOLDER / "mistral_7b" / "router.yaml")]
    arguments, training = parse_arguments(options)
    assert len(arguments.train_data) == 4 and training.output_dir == "routed"


@pytest.mark.parametrize("name", ["mistralai/Mistral-7B-v0.1", "Qwen/Qwen2.5-7B"])
def test_parameters_of_the_published_models(planner, name):
    """As their pages count them."""
    shapes = planner.parameter_shapes(planner.FACTS[name].config)
    count = sum(planner.torch.Size(shape).numel() for shape in shapes.values())
    assert count == {"mistralai/Mistral-7B-v0.1": 7_241_732_096, "Qwen/Qwen2.5-7B": 7_615_616_512}[name]


def test_a_sparse_checkpoint_reads_as_a_whole_one(planner, tmp_path):
    from conversion.io.weight_files import read_headers

    planner.write_header(tmp_path / "model.safetensors", {"a": (2, 3), "b": (5,)})
    headers = read_headers(tmp_path)
    assert {name: (tensor.shape, tensor.num_bytes) for name, tensor in headers.items()} == {
        "a": ((2, 3), 12),
        "b": ((5,), 10),
    }
