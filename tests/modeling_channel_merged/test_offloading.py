"""Weights that accelerate keeps elsewhere: the model routes and answers as it does with all of them."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload

from .conftest import GREEDY, random_model


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "untrained"])
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_offloaded_model_routes_and_answers(text_config, prompts, tmp_path, kind, trained):
    """Every weight, the router's too, is on the meta device but while its module runs."""
    model = random_model(text_config, 3, trained_router=trained)
    expected = model.route(prompts)
    text, mixed = (model.generate(prompts, expert_index=experts, **GREEDY) for experts in (1, [2, 0, 1]))
    if kind == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.router.head.weight.is_meta
    routing = model.route(prompts)
    assert torch.equal(routing.logits, expected.logits) and torch.equal(routing.expert_index, expected.expert_index)
    assert torch.equal(model.generate(prompts, expert_index=1, **GREEDY), text)
    assert torch.equal(model.generate(prompts, expert_index=[2, 0, 1], **GREEDY), mixed)
