"""Which expert each row of the running batch uses: decided once per call, read by every channel-merged module below.

Keyword arguments do not reach the linear layers of a base architecture, so the choice is handed down through a context
variable (safe under threads) that is set around the inner forward pass. torch.compile cannot read context variables;
while it traces, the layers read a plain mirror instead.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, eq=False)
class ActiveExperts:
    """The experts of one batch.

    Attributes:
        expert: index of the one expert that the whole batch uses, or None for a mixed batch.
        expert_index: (B,) int64 expert of each batch row; None when `expert` is given.
        order: (B,) int64 batch rows sorted by expert; None where the index was not read.
        counts: (expert, number of batch rows) along `order`.
        trunk_only: the pass only makes the router's features and stops after its blocks.
    """

    expert: int | None
    expert_index: torch.LongTensor | None = None
    order: torch.LongTensor | None = field(default=None, repr=False)
    counts: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    trunk_only: bool = False

    @classmethod
    def from_index(cls, expert_index: torch.LongTensor) -> "ActiveExperts":
        """Choose the form for a batch from its (B,) index. Reads the index on the host: the one synchronisation."""
        counts = sorted(Counter(expert_index.tolist()).items())
        if len(counts) == 1:
            return cls(counts[0][0])
        return cls(None, expert_index, expert_index.argsort(stable=True), tuple(counts))

    @classmethod
    def mixed(cls, expert_index: torch.LongTensor) -> "ActiveExperts":
        """A batch whose (B,) index stays on the device: always run as a mixed one, through all stored rows."""
        return cls(None, expert_index)


_active: ContextVar[ActiveExperts | None] = ContextVar("active_experts", default=None)
_mirror: ActiveExperts | None = None


@contextmanager
def activate(active: ActiveExperts | None) -> Iterator[None]:
    """Run the enclosed forward pass with these experts."""
    global _mirror
    mirrored, _mirror = _mirror, active
    token = None if torch.compiler.is_dynamo_compiling() else _active.set(active)
    try:
        yield
    finally:
        _mirror = mirrored
        if token is not None:
            _active.reset(token)


def active_or_none() -> ActiveExperts | None:
    """The experts of the enclosing `activate`, or None outside of one."""
    return _mirror if torch.compiler.is_dynamo_compiling() else _active.get()


def active_experts() -> ActiveExperts:
    """The experts of the enclosing `activate`; RuntimeError outside of one."""
    active = active_or_none()
    if active is None:
        raise RuntimeError(
            "a channel-merged module was called outside of its model: call the ChannelMerged model, or wrap the call "
            "in `activate(ActiveExperts(expert))`"
        )
    return active
