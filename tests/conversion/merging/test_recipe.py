"""A recipe resolves by the rules it documents, and says in one line what is wrong with it."""

import pytest

from conversion.merging.recipe import METHOD_DEFAULTS, load_recipe, parse_recipe

EXPERTS = [{"name": "math", "model": "m"}, {"name": "code", "model": "c"}]


def recipe(**keys):
    return parse_recipe({"base_model": "base", "experts": EXPERTS, **keys})


def test_without_a_preset_the_defaults_are_linear_l2_two_groups():
    resolved = recipe().resolved()
    assert resolved.merge_method == "linear"
    assert (resolved.grouping.num_groups, resolved.grouping.similarity) == (2, "l2")
    assert resolved.parameters.given() == {"normalize": True}
    assert [expert.weight for expert in resolved.experts] == [1.0, 1.0]
    assert resolved.seed == 0


@pytest.mark.parametrize(
    ("preset", "method"), [("paper-ties", "ties"), ("paper-dare", "dare_linear")], ids=lambda value: value
)
def test_presets_are_the_papers_settings(preset, method):
    resolved = recipe(preset=preset).resolved()
    assert resolved.merge_method == method
    assert (resolved.grouping.num_groups, resolved.grouping.similarity) == (2, "cosine")
    assert resolved.parameters.given() == {"density": 0.7, "lambda": 0.5, "normalize": False}


@pytest.mark.parametrize("method", METHOD_DEFAULTS)
def test_a_methods_own_defaults_are_mergekits(method):
    resolved = recipe(merge_method=method, calibration={"data": "texts.jsonl"}).resolved()
    assert resolved.parameters.given() == METHOD_DEFAULTS[method]
    assert (resolved.parameters.normalize is True) == (method in ("linear", "ties"))


def test_the_recommended_preset_has_a_budget_that_can_be_met():
    """Half of the experts, but of two that is one row per channel; a mean without calibration texts."""
    two, texts = recipe(preset="recommended"), {"data": "texts.jsonl"}
    three = recipe(preset="recommended", calibration=texts, experts=[{"name": n, "model": n} for n in "abc"])
    assert (two.resolved().grouping.budget, two.resolved().merge_method) == (0.75, "linear")
    assert (three.resolved().grouping.budget, three.resolved().merge_method) == (0.5, "regmean")
    assert recipe(preset="recommended", grouping={"budget": 0.6}).resolved().grouping.budget == 0.6
    assert recipe(preset="recommended", grouping={"num_groups": 2}).resolved().grouping.budget is None


def test_keys_override_the_preset_one_by_one():
    resolved = recipe(
        preset="paper-ties", grouping={"num_groups": 3}, parameters={"density": 0.2}, dtype="float16", seed=7
    ).resolved()
    assert (resolved.grouping.num_groups, resolved.grouping.similarity) == (3, "cosine")
    assert resolved.parameters.given() == {"density": 0.2, "lambda": 0.5, "normalize": False}
    assert (resolved.dtype, resolved.seed) == ("float16", 7)


def test_another_merge_method_drops_the_presets_parameters():
    resolved = recipe(preset="paper-ties", merge_method="task_arithmetic", parameters={"lambda": 0.3}).resolved()
    assert resolved.parameters.given() == {"lambda": 0.3, "normalize": False}
    assert resolved.grouping.similarity == "cosine"


def test_a_calibration_compares_by_loss_whatever_the_preset():
    resolved = recipe(preset="paper-ties", calibration={"file": "f"}).resolved()
    assert resolved.grouping.similarity == "l2"


def test_naming_the_presets_own_method_keeps_its_parameters():
    assert recipe(preset="paper-ties", merge_method="ties").resolved() == (recipe(preset="paper-ties").resolved())


def test_resolving_again_changes_nothing():
    once = recipe(preset="paper-dare", parameters={"normalize": True}).resolved()
    assert once.resolved() == once
    assert parse_recipe(once.record()).resolved() == once


def test_the_method_is_neutral_where_it_reads_no_parameter():
    method = recipe().method()
    assert (method.name, method.density, method.lambda_, method.normalize) == ("linear", 1.0, 1.0, True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experts": EXPERTS[:1]}, "at least two"),
        ({"experts": [EXPERTS[0], EXPERTS[0]]}, "'math' is given to 2 experts"),
        ({"experts": [EXPERTS[0], {"name": "a b", "model": "m"}]}, "expert name 'a b'"),
        ({"experts": [EXPERTS[0], {"name": "7b", "model": "m"}]}, "expert name '7b'"),
        ({"experts": [EXPERTS[0], {"name": "x"}]}, "experts.1.model"),
        ({"experts": [EXPERTS[0], {**EXPERTS[1], "wieght": 2}]}, "experts.1: unknown key 'wieght': .*'weight'"),
        ({"experts": [EXPERTS[0], {**EXPERTS[1], "weight": float("nan")}]}, "finite"),
        ({"experts": [EXPERTS[0], {**EXPERTS[1], "weight": -1}]}, "'code': weight must be above 0"),
        ({"merge_metod": "ties"}, "unknown key 'merge_metod': did you mean 'merge_method'"),
        ({"merge_method": "tise"}, "unknown merge_method 'tise': did you mean 'ties'"),
        ({"preset": "paper-tie"}, "unknown preset 'paper-tie': did you mean 'paper-ties'"),
        ({"grouping": {"num_group": 2}}, "grouping: unknown key 'num_group': did you mean 'num_groups'"),
        ({"grouping": {"num_groups": 0}}, "grouping.num_groups: .*1, got 0"),
        ({"grouping": {"similarity": "dot"}}, "grouping.similarity"),
        ({"grouping": {"budget": 0}}, "budget"),
        ({"grouping": {"budget": 0.5, "similarity": "cosine"}}, "use 'l2'"),
        (
            {"grouping": {"similarity": "cosine"}, "calibration": {"file": "f"}},
            "grouping.similarity 'cosine' does not apply with a calibration",
        ),
        ({"grouping": {"num_groups": 2, "bounds": [{"modules": "*"}]}}, "bounds apply to a budget"),
        (
            {"grouping": {"budget": 0.5, "bounds": [{"modules": "*", "min_rows": 3, "max_rows": 2}]}},
            "at least min_rows",
        ),
        ({"calibration": {}}, "give either data"),
        ({"merge_method": "regmean"}, "needs calibration"),
        ({"grouping": {"budget": 0.5, "num_groups": 2}}, "exclude each other"),
        ({"parameters": {"density": 0.5}}, "parameters.density does not apply to merge_method 'linear'"),
        ({"merge_method": "task_arithmetic", "parameters": {"density": 0.5}}, "does not apply"),
        ({"preset": "paper-ties", "merge_method": "linear", "parameters": {"lambda": 0.5}}, "does not apply"),
        ({"preset": "paper-ties", "parameters": {"density": 0}}, "parameters.density"),
        ({"preset": "paper-ties", "parameters": {"density": 1.5}}, "parameters.density"),
        ({"preset": "paper-ties", "parameters": {"lamda": 1}}, "did you mean 'lambda'"),
        ({"dtype": "int8"}, "dtype"),
        ({"seed": -1}, "seed"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_a_wrong_recipe_says_what_is_wrong(keys, message):
    with pytest.raises(ValueError, match=message) as error:
        recipe(**keys)
    assert "\n" not in str(error.value)


def test_a_file_is_read_and_names_its_folder(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("base_model: base\nexperts:\n  - {name: a, model: x}\n  - {name: b, model: y}\n")
    loaded = load_recipe(file)
    assert loaded.folder == tmp_path
    assert loaded.resolved().folder == tmp_path


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "\ttab"], ids=["list", "broken", "empty", "tab"])
def test_a_file_that_is_no_recipe_is_named(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="recipe.yaml"):
        load_recipe(file)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="missing.yaml"):
        load_recipe(tmp_path / "missing.yaml")


@pytest.mark.parametrize("names", [("Math", "math"), ("math", "code", "CODE")])
def test_names_that_differ_only_in_case_are_refused(names):
    """Their files would be the same where the file system does not know case."""
    with pytest.raises(ValueError, match="differ only in case"):
        recipe(experts=[{"name": name, "model": "m"} for name in names])
