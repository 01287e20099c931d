"""Random channel-merged models of several families, and the dense model of each of their experts."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.pytorch_utils import Conv1D

from conversion.channels.row_layout import layout_rows
from modeling_channel_merged import ChannelMergedConfig, ChannelMergedForCausalLM
from modeling_channel_merged.channel_merged_layers import find_modules

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=12),
}
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def fill(parameters):
    """Weights of a size that keeps signals alive; norms around one."""
    for parameter in parameters:
        nn.init.uniform_(parameter, 0.5, 1.5) if parameter.dim() == 1 else nn.init.normal_(parameter, std=0.1)


def random_model(
    text_config, num_experts: int, trained_router: bool = True, seed: int = 0
) -> ChannelMergedForCausalLM:
    """A model whose channels are grouped at random into one to N groups each."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        modules = find_modules(AutoModelForCausalLM.from_config(text_config))
    layouts = {
        path: layout_rows(torch.randint(0, num_experts, (num_experts, spec.out_features)))
        for path, spec in modules.channel.items()
    }
    for path, spec in modules.channel.items():
        if spec.tied_to is not None:
            layouts[path] = layouts[spec.tied_to]
    rows = {path: len(layout.row_channel) for path, layout in layouts.items()}
    names = ["instruct", "math", "code", "chinese", "law"][:num_experts]
    model = ChannelMergedForCausalLM(
        ChannelMergedConfig(text_config=text_config, expert_names=names, rows=rows)
    ).eval()
    fill(model.parameters())
    for path, layout in layouts.items():
        model.model.get_submodule(path).channel_index.copy_(layout.channel_index)
    if trained_router:
        nn.init.normal_(model.router.head.weight, std=20.0)
        nn.init.zeros_(model.router.head.bias)
    else:
        model.router.reset_parameters()
    return model


def dense_expert(model: ChannelMergedForCausalLM, expert: int):
    """The plain base model of one expert, put together tensor by tensor from the stored form."""
    dense = AutoModelForCausalLM.from_config(model.config.text_config, dtype=model.dtype).eval()
    for path, module in dense.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            merged = model.model.get_submodule(path)
            if hasattr(merged, "channel_index"):
                value = merged.rows.get_parameter(name)[merged.channel_index[expert].long()]
                value = value.T if isinstance(module, Conv1D) and name == "weight" else value
            else:
                value = merged.experts[expert].get_parameter(name)
            parameter.data.copy_(value)
    return dense


def left_padded(input_ids, count):
    padding = input_ids.new_zeros(len(input_ids), count)
    padded = torch.cat([padding, input_ids], dim=1)
    return padded, (padded != 0).long()


@pytest.fixture(params=CONFIGS)
def family(request):
    return request.param


@pytest.fixture
def text_config(family):
    return CONFIGS[family]()


@pytest.fixture
def llama_model():
    return random_model(CONFIGS["llama"](), 3)


@pytest.fixture
def prompts():
    """Three prompts of 7 tokens without special tokens: (3, 7)."""
    return torch.randint(3, 99, (3, 7), generator=torch.Generator().manual_seed(1))
