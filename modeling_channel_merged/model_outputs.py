"""Outputs of channel-merged models."""

from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.modeling_outputs import ModelOutput


@dataclass
class RouterOutput(ModelOutput):
    """Routing of a batch.

    Attributes:
        logits: (B, N) float32 router logits; zeros for a query without tokens.
        expert_index: (B,) int64 expert that answers each query; the default expert where the router is untrained, in
            doubt by its threshold, finds it none of these, or has no token to read.
        probabilities: (B, N) float32, the softmax of the logits after the router's temperature.
        known: (B,) float32, the share of a query's n-grams that the router's training has seen; 1 without n-grams.
        none_of_these: (B,) bool, whether that is less than `router["min_known"]`: a query for none of the experts.
        top_experts: (B, top_k) int64 most probable experts, best first; the lower index first among equals.
        top_probabilities: (B, top_k) float32, theirs.
    """

    logits: torch.FloatTensor | None = None
    expert_index: torch.LongTensor | None = None
    probabilities: torch.FloatTensor | None = None
    known: torch.FloatTensor | None = None
    none_of_these: torch.BoolTensor | None = None
    top_experts: torch.LongTensor | None = None
    top_probabilities: torch.FloatTensor | None = None


@dataclass
class ChannelMergedModelOutput(ModelOutput):
    """Hidden states of the base architecture, with the routing that chose the experts.

    Attributes:
        last_hidden_state: (B, T, H).
        past_key_values: the cache, which remembers the experts that filled it.
        hidden_states, attentions: as in the base architecture.
        router_logits: (B, N) float32; None where the experts were given.
        expert_index: (B,) int64.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: torch.FloatTensor | None = None
    expert_index: torch.LongTensor | None = None


@dataclass
class ChannelMergedCausalLMOutput(ModelOutput):
    """Output of `ChannelMergedForCausalLM`.

    Attributes:
        loss: () language-modelling loss with `labels`, router loss with `expert_labels`.
        logits: (B, T, V); -inf for tokens outside the vocabulary of the row's expert.
        past_key_values: the cache, which remembers the experts that filled it.
        hidden_states, attentions: as in the base architecture.
        router_logits: (B, N) float32; None where the experts were given.
        expert_index: (B,) int64.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: torch.FloatTensor | None = None
    expert_index: torch.LongTensor | None = None
