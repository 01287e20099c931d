"""What the writer writes row by row is what safetensors loads."""

import contextlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from conversion.io.journal import Journal
from conversion.io.shard_writer import ShardWriter, TensorSpec


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(5, 3, generator=generator).half(),
        "index": torch.randint(0, 9, (2, 3), generator=generator, dtype=torch.int32),
        "bfloat": torch.randn(7, generator=generator).bfloat16(),
        "float": torch.randn(3, 3, generator=generator),
    }


def specs(values):
    return [TensorSpec(name, tuple(value.shape), value.dtype) for name, value in values.items()]


def load(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("max_shard_size", [1, 40, 60, "5GB"])
def test_blocks_in_any_order_make_the_tensors(tmp_path, max_shard_size):
    values = tensors()
    writer = ShardWriter(tmp_path, specs(values), max_shard_size)
    for name, value in reversed(values.items()):
        for start in reversed(range(0, len(value), 2)):
            writer.write(name, value[start : start + 2], start)
    writer.finish()
    loaded = load(tmp_path)
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(loaded[name], value)


def test_shards_respect_their_size_and_the_index_names_them(tmp_path):
    values = tensors()
    writer = ShardWriter(tmp_path, specs(values), 60)
    for name, value in values.items():
        writer.write(name, value)
    writer.finish({"total_parameters": 37})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 104, "total_parameters": 37}
    assert index["weight_map"].keys() == values.keys()
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as shard:
            assert name in shard.keys()
            assert sum(shard.get_tensor(key).nbytes for key in shard.keys()) <= 60
            assert shard.metadata() == {"format": "pt"}


def test_nothing_loads_before_it_is_finished(tmp_path):
    values = tensors()
    writer = ShardWriter(tmp_path, specs(values))
    for name, value in values.items():
        writer.write(name, value)
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "model.safetensors")
    writer.finish()
    assert load(tmp_path).keys() == values.keys()


def test_a_tensor_that_is_not_written_in_full_is_an_error(tmp_path):
    writer = ShardWriter(tmp_path, [TensorSpec("w", (4, 2), torch.float32)])
    writer.write("w", torch.zeros(3, 2))
    with pytest.raises(ValueError, match="w has 8 elements, but 6 were written"):
        writer.finish()
    writer.close()


@pytest.mark.parametrize(
    ("block", "start"),
    [(torch.zeros(2, 3), 0), (torch.zeros(2, 2).half(), 0), (torch.zeros(2, 2), 3)],
    ids=["shape", "dtype", "place"],
)
def test_a_block_that_does_not_fit_is_an_error(tmp_path, block, start):
    writer = ShardWriter(tmp_path, [TensorSpec("w", (4, 2), torch.float32)])
    with pytest.raises(ValueError, match="^w h"):
        writer.write("w", block, start)
    writer.close()


def test_more_than_all_of_a_tensor_is_an_error(tmp_path):
    writer = ShardWriter(tmp_path, [TensorSpec("w", (4, 2), torch.float32), TensorSpec("v", (4,), torch.float32)])
    writer.write("w", torch.zeros(4, 2))
    with pytest.raises(ValueError, match="w has 8 elements, all of them are written already"):
        writer.write("w", torch.zeros(1, 2))
    writer.close()


def test_finished_shards_are_taken_over_and_others_are_written_again(tmp_path):
    values = tensors()
    for stop in (2, 4):
        writer = ShardWriter(tmp_path, specs(values), 1, Journal(tmp_path, "f"))
        wanted = [name for name in values if not writer.is_written(name)]
        assert wanted == list(values)[stop - 2 :]
        for name in wanted[:2]:
            writer.write(name, values[name])
        assert [writer.shard(name) for name in values] == [0, 1, 2, 3]
        if stop == 2:
            writer.write("bfloat", values["bfloat"][:3])
            writer.close()
    writer.finish()
    loaded = load(tmp_path)
    assert all(torch.equal(loaded[name], value) for name, value in values.items())


def open_files(folder):
    """How many files of a folder this process has open."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread has just closed it
            count += os.readlink(f"/proc/self/fd/{number}").startswith(str(folder))
    return count


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_few_shards_are_open_at_once(tmp_path):
    """A hundred shards, written in turns by several threads."""
    values = {f"t{number}": torch.full((8, 5), float(number)) for number in range(100)}
    writer = ShardWriter(tmp_path, specs(values), 160)
    most = []

    def write(row):
        for name, value in values.items():
            writer.write(name, value[row : row + 1], row)
            most.append(open_files(tmp_path))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(8)))
    writer.finish()
    assert max(most) <= 20 and open_files(tmp_path) == 0
    loaded = load(tmp_path)
    assert all(torch.equal(loaded[name], value) for name, value in values.items())
