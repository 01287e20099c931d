"""Which expert each row of the running batch uses: decided once per call, read by every channel-merged module below.

Keyword arguments do not reach the linear layers of a base architecture, so the choice is handed down in a thread's own
variable that is set around the inner forward pass. torch.compile reads it, too, and guards on what the calling thread
has there; it cannot read context variables.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    def from_index(cls, expert_index: torch.LongTensor, rows: Sequence[int] | None = None) -> "ActiveExperts":
        """Choose the form for a batch from its (B,) index.

        Args:
            rows: the same numbers on the host; without them the index is read there: a synchronisation.
        """
        rows = expert_index.tolist() if rows is None else rows
        counts = tuple(sorted(Counter(rows).items()))
        if len(counts) == 1:
            return cls(rows[0])
        order = sorted(range(len(rows)), key=rows.__getitem__)
        return cls(None, expert_index, torch.tensor(order, device=expert_index.device), counts)

    @property
    def is_grouped(self) -> bool:
        """Whether each expert may work on its own batch rows: known, and no graph for each way to share a batch."""
        return self.order is not None and not torch.compiler.is_compiling()

    @classmethod
    def mixed(cls, expert_index: torch.LongTensor) -> "ActiveExperts":
        """A batch whose (B,) index stays on the device: always run as a mixed one, through all stored rows."""
        return cls(None, expert_index)


class _Running(threading.local):
    """The experts of the forward pass that the calling thread is in."""

    def __init__(self):  # in every thread; torch.compile guards on what an object holds, not on its class's defaults
        self.active: ActiveExperts | None = None


_running = _Running()


@contextmanager
def activate(active: ActiveExperts | None) -> Iterator[None]:
    """Run the enclosed forward pass with these experts."""
    outer, _running.active = _running.active, active
    try:
        yield
    finally:
        _running.active = outer


def active_or_none() -> ActiveExperts | None:
    """The experts of the enclosing `activate` of this thread, or None outside of one."""
    return _running.active


def active_experts() -> ActiveExperts:
    """The experts of the enclosing `activate`; RuntimeError outside of one."""
    active = active_or_none()
    if active is None:
        raise RuntimeError(
            "a channel-merged module was called outside of its model: call the ChannelMerged model, or wrap the call "
            "in `activate(ActiveExperts(expert))`. Where a block is recomputed in the backward pass, let "
            "model.gradient_checkpointing_enable() do it: other checkpointing does not know the experts. TRL's "
            "SFTTrainer calls decoder and head apart: give a subclass of it `compute_loss = Trainer.compute_loss`"
        )
    return active
