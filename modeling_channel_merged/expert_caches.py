"""The experts that filled a cache of keys and values, kept on the cache object, so that they go wherever it goes.

Keys and values of one expert mean nothing to another: a cache can go on only with the experts that filled it.
"""

from dataclasses import dataclass

import torch
from transformers import Cache

from .active_experts import ActiveExperts


@dataclass
class CacheExperts:
    """The experts that filled a cache: (R,) int64, one for each of its rows, and their form for a forward pass."""

    expert_index: torch.LongTensor
    active: ActiveExperts

    def of_prompts(self, num_prompts: int, expand_size: int) -> torch.LongTensor:
        """(B,) experts of the prompts, of which the cache holds `expand_size` rows each (beams, returned sequences).

        Raises:
            ValueError: a cache of different experts with another number of rows.
        """
        if len(self.expert_index) == num_prompts * expand_size:
            return self.expert_index[::expand_size]
        if self.active.expert is not None:  # rows may have been repeated or selected since
            return self.expert_index[:1].expand(num_prompts)
        raise ValueError(
            f"past_key_values was filled by {len(self.expert_index)} rows of different experts, but the batch has "
            f"{num_prompts} prompts with {expand_size} rows each: give their experts as expert_index"
        )

    def are(self, expert_index: torch.LongTensor, expand_size: int) -> bool:
        """Whether these are the experts of (B,) prompts with `expand_size` rows of the cache each."""
        filled = self.expert_index.tolist()
        wanted = [expert for expert in expert_index.tolist() for _ in range(expand_size)]
        return filled == wanted or (len({*filled, *wanted}) == 1)


def remember_experts(past_key_values: Cache | None, expert_index: torch.LongTensor, active: ActiveExperts):
    """Keep the experts that filled a cache on it; a compiled step leaves what the eager prefill kept."""
    if past_key_values is not None and not torch.compiler.is_dynamo_compiling():
        past_key_values.channel_merged_experts = CacheExperts(expert_index, active)


def experts_of_cache(past_key_values: Cache | None) -> CacheExperts | None:
    """The experts that filled a cache; None for no cache or an empty one."""
    experts = getattr(past_key_values, "channel_merged_experts", None)
    return experts if experts is not None and past_key_values.get_seq_length() > 0 else None


def empty_cache(past_key_values: Cache):
    """Empty the caller's cache object itself, for other experts to fill it.

    Raises:
        ValueError: the cache is of a kind that cannot be emptied.
    """
    kind = type(past_key_values).__name__
    try:
        past_key_values.reset()
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(f"{NEEDS_EMPTY_CACHE}, and a {kind} cannot be emptied: start from a new cache") from error
    if past_key_values.get_seq_length() > 0:
        raise ValueError(f"{NEEDS_EMPTY_CACHE}, but a {kind} is not empty after reset(): start from a new cache")
    past_key_values.channel_merged_experts = None


NEEDS_EMPTY_CACHE = "another expert answers than the one that filled past_key_values"
