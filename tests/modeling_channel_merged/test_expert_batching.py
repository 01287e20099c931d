"""Continuous batching: each request as `generate` answers it alone, whatever else runs beside it."""

import random

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from .conftest import random_model

SMALL = {"page_size": 8, "num_blocks": 40, "max_batch_tokens": 64}
GREEDY = GenerationConfig(max_new_tokens=8, do_sample=False)


def random_prompts(count, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(3, 99) for _ in range(draw.choice([1, 2, 5, 9, 17, 30]))] for _ in range(count)]


def answers_alone(model, prompts, experts):
    answers = []
    for prompt, expert in zip(prompts, experts, strict=True):
        tokens = model.generate(torch.tensor([prompt]), GREEDY, expert_index=expert)
        answers.append(tokens[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("given", [True, False])
def test_requests_of_all_experts_get_what_generate_gives(text_config, given):
    model, prompts = random_model(text_config, 4), random_prompts(16)
    experts = [number % 4 for number in range(16)] if given else None
    outputs = model.generate_batch(prompts, GREEDY, ContinuousBatchingConfig(**SMALL), expert_index=experts)
    outputs = list(outputs.values())
    expected = answers_alone(model, prompts, experts or [None] * 16)
    assert [output.generated_tokens for output in outputs] == expected
    chosen = [model.route(torch.tensor([prompt])).expert_index.item() for prompt in prompts]
    assert [output.expert_index for output in outputs] == (experts or chosen)
    assert all((output.router_probabilities is None) == given for output in outputs)
