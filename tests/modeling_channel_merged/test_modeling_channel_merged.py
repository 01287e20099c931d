"""The whole model: every expert is the dense model it came from, alone and mixed, in forward and in generate."""

import copy
import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, Gemma2Config, LlamaConfig, StaticCache
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from modeling_channel_merged import ChannelMergedConfig, ChannelMergedForCausalLM, ChannelMergedModel
from modeling_channel_merged.active_experts import ActiveExperts, activate

from .conftest import CONFIGS, SIZES, dense_expert, random_model

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def rms(values):
    return values.double().square().mean().sqrt()


def assert_close_to_dense(logits, dense, input_ids):
    """At most twice the error of the dense model, both against the dense model in float64 (invariant 1)."""
    with torch.no_grad():
        plain = dense(input_ids).logits
        truth = copy.deepcopy(dense).double()(input_ids).logits
    assert rms(logits - truth) <= 2 * rms(plain - truth)


def left_padded(input_ids, count):
    padding = input_ids.new_zeros(len(input_ids), count)
    padded = torch.cat([padding, input_ids], dim=1)
    return padded, (padded != 0).long()


@pytest.mark.parametrize("num_experts", [2, 3, 4, 5])
def test_every_expert_is_its_dense_model(text_config, num_experts, prompts):
    """Alone and in a mixed batch; one expert alone that reads one run is bit-equal where nothing is gathered."""
    model = random_model(text_config, num_experts)
    experts = [expert % num_experts for expert in (0, num_experts - 1, 1)]
    with torch.no_grad():
        mixed = model(prompts, expert_index=experts).logits
        for row, expert in enumerate(experts):
            dense = dense_expert(model, expert)
            assert_close_to_dense(
                model(prompts[row : row + 1], expert_index=expert).logits, dense, prompts[row : row + 1]
            )
            assert_close_to_dense(mixed[row : row + 1], dense, prompts[row : row + 1])


@pytest.mark.parametrize("num_experts", [2, 3, 4])
def test_unmerged_experts_are_bit_equal(text_config, num_experts, prompts):
    """Where an expert's rows are one run in channel order, nothing differs from the dense model, not even rounding."""
    model = random_model(text_config, num_experts)
    with torch.no_grad():
        for module in model.channel_modules().values():
            num_channels = module.channel_index.shape[1]
            module.channel_index.copy_(torch.arange(num_channels).repeat(num_experts, 1))
        for expert in range(num_experts):
            expected = dense_expert(model, expert)(prompts).logits
            assert torch.equal(model(prompts, expert_index=expert).logits, expected)


def test_batch_order_and_padding_change_nothing(text_config, prompts):
    model, experts = random_model(text_config, 3), [2, 0, 1]
    order = [1, 2, 0]
    padded, mask = left_padded(prompts, 4)
    with torch.no_grad():
        logits = model(prompts, expert_index=experts).logits
        shuffled = model(prompts[order], expert_index=[experts[row] for row in order]).logits
        shifted = model(
            padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), expert_index=experts
        )
    torch.testing.assert_close(shuffled, logits[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shifted.logits[:, 4:], logits, rtol=1e-5, atol=1e-5)


def test_forward_routes_when_no_expert_is_given(llama_model, prompts):
    with torch.no_grad():
        output, routing = llama_model(prompts), llama_model.route(prompts)
        given = llama_model(prompts, expert_index=routing.expert_index)
    assert len(set(routing.expert_index.tolist())) > 1
    assert torch.equal(output.router_logits, routing.logits) and torch.equal(output.expert_index, routing.expert_index)
    assert torch.equal(output.logits, given.logits) and given.router_logits is None


def test_expert_index_forms(llama_model, prompts):
    """Name, index, list and tensor mean the same."""
    forms = ["math", 1, ["math"] * 3, [1, "math", 1], torch.tensor([1, 1, 1]), torch.tensor(1)]
    forms += [np.int64(1), np.array([1, 1, 1]), np.array(1), (1, np.int32(1), torch.tensor(1))]
    forms += [torch.tensor([1, 1, 1], dtype=torch.int32)]
    with torch.no_grad():
        logits = [llama_model(prompts, expert_index=form).logits for form in forms]
        generated = [llama_model.generate(prompts, expert_index=form, **GREEDY) for form in forms]
    assert all(torch.equal(logits[0], other) for other in logits)
    assert all(torch.equal(generated[0], other) for other in generated)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    ("expert_index", "message"),
    [
        ("physics", r"unknown expert 'physics': this model has \['instruct', 'math', 'code'\]"),
        (3, "expert index 3 is out of range: this model has 3 experts"),
        (-1, "expert index -1 is out of range"),
        ([0, 1], "names 2 experts for a batch of 3 rows"),
        (torch.tensor([0, 1, 7]), "expert index 7 is out of range"),
        (torch.tensor([0.0, 1.0, 2.0]), r"integer tensor of shape \(B,\), got torch.float32"),
        (torch.zeros(3, 1, dtype=torch.int64), r"got torch.int64 of shape \(3, 1\)"),
        (1.0, r"expert 1.0 is neither a name nor an index: this model has \['instruct', 'math', 'code'\], 0 to 2"),
        (True, "expert True is neither"),
        ([[0]] * 3, r"expert \[0\] is neither"),
        ([None] * 3, "expert None is neither"),
        (np.array([0.0, 1.0, 2.0]), r"expert np.float64\(0.0\) is neither|expert 0.0 is neither"),
        ({1: 2}.items(), "expert .* is neither"),
    ],
    ids=str,
)
def test_wrong_expert_index(llama_model, prompts, call, expert_index, message):
    with pytest.raises(ValueError, match=message):
        getattr(llama_model, call)(prompts, expert_index=expert_index)


def test_routing_runs_only_the_layers_that_it_needs(llama_model, prompts):
    ran = []
    for number, block in enumerate(llama_model.decoder_blocks()):
        block.register_forward_pre_hook(lambda *args, number=number: ran.append(number))
    llama_model.model.lm_head.register_forward_pre_hook(lambda *args: ran.append("head"))
    llama_model.route(prompts)
    llama_model(prompts, expert_labels=torch.tensor([0, 1, 2])).loss.backward()
    assert ran == [0, 0]


def test_router_features_are_the_trunk_experts(text_config, prompts):
    """The mean hidden state of the trunk expert's dense model after the router's layers, normalised to unit norm."""
    model = random_model(text_config, 3)
    nn.init.zeros_(model.router.ngrams.weight)
    model.config.router["trunk_expert"] = "code"
    dense = dense_expert(model, 2)
    with torch.no_grad():
        hidden_states = dense(prompts, output_hidden_states=True).hidden_states[1]
        features = nn.functional.layer_norm(hidden_states.mean(1), hidden_states.shape[-1:]) / 48**0.5
        expected = model.router.head(features)
    torch.testing.assert_close(model.route(prompts).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_routing_ignores_padding_and_batch(text_config, prompts, side):
    model = random_model(text_config, 3)
    padded, mask = left_padded(prompts, 5)
    if side == "right":
        padded, mask = padded.roll(-5, dims=1), mask.roll(-5, dims=1)
    together = model.route(prompts).logits
    torch.testing.assert_close(model.route(padded, mask).logits, together, rtol=1e-4, atol=1e-4)
    for row in range(3):
        alone = model.route(prompts[row : row + 1]).logits
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-4)


def test_router_loss_and_gradients(llama_model, prompts):
    labels = torch.tensor([0, 1, 2])
    llama_model.freeze_for_router_training()
    output = llama_model(prompts, expert_labels=labels)
    assert torch.equal(output.loss, nn.functional.cross_entropy(output.router_logits, labels))
    output.loss.backward()
    trained = {name for name, parameter in llama_model.named_parameters() if parameter.grad is not None}
    assert trained == {"router.head.weight", "router.head.bias", "router.ngrams.weight"}
    assert output.logits is None


def test_router_features_have_no_dropout(prompts):
    config = CONFIGS["llama"]()
    config.attention_dropout = 0.5
    model = random_model(config, 3)
    expected = model.route(prompts).logits
    model.train()
    assert torch.equal(model(prompts, expert_labels=torch.tensor([0, 1, 2])).router_logits, expected)
    assert model.model.training


def test_routing_keeps_every_modules_own_mode(prompts):
    """A part that was put to eval() inside of a training model stays so; a model in eval mode is not written to."""
    model = random_model(CONFIGS["llama"](), 3).train()
    model.decoder_blocks()[0].self_attn.eval()
    modes = [module.training for module in model.modules()]
    model.route(prompts)
    assert [module.training for module in model.modules()] == modes and {*modes} == {True, False}
    model.eval()
    written, write = [], nn.Module.__setattr__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.Module, "__setattr__", lambda module, name, value: written.append(name) or write(module, name, value)
        )
        model.route(prompts)
    assert "training" not in written


def test_a_query_of_nan_is_not_answered_in_silence(llama_model):
    embeds = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(0))
    embeds[1, 2, 3] = float("nan")
    calls = (llama_model.route, llama_model, lambda inputs_embeds: llama_model.generate(inputs_embeds=inputs_embeds))
    for call in calls:
        with pytest.raises(ValueError, match="query 1 cannot be routed: its router logits are .*nan"):
            call(inputs_embeds=embeds)
    assert llama_model(inputs_embeds=embeds, expert_index=1).logits[1].isnan().any()
    mask = torch.ones(3, 5)
    mask[1] = 0
    assert llama_model.route(inputs_embeds=embeds, attention_mask=mask).expert_index[1] == 0


@pytest.mark.parametrize("call", ["route", "forward"])
def test_masks_that_routing_cannot_read(llama_model, prompts, call):
    """Masks as the attention layers want them say nothing about padding; with the expert given they are used."""
    causal = torch.ones(7, 7, dtype=torch.bool).tril().expand(3, 1, 7, 7)
    for mask, shown in ((causal, r"\(3, 1, 7, 7\)"), ({"full_attention": causal}, "dict")):
        with pytest.raises(ValueError, match=f"attention_mask is {shown}, but routing .* or .* expert_index"):
            getattr(llama_model, call)(prompts, attention_mask=mask)
    logits = llama_model(prompts, attention_mask=causal, expert_index=[2, 0, 1]).logits
    torch.testing.assert_close(logits, llama_model(prompts, expert_index=[2, 0, 1]).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tuples_instead_of_outputs(llama_model, prompts, tmp_path):
    """As in Transformers: what is not None, in the order of the output's fields, by argument or by the config."""
    llama_model.save_pretrained(tmp_path)
    headless = ChannelMergedModel.from_pretrained(tmp_path)
    options = {"input_ids": prompts, "use_cache": False}
    for model in (llama_model, headless):
        for more in ({}, {"expert_index": 1}, {"router_only": True}):
            expected = model(**options, **more).to_tuple()
            for by_config in (False, True):
                model.config.return_dict = not by_config
                outputs = model(**options, **more, **({} if by_config else {"return_dict": False}))
                assert type(outputs) is tuple and len(outputs) == len(expected)
                assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, expected))
                assert model.route(prompts).expert_index.shape == (3,)
            model.config.return_dict = True
    labelled = llama_model(prompts, expert_labels=torch.tensor([0, 1, 2]), return_dict=False)
    assert len(labelled) == 2 and labelled[0].dim() == 0 and labelled[1].shape == (3, 3)
    expected = llama_model.generate(prompts, **GREEDY)
    llama_model.config.return_dict = False
    assert torch.equal(llama_model.generate(prompts, **GREEDY), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp_plan": "auto"}, "tp_plan is 'auto', but channel-merged models do not run tensor parallel yet"),
        ({"tp_size": 2}, "tp_size is 2"),
        ({"distributed_config": DistributedConfig(tp_size=2)}, "tp_size is 2"),
        ({"distributed_config": DistributedConfig(tp_plan="auto")}, "tp_plan is 'auto'"),
    ],
    ids=str,
)
def test_tensor_parallel_is_refused(llama_model, tmp_path, options, message):
    """Before anything is read: nothing would be sharded, and plain tensors would meet sharded ones."""
    with pytest.raises(ValueError, match=message):
        ChannelMergedForCausalLM.from_pretrained(tmp_path / "absent", **options)


def test_router_labels_by_name(llama_model, prompts):
    by_index = llama_model(prompts, expert_labels=torch.tensor([2, 0, 1])).loss
    assert torch.equal(llama_model(prompts, expert_labels=["code", "instruct", "math"]).loss, by_index)
    with pytest.raises(ValueError, match="unknown expert 'physics'"):
        llama_model(prompts, expert_labels=["code", "physics", "math"])


def test_two_kinds_of_labels_are_an_error(llama_model, prompts):
    with pytest.raises(ValueError, match="not both"):
        llama_model(prompts, labels=prompts, expert_labels=torch.tensor([0, 1, 2]))


def test_untrained_router_answers_with_the_default_expert_and_warns_once(prompts, caplog):
    model = random_model(CONFIGS["llama"](), 3, trained_router=False)
    model.config.router["default_expert"] = "code"
    logging.warning_once.cache_clear()
    logging.get_logger("transformers").propagate = True
    with torch.no_grad():
        assert model(prompts).expert_index.tolist() == [2, 2, 2]
        assert model.route(prompts).expert_index.tolist() == [2, 2, 2]
    messages = [record.message for record in caplog.records if "router" in record.message]
    assert len(messages) == 1 and "untrained" in messages[0] and "'code'" in messages[0]


def test_threshold_falls_back_to_the_default_expert(llama_model, prompts):
    chosen = llama_model.route(prompts)
    probability = chosen.logits.softmax(-1).max(-1).values
    llama_model.config.router.update(threshold=(probability.min().item() + probability.max().item()) / 2)
    llama_model.config.router["default_expert"] = "code"
    sure = probability >= llama_model.config.router["threshold"]
    expected = torch.where(sure, chosen.expert_index, 2)
    assert sure.any() and not sure.all()
    assert torch.equal(llama_model.route(prompts).expert_index, expected)


def test_top_experts_are_sorted_and_ties_go_to_the_first(llama_model, prompts):
    with torch.no_grad():
        llama_model.router.head.weight[2] = llama_model.router.head.weight[0]
        llama_model.router.ngrams.weight[:, 2] = llama_model.router.ngrams.weight[:, 0]
    routing = llama_model.route(prompts, top_k=3)
    plain = llama_model.route(prompts)
    assert plain.top_experts is None and torch.equal(plain.probabilities, routing.probabilities)
    assert torch.equal(routing.probabilities, plain.logits.softmax(-1))
    assert routing.probabilities.dtype == routing.top_probabilities.dtype == torch.float32
    for row in range(3):
        expected = sorted(range(3), key=lambda expert: (-routing.probabilities[row, expert].item(), expert))
        assert routing.top_experts[row].tolist() == expected
        assert torch.equal(routing.top_probabilities[row], routing.probabilities[row, expected])
        assert expected.index(0) < expected.index(2)
    assert torch.equal(routing.top_experts[:, 0], routing.expert_index)
    two = llama_model.route(prompts, top_k=2)
    assert torch.equal(two.top_experts, routing.top_experts[:, :2])
    assert torch.equal(two.top_probabilities, routing.top_probabilities[:, :2])


@pytest.mark.parametrize("top_k", [0, 4, -1, 2.0, True], ids=str)
def test_wrong_top_k(llama_model, prompts, top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}, expected 1 to 3, the number of experts"):
        llama_model.route(prompts, top_k=top_k)


def test_temperature_and_threshold(llama_model, prompts):
    """The threshold is compared with the probability after the temperature."""
    llama_model.config.router["default_expert"] = "code"
    plain = llama_model.route(prompts)
    llama_model.config.router["temperature"] = 1000.0
    warm = llama_model.route(prompts)
    assert torch.equal(warm.logits, plain.logits) and torch.equal(warm.expert_index, plain.expert_index)
    torch.testing.assert_close(warm.probabilities, (plain.logits / 1000).softmax(-1))
    llama_model.config.router["threshold"] = 0.6
    assert warm.probabilities.max() < 0.6 < plain.probabilities.max()
    assert llama_model.route(prompts).expert_index.tolist() == [2, 2, 2]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_queries_without_tokens_go_to_the_default_expert(prompts, pooling):
    """No columns at all, or padding only: zero logits, equal probabilities, whatever the router learned."""
    model = random_model(CONFIGS["llama"](), 3)
    model.router.pooling = pooling
    nn.init.normal_(model.router.head.bias, std=9.0)
    model.config.router["default_expert"] = "code"
    mask = torch.ones_like(prompts)
    mask[1] = 0
    for kind in (torch.int64, torch.bool, torch.float32):
        routing = model.route(prompts, mask.to(kind))
        assert routing.expert_index[1] == 2 and routing.logits[1].tolist() == [0, 0, 0]
        torch.testing.assert_close(routing.probabilities[1], torch.full((3,), 1 / 3))
        torch.testing.assert_close(routing.logits[::2], model.route(prompts[::2]).logits, rtol=1e-4, atol=1e-4)
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    for routing in (
        model.route(nothing),
        model.route(nothing, nothing),
        model.route(inputs_embeds=torch.zeros(2, 0, 48)),
    ):
        assert routing.expert_index.tolist() == [2, 2] and routing.logits.tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_routing_reads_the_ends_of_a_long_query(text_config, side):
    """As many tokens as `max_tokens`, padded on any side, and the same in training."""
    model = random_model(text_config, 3)
    model.config.router["max_tokens"] = 7
    long = torch.randint(3, 99, (2, 30), generator=torch.Generator().manual_seed(1))
    ends = torch.cat([long[:, :4], long[:, -3:]], dim=1)
    expected = model.route(ends).logits
    padded, mask = left_padded(long, 5)
    if side == "right":
        padded, mask = padded.roll(-5, dims=1), mask.roll(-5, dims=1)
    torch.testing.assert_close(model.route(long).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.route(padded, mask).logits, expected, rtol=1e-4, atol=1e-4)
    training = model(padded, attention_mask=mask, expert_labels=torch.tensor([0, 1])).router_logits
    torch.testing.assert_close(training, expected, rtol=1e-4, atol=1e-4)
    embeds = model.get_input_embeddings().rows.weight[:30][None]
    ends = torch.cat([embeds[:, :4], embeds[:, -3:]], dim=1)
    torch.testing.assert_close(
        model.route(inputs_embeds=embeds).logits, model.route(inputs_embeds=ends).logits, rtol=1e-4, atol=1e-4
    )


def test_forward_loop_keeps_the_expert_of_its_cache(llama_model, prompts):
    with torch.no_grad():
        first = llama_model(prompts, use_cache=True)
        token = first.logits[:, -1:].argmax(-1)
        second = llama_model(token, past_key_values=first.past_key_values)
        whole = llama_model(torch.cat([prompts, token], dim=1), expert_index=first.expert_index)
    assert torch.equal(second.expert_index, first.expert_index)
    torch.testing.assert_close(second.logits[:, -1], whole.logits[:, -1], rtol=1e-4, atol=1e-4)


# Training


@pytest.mark.parametrize("experts", [[1, 1, 1], [2, 0, 1]], ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(text_config, prompts, experts):
    model = random_model(text_config, 3).train()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model._activation_checkpointing_enable({"use_reentrant": False})
        # Recomputation happens in backward, after the forward pass has left its context.
        model(prompts, labels=prompts, expert_index=experts, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_that_forgets_the_experts_is_an_error(llama_model, prompts, reentrant):
    """A user's own wrapper runs the blocks again where no expert is known: never with those of another call."""
    for block in llama_model.decoder_blocks():
        run = functools.partial(checkpoint, use_reentrant=reentrant)
        block.forward = lambda *args, run=run, block=block.forward, **kwargs: run(
            functools.partial(block, **kwargs), *args
        )
    llama_model.train()
    embeds = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = llama_model(inputs_embeds=embeds, labels=prompts, expert_index=[2, 0, 1], use_cache=False).loss
    llama_model(inputs_embeds=embeds, expert_index=1, use_cache=False)
    with pytest.raises(RuntimeError, match="called outside of its model"):
        loss.backward()


def test_fsdps_activation_checkpointing_is_an_error_too(llama_model, prompts):
    blocks = {*llama_model.decoder_blocks()}
    apply_activation_checkpointing(llama_model, check_fn=lambda module: module in blocks)
    loss = llama_model.train()(prompts, labels=prompts, expert_index=1, use_cache=False).loss
    with pytest.raises(RuntimeError, match="called outside of its model"):
        loss.backward()
    assert llama_model.route(prompts).logits.shape == (3, 3)


def test_language_modelling_loss_is_the_dense_models(text_config, prompts):
    model = random_model(text_config, 2)
    loss = model(prompts, labels=prompts, expert_index=1).loss
    torch.testing.assert_close(loss, dense_expert(model, 1)(prompts, labels=prompts).loss)


# Offloading


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


# Saving and loading


def test_save_and_load(text_config, prompts, tmp_path):
    model = random_model(text_config, 3)
    model.save_pretrained(tmp_path)
    loaded, info = ChannelMergedForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(prompts).logits, model(prompts).logits)
    headless, info = ChannelMergedModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    expected = model(prompts, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(headless(prompts).last_hidden_state, expected)


def test_auto_classes_find_the_model(llama_model, tmp_path):
    llama_model.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is ChannelMergedForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is ChannelMergedModel


def test_tied_embeddings_stay_tied(prompts, tmp_path):
    model = random_model(CONFIGS["qwen2"](), 3)
    model.save_pretrained(tmp_path)
    assert "model.lm_head.rows.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = ChannelMergedForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.lm_head.rows.weight is loaded.model.model.embed_tokens.rows.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_router_and_index(llama_model, prompts, tmp_path, dtype):
    llama_model.save_pretrained(tmp_path)
    loaded = ChannelMergedForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.router.head.weight.dtype == torch.float32
    for module in loaded.channel_modules().values():
        assert module.rows.weight.dtype == dtype and module.channel_index.dtype == torch.int32
    assert loaded(prompts, expert_index=[0, 1, 2]).logits.dtype == dtype


CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_model_routes(text_config, prompts, cast):
    """The trunk computes in its new dtype, the router in float32, with what it learned."""
    model = random_model(text_config, 3)
    expected, router = model.route(prompts), {name: value.clone() for name, value in model.router.state_dict().items()}
    CASTS[cast](model)
    assert all(torch.equal(value, router[name]) for name, value in model.router.state_dict().items())
    routing = model.route(prompts)
    assert routing.logits.dtype == torch.float32 and torch.equal(routing.expert_index, expected.expert_index)
    torch.testing.assert_close(routing.logits, expected.logits, rtol=0.02, atol=0.5)
    assert model.generate(prompts, **GREEDY).shape[0] == 3
    assert model(prompts, expert_labels=expected.expert_index).loss.dtype == torch.float32


REMOTE = """
import sys
import torch
import torch._dynamo.testing
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
headless = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
prompts = torch.load(sys.argv[2])
with torch.no_grad():
    output = model(prompts)
    torch.save((output.logits, output.expert_index, headless(prompts).last_hidden_state), sys.argv[3])
model.save_pretrained(sys.argv[4])
"""


def test_remote_code_in_a_fresh_offline_process(llama_model, prompts, tmp_path, without_package):
    """Logits and routing survive saving, loading without this package, saving from there, and loading again."""
    llama_model.save_pretrained(tmp_path / "first")
    torch.save(prompts, tmp_path / "prompts.pt")
    with torch.no_grad():
        expected = llama_model(prompts)
    for source, target in (("first", "second"), ("second", "third")):
        subprocess.run(
            [
                sys.executable,
                "-c",
                without_package + REMOTE,
                tmp_path / source,
                tmp_path / "prompts.pt",
                tmp_path / "out.pt",
                tmp_path / target,
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        logits, expert_index, hidden_states = torch.load(tmp_path / "out.pt")
        assert torch.equal(logits, expected.logits) and torch.equal(expert_index, expected.expert_index)
        assert hidden_states.shape == (3, 7, 48)


def test_saved_code_is_the_packages_own(llama_model, tmp_path):
    llama_model.save_pretrained(tmp_path)
    package = Path(sys.modules["modeling_channel_merged"].__file__).parent
    shipped = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert {path.name for path in tmp_path.glob("*.py")} == shipped
    assert all((tmp_path / name).read_text() == (package / name).read_text() for name in shipped)


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_channel_index_is_an_error(llama_model, tmp_path):
    llama_model.save_pretrained(tmp_path)
    damage(tmp_path, lambda tensors: tensors.pop("model.model.layers.1.mlp.up_proj.channel_index"))
    with pytest.raises(ValueError, match="no model.model.layers.1.mlp.up_proj.channel_index"):
        ChannelMergedForCausalLM.from_pretrained(tmp_path)


def test_channel_index_out_of_range_is_an_error(llama_model, tmp_path):
    llama_model.save_pretrained(tmp_path)
    damage(tmp_path, lambda tensors: tensors["model.lm_head.channel_index"].fill_(9999))
    with pytest.raises(ValueError, match="lm_head.channel_index holds row 9999"):
        ChannelMergedForCausalLM.from_pretrained(tmp_path)


def test_checkpoint_without_a_router_loads_untrained(llama_model, tmp_path):
    llama_model.save_pretrained(tmp_path)
    damage(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("router.")])
    loaded = ChannelMergedForCausalLM.from_pretrained(tmp_path)
    assert not loaded.router.is_trained


def test_checkpoint_from_before_ngrams_routes_as_it_did(llama_model, prompts, tmp_path):
    """Its config names no features, and its head reads the layer-normalised trunk features alone."""
    llama_model.save_pretrained(tmp_path)
    damage(tmp_path, lambda tensors: tensors.pop("router.ngrams.weight"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["format_version"] = 1
    for key in ("features", "temperature", "max_tokens", "context"):
        del config["router"][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = ChannelMergedForCausalLM.from_pretrained(tmp_path)
    features = llama_model.router_features(prompts)[:, :48] * 48**0.5
    assert loaded.config.router["features"] == "trunk" and loaded.router.ngrams is None
    torch.testing.assert_close(loaded.route(prompts).logits, llama_model.router.head(features))


def test_ngrams_follow_the_token_ids_and_survive_saving(llama_model, prompts, tmp_path):
    nn.init.zeros_(llama_model.router.head.weight)
    expected = llama_model.route(prompts).logits
    assert not torch.equal(expected, llama_model.route(prompts.flip(0)).logits)
    embeddings = llama_model.get_input_embeddings()
    with activate(ActiveExperts(0)):
        inputs_embeds = embeddings(prompts)
    assert llama_model.route(inputs_embeds=inputs_embeds).logits.abs().max() == 0
    llama_model.save_pretrained(tmp_path)
    assert torch.equal(ChannelMergedForCausalLM.from_pretrained(tmp_path).route(prompts).logits, expected)


def test_copies_and_pickles(llama_model, prompts):
    expected = llama_model(prompts).logits
    assert torch.equal(copy.deepcopy(llama_model)(prompts).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(llama_model))(prompts).logits, expected)


def test_fresh_model_from_a_config_is_finite_and_untrained(text_config, prompts):
    config = ChannelMergedConfig(
        text_config=text_config, expert_names=["a", "b"], rows={"model.layers.0.mlp.up_proj": 150}
    )
    model = ChannelMergedForCausalLM(config).eval()
    assert model.model.model.layers[0].mlp.up_proj.num_rows == 150
    assert model(prompts, expert_index=[0, 1, 0]).logits.isfinite().all()
    assert not model.router.is_trained


def test_unknown_module_in_rows_is_an_error(text_config):
    config = ChannelMergedConfig(text_config=text_config, expert_names=["a", "b"], rows={"model.layers.9.mlp": 150})
    with pytest.raises(ValueError, match=r"does not have: \['model.layers.9.mlp'\]"):
        ChannelMergedForCausalLM(config)


def test_resizing_the_vocabulary(text_config, prompts, tmp_path):
    model = random_model(text_config, 3)
    experts = [0, 1, 2]
    with torch.no_grad():
        before = model(prompts, expert_index=experts).logits
        model.resize_token_embeddings(104)
        after = model(prompts, expert_index=experts).logits
    torch.testing.assert_close(after[..., :99], before, rtol=1e-5, atol=1e-5)
    assert after.shape[-1] == model.config.vocab_size == 104
    model.save_pretrained(tmp_path)
    assert torch.equal(ChannelMergedForCausalLM.from_pretrained(tmp_path)(prompts, expert_index=experts).logits, after)


def lacking_tokens(text_config, num_missing: int = 4) -> ChannelMergedForCausalLM:
    """A model whose second expert lacks the last tokens: -inf in its head, one row for them in the embedding."""
    model = random_model(text_config, 3)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    model.config.expert_vocabularies = {"math": {"size": 99 - num_missing, "runs": [[0, 99 - num_missing]]}}
    head.channel_index[1, -num_missing:] = -1
    embedding.channel_index[1, -num_missing:] = embedding.channel_index[1, -1].item()
    return model


def test_resizing_with_tokens_that_an_expert_lacks(text_config, prompts, tmp_path):
    """Up and down: what was -inf stays so, what is new belongs to all, and an export knows."""
    model = lacking_tokens(text_config)
    prompts, experts = prompts.clamp(max=90), [0, 1, 2]
    with torch.no_grad():
        before = model(prompts, expert_index=experts).logits
        model.resize_token_embeddings(104)
        up = model(prompts, expert_index=experts).logits
        assert model.config.vocabulary_channels("math") == [*range(95), *range(99, 104)]
        model.resize_token_embeddings(98)
        down = model(prompts, expert_index=experts).logits
    assert (before[1, :, 95:] == float("-inf")).all() and before[:, :, :95].isfinite().all()
    torch.testing.assert_close(up[..., :99], before, rtol=1e-5, atol=1e-5)
    assert up[..., 99:].isfinite().all()
    torch.testing.assert_close(down, before[..., :98], rtol=1e-5, atol=1e-5)
    assert model.config.vocabulary_channels("math") is None
    model.save_pretrained(tmp_path)
    assert torch.equal(ChannelMergedForCausalLM.from_pretrained(tmp_path)(prompts, expert_index=experts).logits, down)


@pytest.mark.parametrize("experts", [[1, 1], [0, 1]], ids=["one-expert", "mixed"])
def test_soft_capped_logits_of_tokens_that_an_expert_lacks(experts):
    """Capping would make a number of -inf; the loss too is that of the expert's own tokens."""
    config = Gemma2Config(**SIZES, head_dim=12, final_logit_softcapping=5.0, attn_implementation="eager")
    model = lacking_tokens(config)
    input_ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = model(input_ids, expert_index=experts, labels=input_ids)
    assert (outputs.logits[1, :, 95:] == float("-inf")).all()
    finite = outputs.logits[..., :95]
    assert finite.isfinite().all() and finite.abs().max() <= 5.0
    expected = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)


# PEFT 0.21 still asks Transformers by the deprecated name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_on_rows(llama_model, prompts):
    """PEFT adapts `rows` as it adapts any nn.Linear; a fresh adapter changes nothing, and it merges back."""
    from peft import LoraConfig, get_peft_model

    with torch.no_grad():
        expected = llama_model(prompts, expert_index=[0, 1, 2]).logits
        config = LoraConfig(r=4, target_modules=["q_proj.rows", "up_proj.rows"], modules_to_save=["router"])
        adapted = get_peft_model(llama_model, config)
        torch.testing.assert_close(adapted(prompts, expert_index=[0, 1, 2]).logits, expected, rtol=1e-5, atol=1e-5)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        changed = adapted(prompts, expert_index=[0, 1, 2]).logits
        assert not torch.allclose(changed, expected, atol=1e-3)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(prompts, expert_index=[0, 1, 2]).logits, changed, rtol=1e-4, atol=1e-4)


# torch.compile


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
