"""The whole model: every expert is the dense model it came from, alone and in mixed batches, however it is named."""

import copy

import numpy as np
import pytest
import torch

from modeling_channel_merged import ChannelMergedConfig, ChannelMergedForCausalLM, ChannelMergedModel

from .conftest import GREEDY, dense_expert, left_padded, random_model


def rms(values):
    return values.double().square().mean().sqrt()


def assert_close_to_dense(logits, dense, input_ids):
    """At most twice the error of the dense model, both against the dense model in float64 (invariant 1)."""
    with torch.no_grad():
        plain = dense(input_ids).logits
        truth = copy.deepcopy(dense).double()(input_ids).logits
    assert rms(logits - truth) <= 2 * rms(plain - truth)


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
        (torch.zeros(3, 1, dtype=torch.int64), r"shape \(3, 1\)"),
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
