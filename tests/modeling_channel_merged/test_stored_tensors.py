"""Damaged checkpoints are refused by `from_pretrained`, in words that name the file or the tensor."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from modeling_channel_merged import ChannelMergedForCausalLM

INDEX = "model.model.layers.0.self_attn.q_proj.channel_index"
FILE, SHARDS = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(llama_model, tmp_path):
    llama_model.save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def edit_header(file: Path, edit, size: int | None = None, more: bytes = b"") -> None:
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data[end:] + more)


def use_shards(folder: Path, name: str, place: Path) -> None:
    """Put the weights at `place`, where an index says that they are in `name`."""
    (folder / FILE).rename(place)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(place), name)}
    (folder / SHARDS).write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float32], ids=str)
def test_an_index_of_another_dtype(folder, llama_model, dtype):
    """Transformers would convert it, an int64 beyond 32 bits to another row."""
    edit_tensors(folder, lambda tensors: tensors.update({INDEX: tensors[INDEX].to(dtype)}))
    with pytest.raises(ValueError, match=rf"{FILE}: {re.escape(INDEX)} is {dtype}, expected torch.int32"):
        AutoModelForCausalLM.from_pretrained(folder)
    tensors = load_file(folder / FILE)
    with pytest.raises(ValueError, match=f"is {dtype}, expected torch.int32"):
        ChannelMergedForCausalLM.from_pretrained(None, config=llama_model.config, state_dict=tensors)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj"])
def test_a_linear_map_lacks_no_channel(folder, name):
    path = f"model.layers.0.{name}"

    def remove(tensors):
        tensors[f"model.{path}.channel_index"][1, 2] = -1

    edit_tensors(folder, remove)
    message = rf"{re.escape(path)}.channel_index holds row -1 for expert 1, channel 2; .* \(expected 0 to \d+\)"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_head_lacks_only_tokens_that_the_vocabulary_lacks(folder):
    """-1 stands for a token that an expert does not have; the config says which it has."""

    def remove(tensors):
        tensors["model.lm_head.channel_index"][1, 97:] = -1

    edit_tensors(folder, remove)
    AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for size in (97, 98):
        config["expert_vocabularies"] = {"math": {"size": size, "runs": [[0, size]]}}
        (folder / "config.json").write_text(json.dumps(config))
        if size == 97:
            AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="lm_head.channel_index holds row -1 for expert 1, channel 97;"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize(
    "name",
    ["layers.0.mlp.more_proj.rows.weight", "layers.9.mlp.up_proj.channel_index", "norm.experts.3.weight"],
)
def test_tensors_of_unknown_modules(folder, auto_class, name):
    auto_class.from_pretrained(folder)
    stray = torch.zeros(3, 3, dtype=torch.int32 if name.endswith("index") else torch.float32)
    edit_tensors(folder, lambda tensors: tensors.update({f"model.model.{name}": stray}))
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is of no module of the model"):
        auto_class.from_pretrained(folder)


@pytest.mark.parametrize(
    "damage",
    [
        {"edit": lambda header: header[INDEX].update(data_offsets=[0, header[INDEX]["data_offsets"][1]])},
        {"edit": lambda header: header[INDEX].update(data_offsets=[x + 4 for x in header[INDEX]["data_offsets"]])},
        {"edit": lambda header: header[INDEX].update(data_offsets=[10**12, 10**12 + 4])},
        {"edit": lambda header: header.pop(INDEX)},
        {"edit": lambda header: None, "more": b"\0" * 8},
        {"edit": lambda header: None, "size": 200 * 10**9},
        {"edit": lambda header: None, "size": 9},
    ],
    ids=["overlap", "shift", "beyond-the-end", "hole", "more-data", "header-of-200-GB", "short-header"],
)
def test_offsets_that_do_not_cover_the_file(folder, damage):
    edit_header(folder / FILE, **damage)
    with pytest.raises(ValueError, match=rf"{FILE} is damaged: "):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_shards_lie_beside_their_index(folder, kind):
    use_shards(folder, "shard.safetensors", folder / "shard.safetensors")
    AutoModelForCausalLM.from_pretrained(folder)
    place = folder.parent / "other.safetensors"
    (folder / "shard.safetensors").rename(folder / FILE)
    use_shards(folder, "../other.safetensors" if kind == "relative" else str(place), place)
    with pytest.raises(ValueError, match=r"weight_map has '.*other.safetensors' for model\..*, expected the name of"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_tensor_in_a_shard_that_the_index_does_not_say(folder):
    """Of two shards with the same tensor, the last one would win."""
    use_shards(folder, "a.safetensors", folder / "a.safetensors")
    save_file({INDEX: load_file(folder / "a.safetensors")[INDEX]}, folder / "b.safetensors")
    index = json.loads((folder / SHARDS).read_text())
    index["weight_map"]["more"] = "b.safetensors"
    (folder / SHARDS).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"b.safetensors holds {re.escape(INDEX)}, expected in 'a.safetensors'"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_index_of_shards_that_names_none(folder):
    use_shards(folder, "part.safetensors", folder / "part.safetensors")
    (folder / SHARDS).write_text(json.dumps({"metadata": {}, "weight_map": {}}))
    with pytest.raises(ValueError, match="weight_map is {}, expected tensor names and file names"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["model.model.layers.1.mlp.up_proj.rows.weight", "model.model.norm.experts.1.weight"], ids=["rows", "norm"]
)
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_tensors_that_are_not_there(folder, name, auto):
    """Transformers would make them up."""
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"holds no tensor of {re.escape(name.rpartition('.')[0])}: the checkpoint"):
        auto.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int32], ids=str)
def test_rows_that_are_no_floats(folder, dtype):
    name = "model.model.layers.1.mlp.up_proj.rows.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ValueError, match=f"{re.escape(name)} is {dtype}, expected floats"):
        AutoModelForCausalLM.from_pretrained(folder)
