from dataclasses import fields
from pathlib import Path

import pytest

from conversion.merging.recipe import parse_recipe
from conversion.refinement.arguments import RefineArguments, option_help
from conversion.refinement.training_arguments import MAX_STEPS, check_recipe_options, parse_options

RECIPE = {"base_model": "base", "experts": [{"name": name, "model": name} for name in ("a", "b")]}
PLACES = {"checkpoint": "merged", "output_dir": "out", "use_cpu": True}


def recipe_of(**options):
    return parse_recipe({**RECIPE, "refine": options})


def test_help_of_an_option():
    """How it is written, what it is for, and what it is where it is not given."""
    texts = dict(option_help())
    assert texts["--top-k K"].endswith("one bucket. [default: 64]")
    assert texts["--recipe RECIPE"].endswith(" [required]") and texts["--output-dir OUT"].endswith(" [required]")
    options = {name.removeprefix("--").split()[0].replace("-", "_") for name in texts}
    assert {field.name for field in fields(RefineArguments)} - {"checkpoint"} < options


def test_a_few_hundred_steps_unless_something_is_said():
    assert parse_options(recipe_of(), **PLACES)[1].max_steps == MAX_STEPS
    assert parse_options(recipe_of(max_steps=7), **PLACES)[1].max_steps == 7
    passes = parse_options(recipe_of(num_train_epochs=2), **PLACES)[1]
    assert passes.num_train_epochs == 2 and passes.max_steps < 0


def test_the_command_line_overrides_the_caller_and_the_caller_the_recipe(tmp_path):
    """`--config` lies between the caller and the rest of the command line."""
    recipe = recipe_of(top_k=1, variants=1, patience=1, max_length=1, learning_rate="1e-4")
    file = Path(tmp_path / "refine.yaml")
    file.write_text("patience: 3\nmax-length: 3\n")
    arguments = ["--config", str(file), "--max-length", "4"]
    args, training_args = parse_options(recipe, arguments, **PLACES, variants=2, patience=2)
    assert (args.top_k, args.variants, args.patience, args.max_length) == (1, 2, 3, 4)
    assert training_args.learning_rate == 1e-4


def test_options_that_are_no_scalars():
    _, training_args = parse_options(recipe_of(lr_scheduler_kwargs={"num_cycles": 0.4}), **PLACES)
    assert training_args.lr_scheduler_kwargs == {"num_cycles": 0.4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "merged"}, "refine.checkpoint of the recipe is given where the recipe is used"),
        ({"learning_rat": 1}, "refine: unknown option 'learning_rat'"),
        ({"bf16": "perhaps"}, "bf16"),
        ({"eval_strategy": "sometimes"}, "sometimes"),
        ({"freeze_single_owner_rows": True, "fsdp": "full_shard"}, "does not work with fsdp"),
    ],
)
def test_options_of_a_recipe_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        check_recipe_options(recipe_of(**options))


def test_recipes_without_a_refinement_are_fine():
    check_recipe_options(parse_recipe(RECIPE))
    check_recipe_options(recipe_of())
