import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig


@pytest.fixture
def make_model():
    """A tiny Llama of 259 tokens from a seed."""

    def make(seed: int):
        torch.manual_seed(seed)
        config = LlamaConfig(
            **{"vocab_size": 259, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3},
        )
        return AutoModelForCausalLM.from_config(config).eval()

    return make
