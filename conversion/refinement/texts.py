"""The texts of a refinement: which are trained on and which are held out, as the Trainer reads them, in batches."""

import logging
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from conversion.refinement.divergence import TopTokens
from conversion.refinement.padding import pad
from conversion.refinement.teachers import TeacherFiles
from conversion.vocabulary.calibration_texts import CalibrationText

logger = logging.getLogger(__name__)

MIN_HELD_OUT = 4  # texts of an expert, where it has twice as many
IGNORED = -100  # a label that the Trainer does not count


def hold_out(
    texts: Sequence[CalibrationText], share: float, seed: int, names: Sequence[str]
) -> tuple[list[CalibrationText], list[CalibrationText]]:
    """Split off `share` of every expert's texts to evaluate on, a few at least and half at most.

    Returns:
        (train, held out), both in the order of `texts`.

    Raises:
        ValueError: an expert has fewer than two texts.
    """
    chosen: set[int] = set()
    for expert, name in enumerate(names):
        numbers = [number for number, text in enumerate(texts) if text.expert == expert]
        check_count(name, len(numbers))
        count = min(max(MIN_HELD_OUT, round(share * len(numbers))), len(numbers) // 2)
        chosen.update(random.Random(f"{seed} {name}").sample(numbers, count))
        logger.info("%s: %d texts train, %d are held out", name, len(numbers) - count, count)
    train = [text for number, text in enumerate(texts) if number not in chosen]
    return train, [texts[number] for number in sorted(chosen)]


def check_count(name: str, count: int) -> None:
    """ValueError where an expert has too few texts."""
    if count < 2:
        raise ValueError(
            f"expert {name!r} has {count} texts, expected at least 2: some train, and some are held out to evaluate"
        )


class TeacherDataset(Dataset):
    """Texts with their teachers' distributions, read from disk when they are asked for.

    Args:
        texts: all that the teachers ran on.
        numbers: which of them are in this data set.
        teachers: where the distributions are.
        num_experts: of the model; each has the same weight in the loss, however many tokens its texts have.
    """

    def __init__(
        self, texts: Sequence[CalibrationText], numbers: Sequence[int], teachers: TeacherFiles, num_experts: int
    ):
        self._texts, self._numbers, self._teachers = texts, list(numbers), teachers
        tokens: Counter[int] = Counter()
        for number in self._numbers:
            tokens[texts[number].expert] += len(texts[number].input_ids) - 1
        self._weights = {expert: tokens.total() / (num_experts * count) for expert, count in tokens.items()}

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> dict[str, Any]:
        text = self._texts[self._numbers[place]]
        return {
            "input_ids": text.input_ids,
            "expert": text.expert,
            "weight": self._weights[text.expert],
            "teacher": self._teachers[self._numbers[place]],
        }


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad B texts on the right to T tokens, and line up their teachers' P positions, one text after the other.

    Returns:
        `input_ids`, `attention_mask` and `labels` (B, T) int64, by which the Trainer counts the positions;
        `expert_index` (B,) int64 and `weights` (B,) float32; `row` (P,) int64, the batch row of each position;
        `values`, `tokens` (P, k) and `rest` (P,).
    """
    input_ids, attention_mask = pad([row["input_ids"] for row in rows])
    labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
    labels[:, 0] = IGNORED  # nothing predicts a first token
    positions = torch.tensor([len(row["input_ids"]) - 1 for row in rows])
    teacher = TopTokens(*map(torch.cat, zip(*(row["teacher"] for row in rows))))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "expert_index": torch.tensor([row["expert"] for row in rows]),
        "weights": torch.tensor([row["weight"] for row in rows], dtype=torch.float32),
        "row": torch.arange(len(rows)).repeat_interleave(positions),
        **teacher._asdict(),
    }
