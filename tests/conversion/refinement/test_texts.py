import pytest
import torch

from conversion.refinement.divergence import TopTokens
from conversion.refinement.teachers import TeacherFiles
from conversion.refinement.texts import IGNORED, TeacherDataset, collate, hold_out
from conversion.vocabulary.calibration_texts import CalibrationText

NAMES = ["a", "b"]


def texts_of(*counts: int) -> list[CalibrationText]:
    """So many texts of each expert, the experts in turn as long as they have any, no two the same."""
    rows = [(number, expert) for expert, count in enumerate(counts) for number in range(count)]
    return [CalibrationText(expert, [expert + 1, number, 5], 1) for number, expert in sorted(rows)]


@pytest.mark.parametrize(
    ("counts", "held"), [((100, 50), (10, 5)), ((20, 9), (4, 4)), ((5, 2), (2, 1))], ids=["share", "few", "very few"]
)
def test_every_expert_gives_up_some(counts, held):
    """The share, at least four, at most half; the order stays."""
    texts = texts_of(*counts)
    train, held_out = hold_out(texts, 0.1, 0, NAMES)
    assert tuple(sum(text.expert == expert for text in held_out) for expert in (0, 1)) == held
    assert sorted([*train, *held_out], key=texts.index) == texts
    for part in (train, held_out):
        assert part == sorted(part, key=texts.index)
    assert hold_out(texts, 0.1, 0, NAMES) == (train, held_out)


def test_another_seed_holds_out_others():
    texts = texts_of(50, 50)
    assert hold_out(texts, 0.1, 0, NAMES)[1] != hold_out(texts, 0.1, 1, NAMES)[1]


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_texts_are_an_error(count):
    with pytest.raises(ValueError, match=f"expert 'b' has {count} texts, expected at least 2"):
        hold_out(texts_of(9, count), 0.1, 0, NAMES)


class Known(TeacherFiles):
    """Distributions whose values are the numbers of their texts."""

    def __init__(self, texts):
        self.texts = texts

    def __getitem__(self, number):
        positions = len(self.texts[number].input_ids) - 1
        return TopTokens(
            torch.full((positions, 2), float(number)),
            torch.full((positions, 2), number, dtype=torch.int32),
            torch.full((positions,), float(number)),
        )


def test_batches_line_up_positions():
    """Texts are padded on the right; each of the P positions knows its row, and nothing predicts a first token."""
    texts = [CalibrationText(1, [7, 8, 9, 4], 1), CalibrationText(0, [3, 0], 1), CalibrationText(1, [5, 6, 0], 1)]
    dataset = TeacherDataset(texts, [2, 0, 1], Known(texts), 2)
    batch = collate([dataset[0], dataset[1], dataset[2]])
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0], [7, 8, 9, 4], [3, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 0, IGNORED], [IGNORED, 8, 9, 4], [IGNORED, 0, IGNORED, IGNORED]]
    assert batch["expert_index"].tolist() == [1, 1, 0]
    assert batch["row"].tolist() == [0, 0, 1, 1, 1, 2]
    assert batch["rest"].tolist() == [2, 2, 0, 0, 0, 1] == batch["tokens"][:, 1].tolist()
    assert len(batch["row"]) == (batch["labels"] != IGNORED).sum()


def test_experts_weigh_the_same_however_long_their_texts():
    """Over a whole pass, the weights of each expert's positions have the same sum, and their mean is 1."""
    texts = [CalibrationText(0, [1] * 9, 1), CalibrationText(1, [1] * 3, 1), CalibrationText(1, [1] * 4, 1)]
    dataset = TeacherDataset(texts, range(3), Known(texts), 2)
    batch = collate([dataset[number] for number in range(3)])
    weights = batch["weights"][batch["row"]]
    experts = batch["expert_index"][batch["row"]]
    sums = [float(weights[experts == expert].sum()) for expert in (0, 1)]
    assert sums == pytest.approx([len(weights) / 2] * 2)
