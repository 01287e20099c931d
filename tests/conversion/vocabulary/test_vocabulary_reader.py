"""Channels of the merged vocabulary, read from a checkpoint that has its own ids for them."""

import pytest
import torch
from safetensors.torch import save_file

from conversion.io.row_reader import CheckpointReader
from conversion.io.weight_files import read_headers
from conversion.merging.expert_model import load_expert_model
from conversion.merging.plan import make_plan
from conversion.vocabulary.vocabulary_reader import MEAN_ROWS, VocabularyReader

OWN_IDS = torch.tensor([0, 1, 2, -1, -1, 5, 3, 4, -1, 0])


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (6, 3), "head.bias": (6,), "norm.weight": (6,)}
    return {name: torch.randn(*shape, generator=generator).bfloat16() for name, shape in shapes.items()}


@pytest.fixture
def reader(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    reader = CheckpointReader("math", read_headers(tmp_path))
    yield reader
    reader.close()


@pytest.mark.parametrize("name", ["embed.weight", "head.bias"])
def test_any_chunk_is_the_rows_of_its_channels(reader, tensors, name):
    """Own rows wherever they lie, the mean row of the tokens where there are none."""
    ours = VocabularyReader(reader, ["embed.weight", "head.bias"], OWN_IDS, torch.tensor([0, 1, 3]))
    mean = tensors[name][[0, 1, 3]].double().mean(0).bfloat16()
    expected = torch.stack([tensors[name][number] if number >= 0 else mean for number in OWN_IDS])
    for start in range(len(OWN_IDS)):
        for stop in range(start + 1, len(OWN_IDS) + 1):
            assert torch.equal(ours.read_rows(name, start, stop), expected[start:stop])
    assert torch.equal(ours.read(name), expected)
    assert ours.tensors[name].shape == expected.shape
    assert ours.tensors[name].num_bytes == expected.numel() * 2
    assert ours.tensors[name].dtype == torch.bfloat16 and ours.name == "math"


def test_other_parameters_are_the_readers_own(reader, tensors):
    ours = VocabularyReader(reader, ["embed.weight"], OWN_IDS)
    assert torch.equal(ours.read("norm.weight"), tensors["norm.weight"])
    assert torch.equal(ours.read_rows("head.bias", 2, 4), tensors["head.bias"][2:4])
    assert ours.tensors["norm.weight"] == reader.tensors["norm.weight"]


def test_without_tokens_zeros_stand_for_missing_rows(reader):
    rows = VocabularyReader(reader, ["embed.weight"], OWN_IDS).read_rows("embed.weight", 2, 6)
    assert (rows[1:3] == 0).all() and (rows[[0, 3]] != 0).all()


def test_the_mean_of_many_rows(tmp_path):
    """Over several steps, and the last one short."""
    values = torch.randn(2 * MEAN_ROWS + 7, 2, generator=torch.Generator().manual_seed(1))
    save_file({"embed.weight": values}, tmp_path / "model.safetensors")
    reader = CheckpointReader("base", read_headers(tmp_path))
    tokens = torch.arange(3, 2 * MEAN_ROWS + 2)
    mean = VocabularyReader(reader, ["embed.weight"], torch.tensor([-1]), tokens).mean_row("embed.weight")
    reader.close()
    torch.testing.assert_close(mean, values[tokens].mean(0, keepdim=True))


def test_an_experts_model_reads_and_writes_merged_ids(experts):
    """Its logits are those of its own checkpoint at the merged ids of its tokens, and -inf at those it lacks."""
    plan = make_plan(experts.recipe(tokenizer_source="union"))
    for number, name in enumerate(plan.expert_names):
        channels, dense = plan.vocabulary.channels[number], experts.dense(name)
        own = torch.arange(0, len(channels), 9).view(1, -1)
        with torch.no_grad():
            expected, logits = dense(own).logits, load_expert_model(plan, number)(channels[own]).logits
        assert torch.equal(logits[..., channels], expected)
        missing = ~plan.vocabulary.present[number]
        assert logits[..., missing].isneginf().all() and logits[..., ~missing].isfinite().all()
