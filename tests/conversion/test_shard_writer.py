"""What the writer writes row by row is what safetensors loads; a folder appears whole or not at all."""

import json

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from conversion.journal import Journal
from conversion.shard_writer import ShardWriter, StagedFolder, TensorSpec, leftover_bytes, parse_size


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


def test_sizes_are_read_as_people_write_them():
    assert [parse_size(size) for size in (7, "7", "5GB", "1.5 MB", "2KiB")] == [7, 7, 5 * 10**9, 1500000, 2048]
    for wrong in ("5 apples", "", "-1", "0"):
        with pytest.raises(ValueError, match="max_shard_size"):
            parse_size(wrong)


def test_a_folder_appears_only_when_it_is_published(tmp_path):
    target = tmp_path / "deep" / "model"
    with StagedFolder(target) as staged:
        (staged.path / "weights").write_text("w")
        assert not target.exists()
        assert not (staged.path / "config.json").exists()
        staged.publish("{}")
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "weights"]
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_run_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="no"), StagedFolder(tmp_path / "model"):
        raise RuntimeError("no")
    assert list(tmp_path.iterdir()) == []


def make_model(folder, text):
    with StagedFolder(folder, overwrite=True) as staged:
        staged.publish(text)


def test_an_old_model_goes_only_when_the_new_one_is_there(tmp_path):
    target = tmp_path / "model"
    make_model(target, "old")
    with pytest.raises(ValueError, match="not empty"):
        StagedFolder(target)
    with pytest.raises(RuntimeError, match="no"), StagedFolder(target, overwrite=True):
        raise RuntimeError("no")
    assert (target / "config.json").read_text() == "old"
    make_model(target, "new")
    assert (target / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_only_model_folders_are_overwritten(tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match="not a model folder"):
        StagedFolder(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        StagedFolder(tmp_path / "precious", overwrite=True)


def test_an_empty_folder_may_be_the_target(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    make_model(target, "new")
    assert (target / "config.json").read_text() == "new"


def test_leftovers_of_killed_runs_go_with_the_next_one(tmp_path):
    leftover = tmp_path / ".model.partial-0a0b"
    leftover.mkdir()
    (leftover / ".lock").touch()
    make_model(tmp_path / "model", "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def interrupt(target, fingerprint, parts=("part",)):
    with pytest.raises(KeyboardInterrupt), StagedFolder(target, fingerprint=fingerprint) as staged:
        for part in parts:
            staged.journal.save(part, staged.path / part, {})
        (staged.path / "unfinished").write_bytes(bytes(10_000))
        raise KeyboardInterrupt


def test_an_interrupted_run_is_taken_over_by_the_same_one_only(tmp_path):
    target = tmp_path / "model"
    interrupt(target, "one")
    (left,) = tmp_path.iterdir()
    assert {path.name for path in left.iterdir()} == {".lock", ".journal", "part"}
    with StagedFolder(target, fingerprint="one") as staged:
        assert staged.path == left and staged.journal.finished("part")
        with pytest.raises(ValueError, match="another run"), StagedFolder(target, fingerprint="one"):
            pass
        staged.publish("{}")
    assert {path.name for path in target.iterdir()} == {"config.json", "part"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("fingerprint", ["two", None])
def test_an_interrupted_run_of_something_else_goes(tmp_path, fingerprint):
    target = tmp_path / "model"
    interrupt(target, "one")
    with StagedFolder(target, fingerprint=fingerprint) as staged:
        assert not (staged.path / "part").exists()
        assert list(tmp_path.iterdir()) == [staged.path]
        staged.publish("{}")


def test_nothing_is_kept_where_nothing_was_finished(tmp_path):
    interrupt(tmp_path / "model", "one", parts=())
    assert not list(tmp_path.iterdir())


def test_what_a_stopped_run_left_counts_as_free(tmp_path):
    assert leftover_bytes(tmp_path / "new" / "model") == leftover_bytes(tmp_path / "model") == 0
    interrupt(tmp_path / "model", "one")
    (left,) = tmp_path.iterdir()
    (left / "written").write_bytes(bytes(50_000))
    with (left / "prepared").open("wb") as stream:
        stream.truncate(10**9)
    assert 50_000 <= leftover_bytes(tmp_path / "model") < 60_000
    assert leftover_bytes(tmp_path / "other") == 0


def test_a_model_moved_aside_by_a_killed_run_comes_back(tmp_path):
    aside = tmp_path / ".model.replaced-0a0b"
    make_model(aside, "old")
    with pytest.raises(ValueError, match="not empty"), StagedFolder(tmp_path / "model"):
        pass
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_two_runs_to_one_folder_do_not_mix(tmp_path):
    with StagedFolder(tmp_path / "model") as first:
        with pytest.raises(ValueError, match="another run"), StagedFolder(tmp_path / "model"):
            pass
        first.publish("{}")
    assert (tmp_path / "model" / "config.json").exists()
