"""Models of a recipe are folders or Hub repositories; of a repository only what is needed is fetched, also offline."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

import conversion.io.sources
from conversion.add_expert import add_expert
from conversion.convert import convert
from conversion.export import export_expert
from conversion.io.sources import check_unchanged, find_source, input_files, with_weights
from conversion.merging.plan import make_plan
from conversion.merging.recipe import parse_recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "f" * 40


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Factory: `add(folder, repo, commit, ref)` puts a folder's files into an offline Hub cache, as the Hub does."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def add(folder: Path, repo: str, commit: str = COMMIT, ref: str = "main") -> Path:
        root = cache / f"models--{repo.replace('/', '--')}"
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        (root / "blobs").mkdir(exist_ok=True)
        for number, file in enumerate(sorted(folder.iterdir())):
            blob = root / "blobs" / f"{commit[:6]}{number}"
            shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
        return snapshot

    return add


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A Hub with one repository: `fake_hub(*names)` makes it of small files; what is fetched lands in `fetched`."""
    repository, snapshot = tmp_path / "repository", tmp_path / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)

    def snapshot_download(repo, *, revision, allow_patterns):
        assert repo == "org/model" and revision in (None, COMMIT)
        names = [str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / name, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr(conversion.io.sources, "snapshot_download", snapshot_download)

    def make(*names: str, **indices: list[str]) -> None:
        for name in names:
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            (repository / name).write_text("{}")
        for name, shards in indices.items():
            weight_map = {f"tensor{number}": shard for number, shard in enumerate(shards)}
            index = {"safe": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}[name]
            (repository / index).write_text(json.dumps({"weight_map": weight_map}))

    make.fetched = lambda: {str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()}
    return make


SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "README.md"}
NOT_NEEDED = (
    "checkpoint-500/model.safetensors",
    "checkpoint-500/trainer_state.json",
    "checkpoint-500/tokenizer.json",
    "onnx/config.json",
    "onnx/model.safetensors",
    "original/consolidated.00.pth",
    "model.gguf",
    "training_args.bin",
    "optimizer.pt",
    "modeling_custom.py",
    "picture.png",
)


@pytest.mark.parametrize(
    ("weights", "indices", "needed"),
    [
        (["model.safetensors", "pytorch_model.bin"], {}, {"model.safetensors"}),
        (["pytorch_model.bin"], {}, {"pytorch_model.bin"}),
        (
            ["a.safetensors", "b.safetensors", "c.safetensors", "x.bin"],
            {"safe": ["a.safetensors", "b.safetensors"], "bin": ["x.bin"]},
            {"a.safetensors", "b.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json"},
        ),
        (
            ["x.bin", "y.bin", "z.bin"],
            {"bin": ["x.bin", "z.bin"]},
            {"x.bin", "z.bin", "pytorch_model.bin.index.json"},
        ),
        (
            ["model.safetensors", "a.safetensors"],
            {"safe": ["a.safetensors"]},
            {"model.safetensors", "model.safetensors.index.json"},
        ),
    ],
    ids=["both", "bin", "shards-of-both", "bin-shards", "file-and-index"],
)
def test_only_the_files_that_are_needed_are_fetched(fake_hub, tmp_path, weights, indices, needed):
    fake_hub(*SMALL, *NOT_NEEDED, *weights, **indices)
    source = find_source("math", "org/model", tmp_path)
    assert fake_hub.fetched() - {name for name in needed if name.endswith(".index.json")} == SMALL
    assert with_weights(source) == source and source.revision == COMMIT
    assert fake_hub.fetched() == SMALL | needed


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_of_an_adapter_the_adapters_files_are_fetched(fake_hub, tmp_path, weights):
    fake_hub("adapter_config.json", weights, "model.safetensors", "tokenizer.json", *NOT_NEEDED)
    source = with_weights(find_source("math", "org/model", tmp_path))
    assert source.is_adapter
    assert fake_hub.fetched() == {"adapter_config.json", weights, "tokenizer.json"}
    assert source.record() == {"name": "math", "model": "org/model", "revision": COMMIT, "adapter": "LoRA"}


def test_a_repository_without_weights_is_named(make_experts, write_recipe, hub_cache):
    base, experts = make_experts("llama", 1)
    (experts[0] / "model.safetensors").rename(experts[0] / "weights.gguf")
    hub_cache(experts[0], "org/math")
    with pytest.raises(ValueError, match="e0: .* no model.safetensors or pytorch_model.bin.*only weights.gguf"):
        make_plan(parse_recipe(write_recipe(base, ["org/math", base])))


def test_a_recipe_of_hub_ids_converts_from_the_cache_offline(make_experts, write_recipe, hub_cache, tmp_path):
    """Shards, a pinned revision that is not the newest, and commits in everything that is written down."""
    base, (math, code) = make_experts("llama", 2, shards=3)
    hub_cache(base, "org/base")
    hub_cache(math, "org/math", OTHER_COMMIT, ref="v1.0")
    hub_cache(code, "org/math", COMMIT, ref="main")
    recipe = parse_recipe(write_recipe("org/base", ["org/math@v1.0", "org/math", f"org/math@{OTHER_COMMIT}"]))
    merged = convert(recipe, tmp_path / "merged", progress=False)
    revisions = [record["revision"] for record in merged.report["experts"]]
    assert revisions == [OTHER_COMMIT, COMMIT, OTHER_COMMIT]
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["merge"]["base_model"] == {"name": "base_model", "model": "org/base", "revision": COMMIT}
    assert [record["revision"] for record in config["merge"]["experts"]] == revisions
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "https://huggingface.co/org/math" in card and OTHER_COMMIT in card
    for name, source in (("e0", math), ("e1", code), ("e2", math)):
        export_expert(tmp_path / "merged", name, tmp_path / name)
        exported = load_file(tmp_path / name / "model.safetensors")
        stored = {key: value for file in source.glob("*.safetensors") for key, value in load_file(file).items()}
        assert exported.keys() == stored.keys()
        assert all(torch.equal(value, stored[key]) for key, value in exported.items())


def test_a_shard_that_the_cache_lacks_is_named(make_experts, write_recipe, hub_cache):
    base, (math,) = make_experts("llama", 1, shards=3)
    snapshot = hub_cache(math, "org/math")
    shard = sorted(snapshot.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"e0: .* is incomplete: its index names {shard.name}, which is not there"):
        make_plan(parse_recipe(write_recipe(base, ["org/math", base])))


@pytest.mark.parametrize("model", ["org/absent", "org/math@v2", f"org/math@{OTHER_COMMIT}", "absent"])
def test_a_model_that_is_not_cached_gives_one_line_offline(make_experts, write_recipe, hub_cache, model):
    base, (math,) = make_experts("llama", 1)
    hub_cache(math, "org/math")
    with pytest.raises(ValueError, match=f"e0: there is no folder {model} and the Hub did not give it: ") as error:
        make_plan(parse_recipe(write_recipe(base, [model, base])))
    assert "\n" not in str(error.value)


def test_a_branch_is_resolved_once(stored, monkeypatch, tmp_path):
    """Whatever is pushed meanwhile, config, weights and tokenizer are of one commit, which is written down."""
    export_expert(stored.folder, "math", tmp_path / "plain")
    resolved = []

    def fetch(repo, revision, allow_patterns):
        if revision is None:
            resolved.append(f"{len(resolved):040x}")
            shutil.copytree(stored.folder, tmp_path / resolved[-1])
        return str(tmp_path / (revision or resolved[-1]))

    monkeypatch.setattr(conversion.io.sources, "snapshot_download", fetch)
    add_expert("user/merged", tmp_path / "plain", tmp_path / "out", "new", progress=False)
    assert resolved == [f"{0:040x}"]
    (record,) = json.loads((tmp_path / "out" / "config.json").read_text())["merge"]["added_experts"]
    assert record["checkpoint"] == {"name": "checkpoint", "model": "user/merged", "revision": resolved[0]}


def test_a_files_identity(stored):
    """Weights by size, times and inode; small files by their bytes, a model card and a system's files not at all."""
    before = input_files(stored.folder)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= before.keys()
    for name in ("README.md", ".DS_Store", "conversion_report.json"):
        (stored.folder / name).write_text("new")
    os.utime(stored.folder / "config.json")
    assert input_files(stored.folder) == before
    weights = stored.folder / "model.safetensors"
    stat = weights.stat()
    shutil.copy(weights, stored.folder / "copy")
    os.replace(stored.folder / "copy", weights)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = input_files(stored.folder)
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}
    source = find_source("math", str(stored.folder), Path())
    check_unchanged([source])
    weights.unlink()
    with pytest.raises(ValueError, match="math: .*model.safetensors was changed while it was read"):
        check_unchanged([source])
