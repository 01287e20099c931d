"""The reader gives back what safetensors wrote, chunk by chunk, and refuses what is not a whole checkpoint."""

import json

import pytest
import torch
from safetensors.torch import save_file

from conversion.expert_reader import ExpertReader, match_names, read_header, read_headers


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(7, 5, generator=generator).bfloat16(),
        "a.weight": torch.randn(5, 3, generator=generator),
        "a.bias": torch.randn(5, generator=generator).half(),
    }


@pytest.fixture
def sharded(tmp_path, tensors):
    """A checkpoint in two shards."""
    for number, names in enumerate((["a.weight", "b.weight"], ["a.bias"])):
        save_file({name: tensors[name] for name in names}, tmp_path / f"s{number}.safetensors")
    weight_map = {"a.weight": "s0.safetensors", "b.weight": "s0.safetensors", "a.bias": "s1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_row_chunks_put_together_are_the_tensor(sharded, tensors, chunk):
    reader = ExpertReader("e", read_headers(sharded))
    for name, tensor in tensors.items():
        assert reader.tensors[name].dtype == tensor.dtype
        rows = len(tensor)
        parts = [reader.read_rows(name, start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
        assert torch.equal(torch.cat(parts), tensor)
        assert torch.equal(reader.read(name), tensor)
    reader.close()


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_transposed_matrix_is_read_as_rows(sharded, tensors, chunk):
    reader = ExpertReader("e", read_headers(sharded), transposed=["a.weight"])
    parts = [reader.read_rows("a.weight", start, min(start + chunk, 3)) for start in range(0, 3, chunk)]
    assert torch.equal(torch.cat(parts), tensors["a.weight"].T)
    reader.close()


def test_a_single_file_goes_before_an_index(sharded, tensors):
    save_file(tensors, sharded / "model.safetensors")
    assert {tensor.file.name for tensor in read_headers(sharded).values()} == {"model.safetensors"}


@pytest.mark.parametrize("cut", [1, 30, -4])
def test_a_file_cut_short_is_refused(tmp_path, tensors, cut):
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    content = file.read_bytes()
    file.write_bytes(content[:cut])
    with pytest.raises(ValueError, match="model.safetensors.* (not a whole|cut short)"):
        read_headers(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((20).to_bytes(8, "little") + b"this is no header at all")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_header(file)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path, tensors):
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    reader = ExpertReader("math", read_headers(tmp_path))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="math: .* ended 8 bytes early"):
        for name in tensors:
            reader.read(name)
    reader.close()


def test_a_missing_shard_is_named(sharded):
    (sharded / "s1.safetensors").unlink()
    with pytest.raises(ValueError, match="s1.safetensors, which is not there"):
        read_headers(sharded)


def test_an_index_that_does_not_fit_its_shard_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"c.weight": "s0.safetensors"}}))
    with pytest.raises(ValueError, match="c.weight is in s0.safetensors, which does not hold it"):
        read_headers(sharded)
    index.write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        read_headers(sharded)


def test_a_checkpoint_of_another_format_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        read_headers(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="only pytorch_model.bin: save it as safetensors first"):
        read_headers(tmp_path)


def test_names_match_with_and_without_the_models_prefix():
    stored = ["layers.0.w", "model.layers.1.w", "lm_head.weight", "layers.0.rotary_emb.inv_freq", "what.is.this"]
    wanted = ["model.layers.0.w", "layers.1.w", "lm_head.weight", "model.norm.weight"]
    found, missing, extra = match_names(stored, wanted, "model")
    assert found == {
        "model.layers.0.w": "layers.0.w",
        "layers.1.w": "model.layers.1.w",
        "lm_head.weight": "lm_head.weight",
    }
    assert missing == ["model.norm.weight"]
    assert extra == ["what.is.this"]
