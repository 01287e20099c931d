"""The alternatives of the quality benchmark are what they claim: exact with all bytes, never above their budget."""

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "hub_examples"
PLENTY = 4.0  # of the experts' bytes


MODULES = (
    "coarse_groups",
    "converted",
    "delta_compression",
    "expert_sets",
    "input_statistics",
    "measures",
    "one_model",
    "problem",
    "questions",
    "rounding",
    "sets",
    "shared_basis",
)


@pytest.fixture
def quality(monkeypatch) -> SimpleNamespace:
    """The benchmark's modules by name."""
    monkeypatch.syspath_prepend(FOLDER)
    return SimpleNamespace(**{name: importlib.import_module(f"quality.{name}") for name in MODULES})


@pytest.fixture
def problem(quality, tmp_path):
    """Two shipped experts with a few texts."""
    sets = quality.expert_sets
    expert_set = sets.ExpertSet("pair", sets.whole_skills()[:2])
    questions = quality.questions.draw_questions(expert_set, texts=24, tests=4, draws=1, seed=0)
    return quality.problem.Problem(expert_set, questions, tmp_path, tmp_path, seed=0)


def relative_errors(problem, views) -> list[float]:
    """Of each expert: the norm of what a view is off by, over the norm of the expert's difference to the base."""

    def distance(left, right):
        return math.sqrt(sum((left[name] - right[name]).square().sum().item() for name in problem.base))

    return [
        distance(view, expert) / distance(problem.base, expert)
        for view, expert in zip(views, problem.experts, strict=True)
    ]


def alternatives(quality) -> dict:
    return {
        "SMILE": quality.delta_compression.low_rank_from_base,
        "Twin-Merging": quality.delta_compression.low_rank_from_mean,
        "BitDelta": quality.delta_compression.bitdelta,
        "basis": quality.shared_basis.shared_basis,
        "basis by inputs": quality.shared_basis.shared_basis_by_inputs,
    }


NAMES = ("SMILE", "Twin-Merging", "BitDelta", "basis", "basis by inputs")


@pytest.mark.parametrize("name", NAMES)
def test_with_all_bytes_the_experts_come_back(quality, problem, name, monkeypatch):
    """But for what is rounded to bfloat16, and for the few large entries that layers of signs reach last."""
    monkeypatch.setattr(quality.delta_compression, "DISTILLATION_STEPS", 0)
    stored = alternatives(quality)[name](problem, PLENTY)
    assert max(relative_errors(problem, stored.views)) < (0.05 if name == "BitDelta" else 0.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_is_used_and_not_exceeded(quality, problem, name, monkeypatch):
    monkeypatch.setattr(quality.delta_compression, "DISTILLATION_STEPS", 0)
    make = alternatives(quality)[name]
    errors = []
    for budget in (0.65, 0.8):
        stored = make(problem, budget)
        assert 0.9 * problem.allowance(budget) < stored.num_bytes <= problem.allowance(budget)
        errors.append(relative_errors(problem, stored.views))
    assert all(more < less for less, more in zip(*errors, strict=True))
    assert make(problem, 0.3) is None


def test_distillation_brings_the_logits_nearer(quality, problem, monkeypatch):
    """On texts of the expert that it has not seen."""
    module = quality.delta_compression
    measures = quality.measures.Measures(problem)
    divergence = []
    for steps in (0, 12):
        monkeypatch.setattr(module, "DISTILLATION_STEPS", steps)
        found = measures.quality(module.bitdelta(problem, 0.65).views).divergence
        divergence.append(found["others"])
    assert divergence[1] < divergence[0]


def test_masks_are_exact_where_experts_changed_different_weights(quality, problem):
    left, right = problem.experts
    for name in problem.matrices:
        keep = torch.arange(left[name].shape[1]) % 2 == 0
        left[name] = torch.where(keep, left[name], problem.base[name])
        right[name] = torch.where(keep, problem.base[name], right[name])
    stored = quality.delta_compression.tall_masks(problem)
    assert max(relative_errors(problem, stored.views)) < 0.01


def test_regmean_is_the_least_squares_fit(quality, problem):
    """Of all matrices none is nearer to the experts' outputs on their own inputs, the others' inputs kept apart."""
    name = "model.layers.1.mlp.down_proj.weight"
    merged = quality.one_model.regmean(problem).views[0][name]
    metrics = [
        0.9 * statistics.covariance[name] + 0.1 * torch.diag(statistics.covariance[name].diagonal())
        for statistics in problem.statistics
    ]

    def cost(matrix):
        return sum(
            (((matrix - expert[name]).double() @ metric) * (matrix - expert[name])).sum().item()
            for expert, metric in zip(problem.experts, metrics, strict=True)
        )

    direction = torch.randn(merged.shape, generator=torch.Generator().manual_seed(0)) * merged.std()
    assert cost(merged) < min(cost(merged + step * direction) for step in (-0.3, -0.1, 0.1, 0.3))
    assert cost(merged) < cost(problem.stacked(name).mean(0))


def test_statistics_are_those_of_the_whole_batch(quality, problem):
    """Padding counts nowhere: one text at a time gives the same."""
    texts = problem.questions.calibration["math"][:6]
    model = quality.problem.set_weights(problem.model, problem.experts[1])
    together = quality.input_statistics.input_statistics(model, problem.tokenizer, texts)
    alone = [quality.input_statistics.input_statistics(model, problem.tokenizer, [text]) for text in texts]
    name = "model.layers.2.self_attn.q_proj.weight"
    tokens = [
        len(problem.tokenizer(quality.questions.question_text(problem.tokenizer, text))["input_ids"]) for text in texts
    ]
    mean = sum(n * one.covariance[name] for n, one in zip(tokens, alone, strict=True)) / sum(tokens)
    torch.testing.assert_close(together.covariance[name], mean, rtol=1e-4, atol=1e-5)
    squares = sum(one.gradient[name].square() for one in alone) / len(texts)
    torch.testing.assert_close(together.gradient[name], squares.sqrt(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_rounded_rows_are_counted_and_near(quality, problem, bits):
    stored = quality.converted.experts(problem)
    rounded = quality.rounding.quantized(problem, stored, bits)
    matrices = sum(problem.base[name].numel() for name in problem.matrices) * len(problem.experts)
    scales = sum(
        problem.base[name].numel() // (problem.base[name].shape[1] if bits == 8 else 32) for name in problem.matrices
    )
    expected = matrices * bits // 8 + 2 * scales * len(problem.experts) + problem.vector_bytes
    assert rounded.num_bytes == expected
    for expert, view in zip(problem.experts, rounded.views, strict=True):
        for name in problem.matrices:
            groups = expert[name].unflatten(1, (1, -1) if bits == 8 else (-1, 32))
            # Half a step, and what the scale's own rounding to bfloat16 does to the largest.
            bound = groups.abs().amax(-1, keepdim=True) * (0.5 / (2 ** (bits - 1) - 1) + 2**-8)
            assert ((view[name] - expert[name]).unflatten(1, groups.shape[1:]).abs() <= bound).all()


def test_model_groups_keep_twins_together(quality, tmp_path):
    """Of three experts, two are nearly the same: their mean is one group, in whole models as in layers."""
    sets = quality.expert_sets
    expert_set = sets.ExpertSet("three", sets.whole_skills()[:3])
    questions = quality.questions.draw_questions(expert_set, texts=4, tests=2, draws=1, seed=0)
    problem = quality.problem.Problem(expert_set, questions, tmp_path, tmp_path, seed=0)
    problem.experts[2] = {name: 1.001 * tensor for name, tensor in problem.experts[0].items()}
    for make in (quality.coarse_groups.model_groups, quality.coarse_groups.layer_groups):
        errors = relative_errors(problem, make(problem).views)
        assert max(errors) < 0.01
    assert max(relative_errors(problem, quality.coarse_groups.random_groups(problem).views)) > 0.3


@pytest.mark.parametrize("name", ["demo", "heavy8", "heavy-b", "light", "real"])
def test_texts_of_a_set_are_disjoint(quality, name):
    """Drawing them checks it; a text in two places is refused."""
    drawn = quality.questions.draw_questions(quality.sets.SETS[name], texts=60, tests=20, draws=2, seed=1)
    first = next(iter(drawn.tests[0]))
    drawn.calibration[first].append(drawn.tests[1][first][0])
    with pytest.raises(ValueError, match="both a calibration and a test text"):
        quality.questions.check_disjoint(drawn)


def test_left_out_families_are_in_no_calibration(quality):
    """Their questions are asked, and calibration is drawn from the others."""
    expert_set = quality.expert_sets.SMALL_SETS["heavy-b"]
    for expert in expert_set.experts:
        left_out, calibrated = expert_set.left_out_families(expert), expert_set.calibrated_families(expert)
        assert len(left_out) == 2 and not set(left_out) & set(calibrated)
        assert {*left_out, *calibrated} == set(expert.families)


def test_an_average_is_counted_as_one_model(quality, problem):
    """As a conversion to one group, with the norms of both experts; so the indices are counted as the checkpoint's."""
    stored = quality.converted.one_merge(problem, "linear", {})
    assert stored.num_bytes == problem.model_bytes + problem.vector_bytes // 2
    assert max(relative_errors(problem, stored.views)) < 1
    calibration = quality.converted.write_calibration(problem).read_text(encoding="utf-8").splitlines()
    assert len(calibration) == 48 and set(json.loads(calibration[0])) == {"prompt", "completion", "expert"}


def test_an_answer_is_what_follows_the_prompt(quality, problem):
    """It ends with the token that ends a turn, whatever the chat template puts between turns."""
    evaluate = importlib.import_module("tiny_experts.evaluate")
    example = problem.questions.calibration["math"][0]
    assert evaluate.chat_answer(problem.tokenizer, example) == f" {example.completion}{problem.tokenizer.eos_token}"
    chat_ml = importlib.import_module("real_experts.make_real_experts").CHAT_TEMPLATE
    problem.tokenizer.chat_template = chat_ml
    assert evaluate.chat_prompt(problem.tokenizer, example.prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert evaluate.chat_answer(problem.tokenizer, example) == f"{example.completion}<|im_end|>"
