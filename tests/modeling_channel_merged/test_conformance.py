"""What Transformers' tests of every model, and its tools, expect of one: config, flags, outputs, initialisation."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, LlamaConfig

from modeling_channel_merged import ChannelMergedConfig, ChannelMergedForCausalLM, ChannelMergedModel
from modeling_channel_merged.channel_merged_layers import initial_channel_index

from .conftest import CONFIGS, GREEDY, random_model


@pytest.mark.parametrize("base", [LlamaConfig(num_hidden_layers=4, head_dim=16), GPT2Config()], ids=["llama", "gpt2"])
def test_the_config_answers_as_the_bases_both_ways(base):
    config = ChannelMergedConfig(text_config=copy.deepcopy(base), num_experts=2)
    names = ["use_cache", "hidden_size", "max_position_embeddings", "num_attention_heads", "initializer_range"]
    names += ["vocab_size", "num_hidden_layers"]
    names += ["num_key_value_heads", "head_dim", "rope_parameters"] if base.model_type == "llama" else ["n_embd"]
    for name in names:
        assert getattr(config, name) == getattr(base, name), name
    for name, value in (("use_cache", False), ("initializer_range", 0.5), ("output_hidden_states", True)):
        setattr(config, name, value)
        assert getattr(config, name) == getattr(config.text_config, name) == value
    assert "use_cache" not in vars(config)
    again = ChannelMergedConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict() == copy.deepcopy(config).to_dict()
    assert pickle.loads(pickle.dumps(config)).use_cache is False
    assert not hasattr(config, "colour")
    config.colour = "red"
    assert config.colour == "red" and not hasattr(config.text_config, "colour")


def test_arguments_of_the_config_reach_the_base():
    config = ChannelMergedConfig(
        text_config=LlamaConfig(), num_experts=2, use_cache=False, output_attentions=True, output_hidden_states=True
    )
    assert config.text_config.use_cache is config.use_cache is False
    assert config.text_config.output_attentions and config.text_config.output_hidden_states
    config = ChannelMergedConfig(text_config=LlamaConfig(output_hidden_states=True), num_experts=2)
    assert config.output_hidden_states


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
def test_the_config_decides_what_a_pass_returns(tmp_path, prompts, auto):
    random_model(CONFIGS["llama"](), 3).save_pretrained(tmp_path)
    model = auto.from_pretrained(tmp_path).eval()
    assert model(prompts).past_key_values is not None and model(prompts).hidden_states is None
    model.config.use_cache = False  # as the Trainer does
    assert model(prompts).past_key_values is None
    model = auto.from_pretrained(
        tmp_path, use_cache=False, output_hidden_states=True, output_attentions=True, attn_implementation="eager"
    ).eval()
    output = model(prompts)
    assert output.past_key_values is None and len(output.hidden_states) == 4 and len(output.attentions) == 3
    output = model(prompts, use_cache=True, output_hidden_states=False, output_attentions=False)
    assert output.past_key_values is not None and output.hidden_states is None and output.attentions is None


def test_flags_stand_on_the_class_and_are_the_bases_on_an_instance(llama_model):
    for kind in (ChannelMergedForCausalLM, ChannelMergedModel):
        assert kind._supports_sdpa and kind._supports_flash_attn and kind.supports_gradient_checkpointing
        assert kind._supports_attention_backend and kind._supports_flex_attn and kind._can_compile_fullgraph
    gpt2 = random_model(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=99), 2)
    for model in (llama_model, gpt2):
        for name in ("_supports_flex_attn", "_supports_flash_attn", "_can_compile_fullgraph"):
            assert getattr(model, name) == getattr(type(model.model), name)


def test_return_dict(llama_model, prompts):
    labels = torch.tensor([0, 1, 2])
    for model in (llama_model, ChannelMergedModel(llama_model.config).eval()):
        calls = [{}, {"expert_index": 1}, {"output_hidden_states": True, "use_cache": False}, {"router_only": True}]
        for arguments in [*calls, *([{"expert_labels": labels}] if model is llama_model else ())]:
            with torch.no_grad():
                named, plain = model(prompts, **arguments), model(prompts, return_dict=False, **arguments)
            assert isinstance(plain, tuple) and len(plain) == len(named.to_tuple())
            assert torch.equal(plain[0], named.to_tuple()[0]) and torch.equal(plain[-1], named.to_tuple()[-1])
    tokens = llama_model.generate(prompts, **GREEDY)
    llama_model.config.return_dict = False
    assert isinstance(llama_model(prompts), tuple)
    assert torch.equal(llama_model.generate(prompts, **GREEDY), tokens)
    assert llama_model.route(prompts).expert_index.shape == (3,)


@pytest.mark.parametrize("kind", [ChannelMergedForCausalLM, ChannelMergedModel])
def test_an_empty_model_is_initialised_whole(family, kind):
    config = random_model(CONFIGS[family](), 3).config
    with torch.device("meta"):
        model = kind(config)
    model.to_empty(device="cpu")
    for module in model.channel_modules().values():
        module.channel_index.fill_(-7)
    model.init_weights()
    for path, module in model.channel_modules().items():
        expected = initial_channel_index(3, module.channel_index.shape[1], module.num_rows)
        assert torch.equal(module.channel_index, expected), path
    assert not model.router.is_trained
    loaded = random_model(CONFIGS[family](), 3)
    for module in loaded.channel_modules().values():
        module.channel_index._is_hf_initialized = True  # as loading leaves it
    before = {path: module.channel_index.clone() for path, module in loaded.channel_modules().items()}
    loaded.init_weights()
    assert all(torch.equal(module.channel_index, before[path]) for path, module in loaded.channel_modules().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_router_alone_stays_in_float32(tmp_path, llama_model, dtype):
    llama_model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert not model._keep_in_fp32_modules and {*model._keep_in_fp32_modules_strict} == {"router"}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.startswith("router.") else dtype), name
    # Quantizers replace linear layers, whatever they are part of.
    assert not any(isinstance(module, torch.nn.Linear) for module in model.router.modules())


def test_embeddings_of_an_expert(llama_model, prompts):
    given = llama_model.embed(prompts, expert_index=["code", 0, "math"])
    with torch.no_grad():
        expected = llama_model(prompts, expert_index=[2, 0, 1]).logits
        found = llama_model(inputs_embeds=given, expert_index=[2, 0, 1]).logits
    assert given.shape == (3, 7, 48) and torch.equal(found, expected)
    assert torch.equal(llama_model.embed(prompts), llama_model.embed(prompts, expert_index="instruct"))
    llama_model.pinned_expert = "code"
    assert torch.equal(llama_model.embed(prompts), llama_model.embed(prompts, expert_index="code"))
    with pytest.raises(
        RuntimeError, match=r"for no expert: call the model, or .* model.embed\(input_ids, expert_index"
    ):
        llama_model.get_input_embeddings()(prompts)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_prompt_learning_is_refused_in_one_line(llama_model, kind):
    with pytest.raises(ValueError, match="^prompt tuning, .* do not work on channel-merged models[^\n]*$"):
        get_peft_model(llama_model, kind(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))


def test_trainable_tokens_are_refused_in_one_line(llama_model):
    """They would be stored rows of other tokens, which experts share."""
    config = LoraConfig(target_modules=["q_proj.rows"], trainable_token_indices={"embed_tokens": [3, 4]})
    with pytest.raises(ValueError, match="^trainable tokens [^\n]*$"):
        get_peft_model(llama_model, config)


def test_packed_rows_are_not_routed(llama_model, prompts):
    """One expert for all queries of a row is no choice of a router; given, it is what was asked for."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    for model in (llama_model, ChannelMergedModel(llama_model.config).eval()):
        with pytest.raises(ValueError, match="^position_ids begin anew within a row: [^\n]* expert_index$"):
            model(prompts, position_ids=positions)
        assert model(prompts, position_ids=positions, expert_index="math").expert_index.tolist() == [1, 1, 1]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]] * 3)
    padded = torch.tensor([[1, 1, 0, 1, 2, 3, 4]])  # as `generate` counts them
    assert llama_model(prompts, mask, position_ids=padded).router_logits.shape == (3, 3)
