"""Which expert each row or token of the running batch uses: decided once per call, read by the modules below.

Keyword arguments do not reach the linear layers of a base architecture, so the choice is handed down in a thread's own
variable that is set around the inner forward pass. torch.compile reads it, too, and guards on what the calling thread
has there; it cannot read context variables.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True, eq=False)
class ActiveExperts:
    """The experts of one batch: one of the whole batch, of each batch row, or, packed, of each token.

    A packed batch of (B, T) tokens is one of B * T rows of a single token to everything that has channels.

    Attributes:
        expert: index of the one expert that the whole batch uses, or None for a mixed batch.
        expert_index: (B,) int64 expert of each batch row, or (B * T,) of each token; None when `expert` is given.
        order: like `expert_index`, the batch rows or tokens sorted by expert; None where the index was not read.
        counts: (expert, number of batch rows or tokens) along `order`.
        trunk_only: the pass only makes the router's features and stops after its blocks.
        packed: (B, T) where each token has its expert.
        kept: the experts of the tokens whose logits are made, which alone reach the head; None: of all.
    """

    expert: int | None
    expert_index: torch.LongTensor | None = None
    order: torch.LongTensor | None = field(default=None, repr=False)
    counts: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    trunk_only: bool = False
    packed: tuple[int, int] | None = None
    kept: "ActiveExperts | None" = None

    @classmethod
    def from_index(cls, expert_index: torch.LongTensor, rows: Sequence[int] | None = None) -> "ActiveExperts":
        """Choose the form for a batch from its (B,) index, or (B, T) for a packed one.

        Args:
            rows: the same numbers on the host, flat; without them the index is read there: a synchronisation.
        """
        rows = expert_index.flatten().tolist() if rows is None else rows
        counts = tuple(sorted(Counter(rows).items()))
        if len(counts) == 1:
            return cls(rows[0])
        order = sorted(range(len(rows)), key=rows.__getitem__)
        order = sent(order, expert_index.device)
        return cls(None, expert_index.flatten(), order, counts, packed=packed_shape(expert_index))

    @property
    def is_grouped(self) -> bool:
        """Whether each expert may work on its own batch rows: known, and no graph for each way to share a batch."""
        return self.order is not None and not torch.compiler.is_compiling()

    @classmethod
    def mixed(cls, expert_index: torch.LongTensor) -> "ActiveExperts":
        """A batch whose (B,) or (B, T) index stays on the device: always run as mixed, through all stored rows."""
        return cls(None, expert_index.flatten(), packed=packed_shape(expert_index))

    def keeping(self, logits_to_keep: int | torch.LongTensor) -> "ActiveExperts":
        """The same, where logits are made of the last tokens, or of those at the places given, as a model is told."""
        if self.packed is None or self.kept is not None or (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            return self
        expert_index = kept_tokens(self.expert_index.view(self.packed), logits_to_keep)
        return replace(self, kept=ActiveExperts.mixed(expert_index))


def sent(numbers: Sequence[int], device: torch.device) -> torch.LongTensor:
    """Numbers of the host as an int64 tensor on a device, which is not waited for."""
    on_host = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def packed_shape(expert_index: torch.LongTensor) -> tuple[int, int] | None:
    return tuple(expert_index.shape) if expert_index.dim() == 2 else None


def kept_tokens(values: torch.Tensor, logits_to_keep: int | torch.LongTensor) -> torch.Tensor:
    """Of (B, T, *), those of the tokens whose logits are made."""
    return values[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


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
            "a channel-merged module was called outside of its model, and so for no expert: call the model, or for "
            "token embeddings model.embed(input_ids, expert_index=...). Where a block is recomputed in the backward "
            "pass, let model.gradient_checkpointing_enable() do it: other checkpointing does not know the experts. "
            "TRL's SFTTrainer calls decoder and head apart: give a subclass `compute_loss = Trainer.compute_loss`"
        )
    return active
