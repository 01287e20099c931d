"""The router picks an expert for every query: what it reads, what it leaves out, and when the default one answers."""

import pytest
import torch
from torch import nn
from transformers.utils import logging

from .conftest import CONFIGS, GREEDY, dense_expert, left_padded, random_model


def test_forward_routes_when_no_expert_is_given(llama_model, prompts):
    with torch.no_grad():
        output, routing = llama_model(prompts), llama_model.route(prompts)
        given = llama_model(prompts, expert_index=routing.expert_index)
    assert len(set(routing.expert_index.tolist())) > 1
    assert torch.equal(output.router_logits, routing.logits) and torch.equal(output.expert_index, routing.expert_index)
    assert torch.equal(output.logits, given.logits) and given.router_logits is None


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
