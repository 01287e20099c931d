"""One graph an expert and one for mixed batches, which see the channel index as it is, also in a model that has not
run before: torch.compile and torch.export."""

import shutil

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from .conftest import CONFIGS, SIZES, random_model


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


def test_compiled_whole_one_graph_per_expert_and_one_for_mixed_batches(llama_model, prompts):
    """No graph breaks, and no recompilation for another mix of experts."""
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(llama_model.forward, fullgraph=True, backend=graphs)
    mixes = [torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0]), torch.tensor([2, 2, 2])]
    with torch.no_grad():
        for expert_index in ["instruct", "math", "code", *mixes, "instruct"]:
            expected = llama_model(prompts, expert_index=expert_index, use_cache=False).logits
            output = compiled(prompts, expert_index=expert_index, use_cache=False).logits
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 4


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # inductor's own, on its first import
@pytest.mark.parametrize("expert_index", ["math", torch.tensor([2, 0, 1])], ids=["one", "mixed"])
@torch.no_grad()
def test_inductor_decodes_the_same_tokens(prompts, expert_index):
    model = random_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1}), 3)

    def decode(step):
        cache = StaticCache(config=model.config.text_config, max_cache_len=16)
        tokens = [model(prompts, past_key_values=cache, expert_index=expert_index).logits[:, -1:].argmax(-1)]
        for _ in range(5):
            output = step(tokens[-1], past_key_values=cache, expert_index=expert_index)
            tokens.append(output.logits[:, -1:].argmax(-1))
        return torch.cat(tokens, dim=1)

    assert torch.equal(decode(torch.compile(model.forward, fullgraph=True)), decode(model.forward))


def test_compiled_decode_with_a_static_cache(llama_model, prompts):
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(llama_model.forward, fullgraph=True, backend=graphs)
    expert_index = torch.tensor([2, 0, 1])
    with torch.no_grad():
        cache = StaticCache(config=llama_model.config.text_config, max_cache_len=16)
        token = llama_model(prompts, past_key_values=cache, expert_index=expert_index).logits[:, -1:].argmax(-1)
        tokens = [token]
        for _ in range(3):
            output = compiled(token, past_key_values=cache, expert_index=expert_index)
            token = output.logits[:, -1:].argmax(-1)
            tokens.append(token)
    expected = llama_model.generate(prompts, expert_index=expert_index, max_new_tokens=4, do_sample=False)[:, 7:]
    assert torch.equal(torch.cat(tokens, dim=1), expected)
    assert graphs.frame_count == 1
