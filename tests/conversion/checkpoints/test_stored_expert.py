"""Reading one expert of a merged checkpoint gives what its export gives, however it is asked for."""

import json

import pytest
import torch

from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.checkpoints.stored_expert import READ_THROUGH, StoredExpertReader, read_rows_at


@pytest.mark.parametrize("architecture", ["llama", "qwen2-tied", "gpt2-tied"])
def test_every_parameter_of_every_expert(write_checkpoint, tmp_path, architecture):
    """In rows (O, I), also where the base stores the matrix transposed."""
    stored = write_checkpoint(tmp_path / "merged", architecture)
    with MergedCheckpoint(stored.folder) as merged:
        for name, expected in zip(stored.config.expert_names, stored.experts, strict=True):
            reader = StoredExpertReader(merged, name)
            assert reader.tensors.keys() == expected.keys()
            for key, value in expected.items():
                module = merged.modules.channel.get(key.rpartition(".")[0])
                if module is not None and module.kind == "conv1d" and value.dim() == 2:
                    value = value.T
                assert reader.tensors[key].shape == value.shape and reader.tensors[key].dtype == value.dtype
                assert torch.equal(reader.read(key), value), key
                assert torch.equal(reader.read_rows(key, 3, 8), value[3:8]), key


def test_a_token_that_the_expert_lacks_reads_as_zeros(write_checkpoint, tmp_path):
    stored = write_checkpoint(tmp_path / "merged", vocab_sizes=(23, 20, 21))
    with MergedCheckpoint(stored.folder) as merged:
        rows = StoredExpertReader(merged, "math").read("lm_head.weight")
    assert torch.equal(rows[:20], stored.experts[1]["lm_head.weight"][:20]) and not rows[20:].any()


@pytest.mark.parametrize(
    "rows", [[], [5], [7, 3, 3, 9], [0, 22, 1, 22], [2, 2 + READ_THROUGH, 3 + 2 * READ_THROUGH]], ids=str
)
def test_rows_in_any_order(stored, rows):
    """With repetitions and gaps, of a matrix; nothing that was not asked for is in the result."""
    name = "model.lm_head.rows.weight"
    with MergedCheckpoint(stored.folder) as merged:
        rows = torch.tensor(rows, dtype=torch.int64)
        assert torch.equal(read_rows_at(merged.reader, name, rows), merged.reader.read(name)[rows])


def test_a_quantized_checkpoint_is_called_that(stored):
    """Its rows have other names: it must not be taken for a damaged one."""
    file = stored.folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(ValueError, match=r"is quantized \(torchao\), expected rows in floats: .*made from"):
        MergedCheckpoint(stored.folder)
