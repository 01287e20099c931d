"""The experts as teachers: each runs once over the texts, and what it would say next is kept on disk.

Only one expert is in memory at a time. The files lie in the journal of the staged folder, each with the positions of
some texts of one expert, one text after the other; a run that was stopped goes on with the texts that are missing.

Shapes: P positions (one fewer than tokens in a text), V tokens of the merged vocabulary, k kept tokens.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import PreTrainedModel

from conversion.io.journal import Journal
from conversion.io.options import format_bytes
from conversion.io.weight_files import dtype_text
from conversion.refinement.divergence import TopTokens, top_tokens
from conversion.refinement.padding import batches, pad
from conversion.refinement.variants import answer_prompts, vary_prompts
from conversion.vocabulary.calibration_texts import CalibrationText

logger = logging.getLogger(__name__)

KEPT_BYTES, BYTES_OF_REST = 8, 4  # of a token of a position, and of a position
PART_POSITIONS = 1 << 16  # of a file, unless one text alone has more


@dataclass(frozen=True)
class Part:
    """Texts of one expert whose distributions lie in one file."""

    name: str
    expert: int
    numbers: tuple[int, ...]  # of the texts


def parts_of(texts: Sequence[CalibrationText]) -> Iterator[Part]:
    """All texts, expert by expert, in files of about the same size."""
    for expert in sorted({text.expert for text in texts}):
        parts: list[list[int]] = [[]]
        positions = 0
        for number, text in enumerate(texts):
            if text.expert != expert:
                continue
            if parts[-1] and positions + len(text.input_ids) > PART_POSITIONS:
                parts.append([])
                positions = 0
            parts[-1].append(number)
            positions += len(text.input_ids)
        for count, numbers in enumerate(parts):
            yield Part(f"teacher-{expert}-{count:05d}.safetensors", expert, tuple(numbers))


@dataclass(frozen=True)
class TeacherSettings:
    """How the teachers run.

    Attributes:
        top_k: tokens that are kept of each position.
        batch_size: texts that run together.
        variants: of every text that trains; 0: none.
        seed: of the variants.
        kept: tokens that no variant exchanges.
        ends: tokens that end the answers of each expert.
    """

    top_k: int
    batch_size: int
    variants: int = 0
    seed: int = 0
    kept: frozenset[int] = frozenset()
    ends: tuple[tuple[int, ...], ...] = ()


def run_teachers(
    train: Sequence[CalibrationText],
    held_out: Sequence[CalibrationText],
    load_expert: Callable[[int], PreTrainedModel],
    names: Sequence[str],
    journal: Journal,
    settings: TeacherSettings,
    progress: bool = True,
) -> None:
    """Write what every expert says after each token of its texts, as far as an earlier run has not.

    Args:
        train, held_out: the texts; of the first, variants are made and answered before.
        load_expert: gives the model of an expert, in the merged vocabulary; called for one at a time.
        names: of the experts.

    Raises:
        ValueError: an expert's logits are NaN or infinite.
    """
    kept_bytes = 0
    with tqdm(total=len(names), desc="teachers", disable=not progress, dynamic_ncols=True) as bar:
        for expert, name in enumerate(names):
            bar.set_postfix_str(name)
            own = [text for text in train if text.expert == expert]
            teacher = _Teacher(expert, load_expert, settings)
            file = journal.folder / variants_file(expert)
            if settings.variants and not journal.finished(file.name):
                journal.save(file.name, file, _packed(teacher.variants(own)))
            texts = [*own, *(text for text in held_out if text.expert == expert)]
            texts += read_variants(journal.folder, expert) if settings.variants else []
            for part in parts_of(texts):
                file = journal.folder / part.name
                if not journal.finished(part.name):
                    try:
                        top = teacher.distributions([texts[number].input_ids for number in part.numbers])
                    except ValueError as error:
                        raise ValueError(f"expert {name!r}: {error}") from None
                    journal.save(part.name, file, top._asdict())
                kept_bytes += file.stat().st_size
            bar.update()
    logger.info("the experts' %d most probable tokens are kept: %s", settings.top_k, format_bytes(kept_bytes))


def all_texts(
    train: Sequence[CalibrationText], held_out: Sequence[CalibrationText], folder: Path, num_variants: int
) -> tuple[list[CalibrationText], list[int], list[int]]:
    """The texts that the teachers ran on, and the numbers among them of those that train and those held out.

    Beside N variants of each, a text itself is there N times: half of what trains is as somebody wrote it.
    """
    texts = [*train, *held_out]
    if num_variants:
        for expert in sorted({text.expert for text in texts}):
            texts += read_variants(folder, expert)
    first, last = len(train), len(train) + len(held_out)
    return texts, [*range(first)] * max(1, num_variants) + [*range(last, len(texts))], [*range(first, last)]


def variants_file(expert: int) -> str:
    return f"variants-{expert}.safetensors"


def read_variants(folder: Path, expert: int) -> list[CalibrationText]:
    """The variants of an expert's texts, with its answers."""
    tensors = load_file(folder / variants_file(expert))
    parts = tensors["input_ids"].split(tensors["lengths"].tolist())
    starts = tensors["answer_starts"].tolist()
    return [CalibrationText(expert, part.tolist(), start) for part, start in zip(parts, starts, strict=True)]


def _packed(texts: Sequence[CalibrationText]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([token for text in texts for token in text.input_ids], dtype=torch.int32),
        "lengths": torch.tensor([len(text.input_ids) for text in texts]),
        "answer_starts": torch.tensor([text.answer_start for text in texts]),
    }


class _Teacher:
    """One expert, loaded once something is asked of it."""

    def __init__(self, expert: int, load_expert: Callable[[int], PreTrainedModel], settings: TeacherSettings):
        self._expert, self._load, self._settings = expert, load_expert, settings

    @cached_property
    def _model(self) -> PreTrainedModel:
        return self._load(self._expert).eval()

    def variants(self, texts: Sequence[CalibrationText]) -> list[CalibrationText]:
        settings, ends = self._settings, self._settings.ends[self._expert]
        prompts = vary_prompts(texts, settings.variants, settings.kept, settings.seed)
        answer = max(len(text.input_ids) - text.answer_start for text in texts)
        whole = max(len(text.input_ids) for text in texts)
        return answer_prompts(self._model, self._expert, prompts, ends, answer, whole, settings.batch_size)

    def distributions(self, texts: Sequence[Sequence[int]]) -> TopTokens:
        return distributions(self._model, texts, self._settings.top_k, self._settings.batch_size)


@torch.inference_mode()
def distributions(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    top_k: int,
    batch_size: int,
) -> TopTokens:
    """The model's distributions after each token of the texts but the last, one text after the other: P positions."""
    results: dict[int, TopTokens] = {}
    for numbers in batches(texts, batch_size):
        input_ids, mask = (tensor.to(model.device) for tensor in pad([texts[number] for number in numbers]))
        outputs = model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        for place, number in enumerate(numbers):
            top = top_tokens(outputs.logits[place, : len(texts[number]) - 1], top_k)
            if not top.values[:, 0].isfinite().all():
                raise ValueError(f"its logits are not finite in {dtype_text(model.dtype)}")
            results[number] = TopTokens(*(tensor.cpu() for tensor in top))
    return TopTokens(*map(torch.cat, zip(*(results[number] for number in range(len(texts))))))


def teacher_bytes(texts: Sequence[CalibrationText], settings: TeacherSettings) -> int:
    """About so much is kept of the experts."""
    tokens = sum(len(text.input_ids) for text in texts) * (1 + settings.variants)
    return tokens * (settings.top_k * KEPT_BYTES + BYTES_OF_REST)


class TeacherFiles:
    """The distributions that `run_teachers` wrote, of any text by its number; read from disk each time."""

    def __init__(self, folder: Path, texts: Sequence[CalibrationText]):
        self._folder = folder
        self._places: dict[int, tuple[str, int, int]] = {}
        self._open: dict[str, Any] = {}
        for part in parts_of(texts):
            start = 0
            for number in part.numbers:
                stop = start + len(texts[number].input_ids) - 1
                self._places[number] = (part.name, start, stop)
                start = stop

    def __getitem__(self, number: int) -> TopTokens:
        name, start, stop = self._places[number]
        if name not in self._open:
            self._open[name] = safe_open(self._folder / name, "pt")
        return TopTokens(*(self._open[name].get_slice(field)[start:stop] for field in TopTokens._fields))

    def __getstate__(self) -> dict[str, Any]:
        # A process that loads data opens its own.
        return {**self.__dict__, "_open": {}}
