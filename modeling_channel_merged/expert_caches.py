"""The experts of a batch, and those that filled a cache of keys and values, kept on the cache object itself.

Keys and values of one expert mean nothing to another: a cache can go on only with the experts that filled it. They go
where the cache goes, into copies and pickles too, and follow its rows when they are reordered, repeated or selected.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as remember_result

import torch
from transformers import Cache

from .active_experts import ActiveExperts
from .channel_ops import tensor_version


@dataclass(frozen=True, eq=False)
class BatchExperts:
    """The experts of a batch.

    Attributes:
        expert_index: (B,) int64, or (B, T) of each token; such a batch leaves no cache.
        active: their form for a forward pass.
        rows: the same numbers on the host, flat; empty where they are not known there, as while torch.compile traces.
        given: the tensor that named them, and its version then: while it is passed again, nothing is read from it.
    """

    expert_index: torch.LongTensor
    active: ActiveExperts
    rows: tuple[int, ...] = ()
    given: tuple[torch.Tensor, int | None] | None = None

    @classmethod
    def of_rows(cls, rows: Sequence[int], device=None, given: torch.Tensor | None = None) -> "BatchExperts":
        """From the expert of each row, read from the tensor `given` if there is one."""
        expert_index = torch.tensor(rows, dtype=torch.int64, device=device)
        active = ActiveExperts.from_index(expert_index, rows)
        return cls(expert_index, active, tuple(rows), None if given is None else (given, tensor_version(given)))

    @classmethod
    def of_tokens(cls, expert_index: torch.LongTensor) -> "BatchExperts":
        """From the (B, T) expert of each token."""
        rows = expert_index.flatten().tolist()
        return cls(expert_index, ActiveExperts.from_index(expert_index, rows), tuple(rows))

    def check_caches(self, past_key_values: Cache | None, use_cache: bool | None) -> bool | None:
        """What `use_cache` is for these experts.

        Raises:
            ValueError: a cache for experts of each token: it holds keys and values by batch rows.
        """
        if self.expert_index.dim() == 1:
            return use_cache
        if past_key_values is not None or use_cache:
            raise ValueError(
                "expert_index names the expert of each token, (B, T), and a cache holds one expert's keys and values "
                "for each batch row: leave out past_key_values and use_cache, or give one expert for each row"
            )
        return False

    def came_from(self, expert_index) -> bool:
        """Whether `expert_index` is the tensor that named them, unchanged."""
        if self.given is None or expert_index is not self.given[0]:
            return False
        if expert_index.is_inference() and expert_index.device.type == "cpu":  # no version says; a look is free
            return tuple(expert_index.tolist()) == self.rows
        return tensor_version(expert_index) == self.given[1]

    def selected(self, indices) -> "BatchExperts":
        """Of some rows, by whatever indexes a tensor's first dimension."""
        if self.active.expert is not None and isinstance(indices, torch.Tensor) and indices.dtype != torch.bool:
            rows = self.rows[:1] * len(indices)
        else:
            indices = indices.cpu() if isinstance(indices, torch.Tensor) else indices
            rows = tuple(torch.tensor(self.rows)[indices].tolist())
        return self if rows == self.rows else BatchExperts.of_rows(rows, self.expert_index.device)

    def repeated(self, repeats: int) -> "BatchExperts":
        """Each row so many times, one after the other."""
        rows = tuple(expert for expert in self.rows for _ in range(repeats))
        return self if rows == self.rows else BatchExperts.of_rows(rows, self.expert_index.device)

    def of_prompts(self, num_prompts: int, expand_size: int) -> torch.LongTensor:
        """(B,) experts of the prompts, of which the cache holds `expand_size` rows each (beams, returned sequences).

        Raises:
            ValueError: a cache of different experts with another number of rows.
        """
        if len(self.rows) == num_prompts * expand_size:
            return self.expert_index[::expand_size]
        if self.active.expert is not None:
            return self.expert_index[:1].expand(num_prompts)
        raise ValueError(
            f"past_key_values was filled by {len(self.rows)} rows of different experts, but the batch has "
            f"{num_prompts} prompts with {expand_size} rows each: give their experts as expert_index"
        )

    def are(self, rows: Sequence[int], expand_size: int = 1) -> bool:
        """Whether these are the experts of prompts with `expand_size` rows of the cache each."""
        wanted = tuple(expert for expert in rows for _ in range(expand_size))
        return self.rows == wanted or len({*self.rows, *wanted}) == 1


class FollowsRows:
    """What is mixed into the class of a filled cache: `channel_merged_experts` are always those of its rows."""

    channel_merged_experts: BatchExperts | None

    def reorder_cache(self, beam_idx: torch.LongTensor):
        super().reorder_cache(beam_idx)
        self.channel_merged_experts = self.channel_merged_experts and self.channel_merged_experts.selected(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor):
        super().batch_select_indices(indices)
        self.channel_merged_experts = self.channel_merged_experts and self.channel_merged_experts.selected(indices)

    def batch_repeat_interleave(self, repeats: int):
        super().batch_repeat_interleave(repeats)
        self.channel_merged_experts = self.channel_merged_experts and self.channel_merged_experts.repeated(repeats)

    def reset(self):
        super().reset()
        if self.get_seq_length() == 0:
            self.channel_merged_experts = None

    def __reduce__(self):
        return _new_follower, (type(self).__mro__[2],), self.__dict__


@remember_result
def _follower(kind: type[Cache]) -> type[Cache]:
    return type(kind.__name__, (FollowsRows, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _new_follower(kind: type[Cache]) -> Cache:
    follower = _follower(kind)
    return follower.__new__(follower)


def remember_experts(past_key_values: Cache | None, experts: BatchExperts):
    """Keep the experts that filled a cache on it; a compiled step leaves what the eager prefill kept."""
    if past_key_values is None or torch.compiler.is_dynamo_compiling():
        return
    if not isinstance(past_key_values, FollowsRows):
        past_key_values.__class__ = _follower(type(past_key_values))
    past_key_values.channel_merged_experts = experts


def experts_of_cache(past_key_values: Cache | None) -> BatchExperts | None:
    """The experts that filled a cache; None for no cache or an empty one."""
    experts = getattr(past_key_values, "channel_merged_experts", None)
    if experts is None:
        return None
    length = past_key_values.get_seq_length()
    # A static cache counts on its device; `reset`, which alone empties it, has forgotten the experts.
    return experts if isinstance(length, torch.Tensor) or length > 0 else None


def check_not_filled(past_key_values: Cache | None):
    """ValueError for a filled cache that knows no experts, before the router guesses some from a part of the text."""
    if past_key_values is None or torch.compiler.is_dynamo_compiling():
        return
    if experts_of_cache(past_key_values) is None and int(past_key_values.get_seq_length()) > 0:
        raise ValueError(
            "past_key_values is filled, but does not know by which experts, as after a compiled call: give them as "
            "expert_index"
        )


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


NEEDS_EMPTY_CACHE = "another expert answers than the one that filled past_key_values"
