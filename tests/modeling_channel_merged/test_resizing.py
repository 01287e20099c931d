"""Vocabularies that grow and shrink, also where an expert lacks tokens."""

import pytest
import torch
from torch import nn
from transformers import Gemma2Config

from modeling_channel_merged import ChannelMergedForCausalLM

from .conftest import SIZES, random_model


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
