"""What every expert's channels do on its own texts, measured before anything is merged.

Of one expert at a time, on its calibration texts:

- At the output y_o of each channel o the mean over all tokens of (dL / dy_o)^2, where L of a text is the sum of the
  negative log-likelihoods of tokens that the expert itself draws at all places of the text (the Fisher information):
  its expectation is to second order what a change of the channel adds to the divergence from the expert, in which
  each place counts alike. Of the token embedding, whose channels are tokens: the sum over a token's places of the
  squares, mean over the hidden size, divided by all tokens.
- At the input x of each linear module the mean over all tokens of x x^T.

Only outputs have gradients, and each block is computed again on the way back, so that the weights of one expert are
most of the memory. The covariances of all modules would not fit: they are summed in groups, and the forward pass is
repeated for each group, up to its last module.

Texts run in batches that depend on the texts alone. Each batch has one thread, and what several threads add to one
sum they add in the order of the batches; so the results are the same bits for any number of threads, any memory, and
after a run that was stopped. Another device, processor or version of PyTorch may round otherwise.

Shapes: B texts of a batch, T tokens, O channels, I inputs, H hidden size, V tokens of the vocabulary.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from conversion.channels.packed_symmetric import SquareSum
from conversion.io.journal import Journal
from conversion.io.options import format_bytes
from conversion.io.sources import without_folder
from conversion.merging.calibration_file import (
    Calibration,
    Measured,
    covariance_name,
    expert_record,
    gradients_name,
    parts_of,
)
from conversion.merging.calibration_memory import BATCH_TOKENS, CalibrationMemory, run_dtype
from conversion.merging.expert_model import load_expert_model
from conversion.merging.plan import Plan
from conversion.merging.shared_inputs import on_inputs
from conversion.merging.workers import InTurn, Workers
from conversion.vocabulary.calibration_texts import MAX_LENGTH, CalibrationText, read_calibration_texts

SQUARE_ROWS = 64  # tokens whose gradients are squared at a time


@dataclass(frozen=True)
class Batch:
    """Some texts of one expert, padded on the right, where no token of theirs looks."""

    number: int
    input_ids: torch.LongTensor  # (B, T)
    is_token: torch.BoolTensor  # (B * T,)
    has_next: torch.BoolTensor  # (B, T - 1): there is a next token


class _Enough(Exception):
    """A forward pass has come to the last module that was asked for."""


def read_texts(plan: Plan, data: str, max_length: int = MAX_LENGTH) -> list[CalibrationText]:
    """Calibration texts, none longer than the model takes; else as `read_calibration_texts`."""
    longest = getattr(plan.text_config, "max_position_embeddings", None) or max_length
    return read_calibration_texts(data, plan.vocabulary, max_length=min(longest, max_length))


def longest_text(texts: list[CalibrationText]) -> int:
    """Tokens of the longest one."""
    return max(len(text.input_ids) for text in texts)


def measure_calibration(
    plan: Plan,
    texts: list[CalibrationText],
    data: str,
    memory: CalibrationMemory,
    journal: Journal,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Calibration:
    """Measure all experts of a plan; what the journal has as finished is not measured again.

    Args:
        texts: of every expert, in ids of the merged vocabulary.
        data: where they are from; the record has it without its folder.
        memory: how the work is split, which changes no result.
        journal: of a run whose fingerprint has the plan and the texts. The parts lie in its folder and are read there.
        device: where the models run.

    Raises:
        ValueError: the device has too little memory, or outputs or gradients are not finite, with the module.
    """
    sources = memory.sources
    batches = [make_batches([text for text in texts if text.expert == number]) for number in range(plan.num_experts)]
    steps = 1 + len(memory.groups(sources))
    total = steps * sum(map(len, batches))
    files: list[Path] = []
    with tqdm(total=total, unit="batch", disable=not progress, dynamic_ncols=True) as bar:
        for number, name in enumerate(plan.expert_names):
            expert = _Expert(plan, number, batches[number], memory.threads, torch.device(device), bar)
            prefix = f"calibration-{number:02}"
            gradients = journal.folder / f"{prefix}-gradients.safetensors"
            covariances = {
                path: journal.folder / f"{prefix}-{place:05}.safetensors" for place, path in enumerate(sources)
            }
            files += [gradients, *covariances.values()]
            try:
                if not journal.finished(gradients.stem):
                    squares = expert.gradient_squares()
                    save_file({gradients_name(name, path): values for path, values in squares.items()}, gradients)
                    journal.record(gradients.stem, gradients)
                groups = memory.groups([path for path in sources if not journal.finished(covariances[path].stem)])
                for place, group in enumerate(groups, start=1):
                    for path, packed in expert.covariances(group, f"covariances, part {place} of {len(groups)}"):
                        save_file({covariance_name(name, path): packed}, covariances[path])
                        journal.record(covariances[path].stem, covariances[path])
            except torch.OutOfMemoryError:
                needed = format_bytes(memory.expected_peak)
                raise ValueError(
                    f"{device} has too little memory free to measure expert {name!r}, which may take {needed}: "
                    "give a smaller max_memory"
                ) from None
            bar.update(sum(map(len, batches[: number + 1])) * steps - bar.n)
    return Calibration("the calibration", record(plan, texts, data, memory.inputs), parts_of(files), plan)


def record(plan: Plan, texts: list[CalibrationText], data: str, inputs: dict[str, str]) -> Measured:
    """Whose calibration it is, and of what."""
    names = plan.expert_names
    counts = Counter(names[text.expert] for text in texts)
    tokens = Counter()
    for text in texts:
        tokens[names[text.expert]] += len(text.input_ids)
    experts = {name: expert_record(plan, number) for number, name in enumerate(names)}
    return Measured(experts, dict(counts), dict(tokens), inputs, without_folder(data), texts_hash(texts))


def texts_hash(texts: list[CalibrationText]) -> str:
    """What a calibration depends on of its texts, for fingerprints."""
    values = [(text.expert, text.input_ids, text.answer_start) for text in texts]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def make_batches(texts: list[CalibrationText]) -> list[Batch]:
    """Texts of like length together, as many as make up to `BATCH_TOKENS` tokens with their padding."""
    by_length = sorted(texts, key=lambda text: len(text.input_ids))  # stable
    parts: list[list[CalibrationText]] = []
    for text in by_length:
        if not parts or (len(parts[-1]) + 1) * len(text.input_ids) > BATCH_TOKENS:
            parts.append([])
        parts[-1].append(text)
    return [_batch(number, part) for number, part in enumerate(parts)]


def _batch(number: int, texts: list[CalibrationText]) -> Batch:
    length = len(texts[-1].input_ids)
    # A token of the text itself is surely one that the expert has.
    rows = [text.input_ids + text.input_ids[-1:] * (length - len(text.input_ids)) for text in texts]
    place, lengths = torch.arange(length), torch.tensor([len(text.input_ids) for text in texts])
    is_token = place < lengths[:, None]
    return Batch(number, torch.tensor(rows), is_token.flatten(), is_token[:, 1:])


class _Expert:
    """One expert's model, loaded when it is first needed, and what is measured on it."""

    def __init__(self, plan: Plan, number: int, batches: list[Batch], threads: int, device: torch.device, bar: tqdm):
        self._plan = plan
        self._number = number
        self._name = plan.expert_names[number]
        self._batches = batches
        self._num_tokens = sum(int(batch.is_token.sum()) for batch in batches)
        self._threads = threads
        self._device = device
        self._bar = bar
        self._thread = threading.local()  # .batch: the one whose forward pass the thread is in

    @cached_property
    def _model(self) -> PreTrainedModel:
        self._bar.set_description(f"{self._name}: loading")
        return load_expert_model(self._plan, self._number, run_dtype(self._plan, self._number), self._device)

    def gradient_squares(self) -> dict[str, torch.Tensor]:
        """Mean squares of the gradient at every channel's output, by module: (O,) float64."""
        modules = self._plan.modules.channel
        totals = {path: torch.zeros(module.out_features, dtype=torch.float64) for path, module in modules.items()}
        embedding, turns = self._model.get_input_embeddings(), InTurn()

        def watch(path: str, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            batch = self._batch_of_thread()
            if batch is None:  # a block is computed again
                return
            self._check_finite("output", path, output.detach())
            if module is embedding:
                summed = partial(
                    squares_of_tokens, *args, embedding_scale(*args, module.weight, output), len(totals[path])
                )
                output.requires_grad_()
            else:
                summed = squares_of_channels
            squares = self._thread.squares

            def on_gradient(gradient: torch.Tensor) -> None:
                squares[path] = summed(gradient)
                self._check_finite("gradient", path, squares[path])

            output.register_hook(on_gradient)

        def run(batch: Batch) -> None:
            squares = self._thread.squares = {}
            logits = self._forward(batch)[:, :-1][batch.has_next.to(self._device)].float()
            drawn = draw_tokens(logits.detach(), batch.number)
            F.cross_entropy(logits, drawn, reduction="sum").backward()
            with turns.turn("gradients", batch.number):
                for path, part in squares.items():
                    totals[path] += part

        hooks = [self._model.get_submodule(path).register_forward_hook(partial(watch, path)) for path in modules]
        with checkpointed(self._model), removing(hooks):
            self._for_each_batch("gradients", run, turns)
        return {path: total / self._num_tokens for path, total in totals.items()}

    def covariances(self, paths: list[str], step: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Mean of x x^T over the inputs x of some modules, in the order in which they run: packed, (P,) float32."""
        modules = self._plan.modules.channel
        sums = {path: SquareSum(modules[path].in_features, self._device) for path in paths}
        turns = InTurn()

        def watch(path: str, inputs: torch.Tensor) -> None:
            batch = self._batch_of_thread()
            rows = inputs.flatten(0, -2)[batch.is_token.to(self._device)]
            with turns.turn(path, batch.number):
                sums[path].add(rows)
            if path == paths[-1]:
                raise _Enough

        @torch.no_grad()
        def run(batch: Batch) -> None:
            with suppress(_Enough):
                self._forward(batch)

        with removing([on_inputs(self._model.get_submodule(path), partial(watch, path)) for path in paths]):
            self._for_each_batch(step, run, turns)
        while sums:
            path = next(iter(sums))
            packed = sums.pop(path).packed_mean(self._num_tokens)
            self._check_finite("covariance of the inputs", path, packed)
            yield path, packed

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Logits (B, T, V)."""
        self._thread.batch = batch
        try:
            return self._model(input_ids=batch.input_ids.to(self._device), use_cache=False).logits
        finally:
            self._thread.batch = None

    def _batch_of_thread(self) -> Batch | None:
        return getattr(self._thread, "batch", None)

    def _for_each_batch(self, step: str, run: Callable[[Batch], None], turns: InTurn) -> None:
        self._bar.set_description(f"{self._name}: {step}")

        def run_one(batch: Batch) -> None:
            run(batch)
            self._bar.update()

        Workers(self._threads, turns.stop).for_each(run_one, self._batches)

    def _check_finite(self, what: str, path: str, values: torch.Tensor) -> None:
        if not values.isfinite().all():
            raise ValueError(f"expert {self._name!r}: the {what} of {path} holds NaN or infinity on its texts")


def draw_tokens(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """A token for each distribution (places, V) float32: (places,), the same ones for a seed."""
    generator = torch.Generator(logits.device).manual_seed(seed)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def squares_of_channels(gradient: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of squares: (..., O) -> (O,) float64 on the CPU."""
    total = gradient.new_zeros(gradient.shape[-1], dtype=torch.float64)
    for rows in gradient.flatten(0, -2).split(SQUARE_ROWS):
        total += rows.double().square().sum(0)
    return total.cpu()


def squares_of_tokens(ids: torch.Tensor, scale: float, size: int, gradient: torch.Tensor) -> torch.Tensor:
    """Sum over the places of each token of the mean square of its row's gradient: (V,) float64 on the CPU.

    Args:
        ids: (B, T).
        scale: of the embedding's output against its rows.
        size: V.
        gradient: (B, T, H), at the embedding's output.
    """
    squares = gradient.double().square().mean(-1) * scale**2
    return torch.zeros(size, dtype=torch.float64).index_add_(0, ids.flatten().cpu(), squares.flatten().cpu())


def embedding_scale(ids: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> float:
    """What an embedding multiplies its rows by, as Gemma's does: 1 for most."""
    rows = weight[ids].double()
    return float((rows * output.double()).sum() / rows.square().sum())


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """The decoder's blocks are computed again in the backward pass, and keep none of what they computed before.

    As Transformers' own gradient checkpointing, which is for models in training mode, where dropout is on.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def removing(hooks: list[RemovableHandle]) -> Iterator[None]:
    """Hooks that are there as long as the block runs."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
