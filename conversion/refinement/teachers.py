"""The experts as teachers: each runs once over the texts, and what it would say next is kept on disk.

Only one expert is in memory at a time. The files lie in the journal of the staged folder, each with the positions of
some texts of one expert, one text after the other; a run that was stopped goes on with the texts that are missing.

Shapes: P positions (one fewer than tokens in a text), V tokens of the merged vocabulary, k kept tokens.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm
from transformers import PreTrainedModel

from conversion.io.journal import Journal
from conversion.io.options import format_bytes
from conversion.io.weight_files import dtype_text
from conversion.refinement.divergence import TopTokens, top_tokens
from conversion.refinement.padding import batches, pad
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


def run_teachers(
    texts: Sequence[CalibrationText],
    load_expert: Callable[[int], PreTrainedModel],
    names: Sequence[str],
    journal: Journal,
    *,
    top_k: int,
    batch_size: int,
    progress: bool = True,
) -> None:
    """Write what every expert says after each token of its texts, as far as an earlier run has not.

    Args:
        load_expert: gives the model of an expert, in the merged vocabulary; called for one at a time.
        names: of the experts.
        top_k: the tokens that are kept of each position.
        batch_size: texts that run together.

    Raises:
        ValueError: an expert's logits are NaN or infinite.
    """
    missing = [part for part in parts_of(texts) if not journal.finished(part.name)]
    with tqdm(total=sum(len(part.numbers) for part in missing), disable=not progress, dynamic_ncols=True) as bar:
        for expert in sorted({part.expert for part in missing}):
            bar.set_description(f"expert {names[expert]}")
            model = load_expert(expert).eval()
            for part in missing:
                if part.expert == expert:
                    own = [texts[number].input_ids for number in part.numbers]
                    try:
                        kept = distributions(model, own, top_k, batch_size, bar)
                    except ValueError as error:
                        raise ValueError(f"expert {names[expert]!r}: {error}") from None
                    journal.save(part.name, journal.folder / part.name, kept._asdict())
            del model
    size = sum((journal.folder / part.name).stat().st_size for part in parts_of(texts))
    logger.info("the experts' %d most probable tokens after each token are kept: %s", top_k, format_bytes(size))


@torch.inference_mode()
def distributions(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    top_k: int,
    batch_size: int,
    bar: tqdm,
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
        bar.update(len(numbers))
    return TopTokens(*map(torch.cat, zip(*(results[number] for number in range(len(texts))))))


def teacher_bytes(texts: Sequence[CalibrationText], top_k: int) -> int:
    """At most so much is kept of the experts."""
    return sum(len(text.input_ids) for text in texts) * (top_k * KEPT_BYTES + BYTES_OF_REST)


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
