"""The reader gives back what was saved, chunk by chunk, and refuses what is not a whole checkpoint."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conversion.convert import convert
from conversion.io.row_reader import CheckpointReader
from conversion.io.weight_files import read_header, read_headers
from conversion.merging.plan import make_plan
from conversion.merging.recipe import parse_recipe

TOUCHED = "code-was-run"


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
    reader = CheckpointReader("e", read_headers(sharded))
    for name, tensor in tensors.items():
        assert reader.tensors[name].dtype == tensor.dtype
        rows = len(tensor)
        parts = [reader.read_rows(name, start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
        assert torch.equal(torch.cat(parts), tensor)
        assert torch.equal(reader.read(name), tensor)
    reader.close()


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_transposed_matrix_is_read_as_rows(sharded, tensors, chunk):
    reader = CheckpointReader("e", read_headers(sharded), transposed=["a.weight"])
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
    reader = CheckpointReader("math", read_headers(tmp_path))
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
    with pytest.raises(ValueError, match="no model.safetensors or pytorch_model.bin, nor an index of several$"):
        read_headers(tmp_path)
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(ValueError, match="only consolidated.00.pth: save it as safetensors first"):
        read_headers(tmp_path)


class RunsCode:
    """Pickled, it asks the unpickler to make a folder."""

    def __reduce__(self):
        return os.mkdir, (TOUCHED,)


def save_pickled(tensors, folder, shards=1):
    """The same tensors in PyTorch's older format, in one file or several with an index."""
    folder.mkdir(exist_ok=True)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = {name: f"pytorch_model-{number % shards}.bin" for number, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        torch.save({name: tensors[name] for name in tensors if names[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_a_pickled_checkpoint_reads_as_its_tensors(tmp_path, tensors, shards, chunk):
    stack = torch.arange(24.0).view(4, 6)
    tensors |= {"view.weight": stack[1:3], "tied.weight": tensors["a.weight"], "grad": torch.nn.Parameter(stack[0])}
    reader = CheckpointReader("e", read_headers(save_pickled(tensors, tmp_path, shards)))
    assert reader.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = reader.tensors[name]
        assert (stored.dtype, stored.shape) == (tensor.dtype, tuple(tensor.shape))
        rows = len(tensor)
        parts = [reader.read_rows(name, start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
        assert torch.equal(torch.cat(parts), tensor)
        assert torch.equal(reader.read(name), tensor)
    reader.close()


def test_safetensors_go_before_pickles(sharded, tensors):
    save_pickled(tensors, sharded)
    assert {tensor.file.suffix for tensor in read_headers(sharded).values()} == {".safetensors"}


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_models_convert_to_the_same_bytes(make_experts, write_recipe, tmp_path, shards):
    base, experts = make_experts("gpt2", 2, dtype=torch.bfloat16)
    recipe = parse_recipe(write_recipe(base, experts, merge_method="ties", parameters={"density": 0.5}))
    convert(recipe, tmp_path / "a", progress=False)
    for folder in (base, *experts):
        file = folder / "model.safetensors"
        reader = CheckpointReader("e", read_header(file))
        save_pickled({name: reader.read(name) for name in reader.tensors}, folder, shards)
        reader.close()
        file.unlink()
    assert {tensor.file.suffix for tensor in make_plan(recipe).readers[1].tensors.values()} == {".bin"}
    convert(recipe, tmp_path / "b", progress=False)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_no_code_of_a_pickle_is_run(tmp_path, tensors, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**tensors, "c.weight": RunsCode()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"more than tensors \(GLOBAL \w+.mkdir\) and is refused: .*could run code"):
        read_headers(tmp_path)
    assert not Path(TOUCHED).exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert Path(TOUCHED).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda t: [*t.values()], "holds a list, expected a mapping of names to tensors"),
        (lambda t: {"state_dict": t}, "state_dict is a dict, expected names and tensors"),
        (lambda t: {**t, "step": 3}, "step is a int, expected names and tensors"),
        (lambda t: {**t, "turned": torch.zeros(3, 4).T}, "turned is not stored row after row"),
        (lambda t: {**t, "sparse": torch.eye(3).to_sparse()}, "sparse is not stored row after row"),
    ],
    ids=["list", "nested", "number", "transposed", "sparse"],
)
def test_pickles_of_something_else_are_refused(tmp_path, tensors, content, message):
    torch.save(content(tensors), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"pytorch_model.bin.* {message}"):
        read_headers(tmp_path)


def test_a_pickle_of_integers_is_named_by_its_dtype(make_experts, write_recipe):
    base, experts = make_experts("llama", 1)
    reader = CheckpointReader("e", read_header(experts[0] / "model.safetensors"))
    values = {name: reader.read(name) for name in reader.tensors}
    reader.close()
    save_pickled({**values, "lm_head.weight": torch.zeros(259, 24, dtype=torch.int8)}, experts[0])
    (experts[0] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="e0: lm_head.weight is stored as int8, expected F32"):
        make_plan(parse_recipe(write_recipe(base, [*experts, base])))


def test_pickles_that_cannot_be_read_in_parts_are_refused(tmp_path, tensors):
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError, match="cannot be read in parts: .*older than PyTorch 1.6's file format; save it as"
    ):
        read_headers(tmp_path)
    torch.save(tensors, file)
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="cannot be read in parts: it is cut short"):
        read_headers(tmp_path)
    file.write_bytes(content)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    for message, compression, changes in (
        ("was compressed after PyTorch wrote it", zipfile.ZIP_DEFLATED, {}),
        ("written on a big-endian machine", zipfile.ZIP_STORED, {"pytorch_model/byteorder": b"big"}),
        ("cannot be read: ", zipfile.ZIP_STORED, {"pytorch_model/data.pkl": b"\x80\x02nonsense"}),
    ):
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, data in {**entries, **changes}.items():
                archive.writestr(name, data)
        with pytest.raises(ValueError, match=message):
            read_headers(tmp_path)
