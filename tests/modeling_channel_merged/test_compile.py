"""torch.compile and torch.export see the channel index as it is, also in a model that has not run before."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from .conftest import CONFIGS, random_model


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()


def compiled(model):
    """The model's logits of one expert, from one graph."""
    forward = torch.compile(model, fullgraph=True, backend="eager")
    return lambda prompts, expert="math": forward(prompts, expert_index=expert, use_cache=False).logits


def assert_follows(step, model, prompts):
    torch.testing.assert_close(step(prompts), model(prompts, expert_index="math").logits)


def flip(index):
    return index.flip(1).contiguous()


@pytest.fixture
def up_proj(llama_model):
    return llama_model.model.model.layers[0].mlp.up_proj


@torch.no_grad()
def test_a_model_that_has_not_run_compiles(text_config, prompts):
    model = random_model(text_config, 3)
    assert_follows(compiled(model), model, prompts)


@torch.no_grad()
def test_a_loaded_model_that_has_not_run_compiles(llama_model, prompts, tmp_path):
    llama_model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(compiled(model)(prompts), llama_model(prompts, expert_index="math").logits)


@torch.no_grad()
def test_index_written_to_before_it_is_compiled(llama_model, up_proj, prompts):
    before = llama_model(prompts, expert_index="math").logits
    up_proj.channel_index.copy_(flip(up_proj.channel_index))
    step = compiled(llama_model)
    assert not torch.allclose(step(prompts), before, atol=1e-2)
    assert_follows(step, llama_model, prompts)


def assign(model, layer):
    layer.channel_index = flip(layer.channel_index)


def load(model, layer):
    name = next(name for name, module in model.named_modules() if module is layer)
    model.load_state_dict({f"{name}.channel_index": flip(layer.channel_index)}, strict=False)


def write_and_derive(model, layer):
    layer.channel_index.copy_(flip(layer.channel_index))
    layer.derive()


def resize(model, layer):
    model.resize_token_embeddings(120)


def move(model, layer):
    model.double()


@pytest.mark.parametrize("change", [assign, load, write_and_derive, resize, move])
@torch.no_grad()
def test_compiled_model_follows_a_change(llama_model, up_proj, prompts, change):
    step = compiled(llama_model)
    assert_follows(step, llama_model, prompts)
    change(llama_model, up_proj)
    assert_follows(step, llama_model, prompts)


class OneExpert(nn.Module):
    """What torch.export can take: tensors in, tensors out."""

    def __init__(self, model, expert):
        super().__init__()
        self.model, self.expert = model, expert

    def forward(self, input_ids):
        return self.model(input_ids, expert_index=self.expert, use_cache=False).logits


@pytest.mark.parametrize("written", [False, True], ids=["as_built", "index_written_to"])
@torch.no_grad()
def test_a_model_that_has_not_run_exports(prompts, written):
    model = random_model(CONFIGS["qwen3"](), 3)
    if written:
        layer = model.model.model.layers[0].mlp.up_proj
        layer.channel_index.copy_(flip(layer.channel_index))
    exported = torch.export.export(OneExpert(model, "math"), (prompts,))
    torch.testing.assert_close(exported.module()(prompts), model(prompts, expert_index="math").logits)
