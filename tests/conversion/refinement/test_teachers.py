import random

import pytest
import torch

from conversion.io.journal import Journal
from conversion.refinement import teachers
from conversion.refinement.divergence import top_tokens
from conversion.refinement.teachers import (
    TeacherFiles,
    TeacherSettings,
    all_texts,
    parts_of,
    run_teachers,
    teacher_bytes,
)
from conversion.vocabulary.calibration_texts import CalibrationText

NAMES = ["a", "b", "c"]


@pytest.fixture
def models(make_model):
    return [make_model(seed) for seed in range(3)]


@pytest.fixture
def texts():
    """Of three experts, mixed, of two to twelve tokens."""
    generator = random.Random(0)
    return [
        CalibrationText(number % 3, [generator.randrange(259) for _ in range(generator.randint(2, 12))], 1)
        for number in range(20)
    ]


def label(texts, models, folder, stop_at=None, **keys):
    folder.mkdir(exist_ok=True)
    journal = Journal(folder, {"run": 1})
    called = []

    def load(number):
        if number == stop_at:
            raise KeyboardInterrupt
        called.append(number)
        return models[number]

    settings = TeacherSettings(**{"top_k": 5, "batch_size": 4, **keys})
    run_teachers(texts[:-5], texts[-5:], load, NAMES, journal, settings, progress=False)
    return journal, called


def test_every_text_has_its_own_experts_distributions(texts, models, tmp_path, monkeypatch):
    """As the expert alone would say of the text alone; in one file or in many, in whatever batches."""
    whole, _ = label(texts, models, tmp_path / "whole")
    monkeypatch.setattr(teachers, "PART_POSITIONS", 20)
    assert len(list(parts_of(texts))) > 3
    parts, called = label(texts, models, tmp_path / "parts", batch_size=1)
    assert called == [0, 1, 2]
    sources = {"parts": TeacherFiles(parts.folder, texts)}
    monkeypatch.undo()
    sources["whole"] = TeacherFiles(whole.folder, texts)
    for number, text in enumerate(texts):
        with torch.no_grad():
            logits = models[text.expert](torch.tensor([text.input_ids])).logits[0, :-1]
        expected = top_tokens(logits, 5)
        for source in sources.values():
            assert torch.equal(source[number].tokens, expected.tokens)
            torch.testing.assert_close(source[number].values, expected.values, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(source[number].rest, expected.rest, rtol=1e-4, atol=1e-5)
    size = sum(file.stat().st_size for file in whole.folder.glob("teacher-*"))
    assert size - 3 * 1024 < teacher_bytes(texts, TeacherSettings(5, 4))


def test_what_is_there_is_not_run_again(texts, models, tmp_path):
    """A run that was stopped goes on with the experts that are missing; a damaged file counts as missing."""
    with pytest.raises(KeyboardInterrupt):
        label(texts, models, tmp_path / "run", stop_at=2)
    assert label(texts, models, tmp_path / "run")[1] == [2]
    assert label(texts, models, tmp_path / "run")[1] == []
    next((tmp_path / "run" / ".journal").glob("teacher-1-*")).write_bytes(b"half")
    assert label(texts, models, tmp_path / "run")[1] == [1]


def test_files_are_opened_anew_in_another_process(texts, models, tmp_path):
    """What a data loader's worker gets holds no open file."""
    import pickle

    journal, _ = label(texts, models, tmp_path / "run")
    files = TeacherFiles(journal.folder, texts)
    before = files[3]
    after = pickle.loads(pickle.dumps(files))[3]
    assert all(map(torch.equal, before, after))


def test_logits_that_are_not_finite_are_an_error(texts, models, tmp_path):
    with torch.no_grad():
        models[1].lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="expert 'b': its logits are not finite in float32"):
        label(texts, models, tmp_path / "run")


def test_variants_are_answered_by_their_expert_and_trained_on(texts, models, tmp_path):
    """Three for each text that trains, which is there as often; each is what its expert would say next."""
    keys = {"variants": 3, "kept": frozenset({0}), "ends": ((7, 9), (11,), ())}
    journal, called = label(texts, models, tmp_path / "run", **keys)
    assert called == [0, 1, 2]
    train, held_out = texts[:-5], texts[-5:]
    everything, trained_on, evaluated_on = all_texts(train, held_out, journal.folder, 3)
    assert [everything[number] for number in evaluated_on] == held_out
    variants = [everything[number] for number in trained_on[3 * len(train) :]]
    assert [everything[number] for number in trained_on[: 3 * len(train)]] == 3 * train
    assert len(variants) == 3 * len(train)
    files = TeacherFiles(journal.folder, everything)
    for number in trained_on:
        text, ends = everything[number], keys["ends"][everything[number].expert]
        with torch.no_grad():
            logits = models[text.expert](torch.tensor([text.input_ids])).logits[0, :-1]
        assert torch.equal(files[number].tokens[:, 0].long(), logits.argmax(-1))
        if number >= len(texts):
            answer = text.input_ids[text.answer_start :]
            assert logits.argmax(-1)[text.answer_start - 1 :].tolist() == answer
            assert not set(answer[:-1]) & set(ends)
    assert label(texts, models, tmp_path / "run", **keys)[1] == []
