"""Losses and gradients of the experts, with activation checkpointing and with PEFT's adapters."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint

from .conftest import dense_expert, random_model


def test_language_modelling_loss_is_the_dense_models(text_config, prompts):
    model = random_model(text_config, 2)
    loss = model(prompts, labels=prompts, expert_index=1).loss
    torch.testing.assert_close(loss, dense_expert(model, 1)(prompts, labels=prompts).loss)


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
