"""A model that is split among two processes routes and answers as it does in one."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, GPT2Config, LlamaConfig, Phi3Config
from transformers.distributed import DistributedConfig

from modeling_channel_merged import ChannelMergedForCausalLM, ChannelMergedModel

from .conftest import CONFIGS, SIZES, random_model
from .split_models import PROMPTS, answers

# Heads and inner channels that do not divide, and biases of all linear maps but the head.
UNEVEN = {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 101}
MODELS = {
    "capped": lambda: Gemma2Config(**SIZES, head_dim=12),  # capped logits, tied
    "fused": lambda: Phi3Config(**SIZES),
    "qwen2": CONFIGS["qwen2"],  # tied, biases
    "qwen3": CONFIGS["qwen3"],  # norms of heads
    "uneven": lambda: LlamaConfig(**SIZES | UNEVEN, attention_bias=True, mlp_bias=True),
}
GATHERED = {
    "fused": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "uneven": {"q_proj", "k_proj", "v_proj", "o_proj"},
}


def assert_close(found: torch.Tensor, expected: torch.Tensor):
    """As float32 is, in which norms and the router compute."""
    torch.testing.assert_close(found, expected, rtol=1.3e-6, atol=1e-5)


@pytest.mark.slow
def test_two_processes_answer_as_one(tmp_path, torchrun):
    """Routed, one expert and several, in float64; what a part of a model cannot do is refused."""
    models = {name: random_model(make(), 3, trained_router=name != "fused").double() for name, make in MODELS.items()}
    for name, model in models.items():
        if name != "fused":  # tokens that all belong to one of the processes
            model.get_output_embeddings().channel_index[1, 5:20] = -1
        model.save_pretrained(tmp_path / "models" / name)
    file = tmp_path / "models" / "fused" / "model.safetensors"
    tensors = load_file(file)
    del tensors["router.ngrams.weight"]  # as in a fresh checkpoint
    save_file(tensors, file, metadata={"format": "pt"})
    torchrun("-m", "tests.modeling_channel_merged.split_models", str(tmp_path / "models"))
    for name, model in models.items():
        expected, whole = answers(model), sum(parameter.numel() for parameter in model.model.parameters())
        found = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1)]
        for part in found:
            for key, tensor in expected.items():
                assert_close(part[key], tensor)
            gathered = {module for module, style in part["styles"].items() if style.endswith(("_output", "_input"))}
            assert gathered - {"lm_head"} == GATHERED.get(name, set())
            # The logits of the capped model are capped again where tokens are missing, so it keeps them all.
            assert part["values"] < whole * (0.6 if name == "capped" else 0.53)
        assert sum(part["values"] for part in found) >= whole
    headless = ChannelMergedModel.from_pretrained(tmp_path / "models" / "uneven")
    hidden = headless(PROMPTS, expert_index=1).last_hidden_state
    for rank in (0, 1):
        found = torch.load(tmp_path / f"refused-{rank}.pt")
        assert_close(found["hidden"], hidden)
        for done in ("saved", "pushed", "resized"):
            assert found[done] == f"the model is split among 2 processes and cannot be {done}: load it without tp_size"
        assert "does not train: leave tp_size out" in found["train"]
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=99), {}, "no tensor-parallel plan for 'gpt2'"),
        (CONFIGS["llama"](), {"tp_size": 64}, r"embed_tokens cannot give each process some of its 99 channels"),
        (CONFIGS["llama"](), {"fsdp_size": 2}, "fsdp_size is 2 beside tp_size"),
        (CONFIGS["llama"](), {"tp_size": 1, "pp_size": 2}, "pp_size is 2, expected 1"),
    ],
    ids=["gpt2", "small", "fsdp", "pipeline"],
)
def test_what_cannot_be_split_is_refused(config, options, message):
    """By name, before weights are read."""
    config.bos_token_id = config.eos_token_id = 1
    model, distributed = random_model(config, 2), DistributedConfig(**{"tp_size": 2, **options})
    with pytest.raises(ValueError, match=message):
        ChannelMergedForCausalLM.maybe_distribute_model(model, distributed, None)


def test_rows_of_other_kinds_are_refused(llama_model):
    """A style that is not known, and quantized rows."""
    distributed = DistributedConfig(tp_size=2)
    llama_model.channel_styles["model.layers.*.mlp.experts"] = "moe_tp_experts"
    with pytest.raises(ValueError, match=r"for model.layers.\*.mlp.experts is 'moe_tp_experts', expected one of"):
        ChannelMergedForCausalLM.maybe_distribute_model(llama_model, distributed, None)
    llama_model.is_quantized = True
    with pytest.raises(ValueError, match="tp_size is 2, but quantized rows cannot be split by channels"):
        ChannelMergedForCausalLM.maybe_distribute_model(llama_model, distributed, None)


@pytest.mark.parametrize(
    "options",
    [
        {"tp_plan": {"a": "colwise"}},
        {"distributed_config": DistributedConfig(tp_plan={"a": "colwise"})},
        {"distributed_config": {"tp_plan": {}}},
    ],
    ids=["argument", "config", "empty"],
)
def test_a_plan_of_the_callers_is_refused(tmp_path, options):
    """Modules of one plan fit together; a rule for one of them would break it."""
    with pytest.raises(ValueError, match=r"tp_plan is \{.*\}, expected 'auto'"):
        ChannelMergedForCausalLM.from_pretrained(tmp_path / "absent", **options)


def test_one_process_loads_it_whole(llama_model, tmp_path):
    """`tp_plan="auto"` without torchrun is no split."""
    llama_model.save_pretrained(tmp_path)
    loaded = ChannelMergedForCausalLM.from_pretrained(tmp_path, distributed_config=DistributedConfig(tp_plan="auto"))
    assert not loaded.is_split
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in llama_model.state_dict().items())
