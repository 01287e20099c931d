"""What is promised before data is read: the plan of a 7B conversion from headers alone, and the memory it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from conversion.convert import convert
from conversion.io.row_reader import CheckpointReader
from conversion.merging import dry_run
from conversion.merging.dry_run import plan_conversion, plan_tables
from conversion.merging.memory_budget import CHUNK_BYTES, held_bytes, memory_limit, plan_memory
from conversion.merging.plan import make_plan
from conversion.merging.recipe import parse_recipe

ROOT = Path(__file__).parents[3]
SHARD_BYTES = 5 * 10**9


def write_headers(folder: Path, config: LlamaConfig) -> Path:
    """A sharded bf16 checkpoint of which only the headers are there: the data of the sparse files is a hole."""
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    shards, size = [{}], 0
    for name, shape in shapes.items():
        num_bytes = 2 * torch.Size(shape).numel()
        if size + num_bytes > SHARD_BYTES:
            shards, size = [*shards, {}], 0
        shards[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, size + num_bytes]}
        size += num_bytes
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        header = json.dumps(shard).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + max(entry["data_offsets"][1] for entry in shard.values()))
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def no_data(monkeypatch):
    """Reading a tensor is an error."""

    def refuse(*args):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(CheckpointReader, "_read_into", refuse)


@pytest.mark.skipif(sys.platform == "win32", reason="files are not sparse by themselves")
@pytest.mark.parametrize("num_experts", [4, 8])
@pytest.mark.parametrize("vocabulary", [32_000, 128_256])
def test_seven_billion_parameters(tmp_path, no_data, write_recipe, vocabulary, num_experts):
    """The plan of a 7B Llama costs no data; its memory stays inside 2 GB with the full number of threads."""
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    model = write_headers(tmp_path / "model", config)
    recipe = parse_recipe(write_recipe(model, [model] * num_experts, preset="paper-ties"))
    plan = plan_conversion(recipe, tmp_path / "out")
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 2 * vocabulary * 4096
    channels = 32 * (5 * 4096 + 2 * 11008) + vocabulary  # and as many again of the embedding
    assert [checkpoint["bytes"] for checkpoint in plan["checkpoints"]] == [2 * parameters] * (num_experts + 1)
    assert plan["modules"] == {
        "embedding": {
            "modules": 1,
            "channels": vocabulary,
            "rows_at_most": 2 * vocabulary,
            "rows_as_separate_models": num_experts * vocabulary,
        },
        "linear": {
            "modules": 32 * 7 + 1,
            "channels": channels,
            "rows_at_most": 2 * channels,
            "rows_as_separate_models": num_experts * channels,
        },
    }
    assert plan["per_expert"] == {"tensors": 65, "parameters": 65 * 4096}
    output = plan["output"]
    assert output["tensors"] == 2 * 226 + 65 * num_experts + 2
    assert output["bytes_at_most"] >= 2 * (2 * (parameters - 65 * 4096))
    assert output["bytes_at_most"] < 2 * 2 * parameters * 1.01
    memory = plan["memory"]
    assert memory["threads"] == torch.get_num_threads() and memory["chunk_bytes"] == CHUNK_BYTES
    assert memory["expected_peak"] <= 2e9
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(sys.platform == "win32", reason="files are not sparse by themselves")
def test_a_budget_of_a_7b_model_fits_too(tmp_path, no_data, write_recipe):
    """Its rows and bytes at most are what the budget pays for; sharing it stays inside 2 GB."""
    config = LlamaConfig(vocab_size=32_000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    model = write_headers(tmp_path / "model", config)
    plan = plan_conversion(parse_recipe(write_recipe(model, [model] * 4, grouping={"budget": 0.4})), tmp_path / "out")
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 2 * 32_000 * 4096
    channels = 32 * (5 * 4096 + 2 * 11008) + 2 * 32_000
    output = plan["output"]
    assert output["bytes_at_most"] == 2 * int(4 * parameters * 2 // 5) + 4 * 4 * channels
    assert channels < output["rows_at_most"] < 1.8 * channels
    assert all(kind["rows_at_most"] <= output["rows_at_most"] for kind in plan["modules"].values())
    assert plan["modules"]["embedding"]["rows_at_most"] == 4 * 32_000
    assert plan["memory"]["threads"] == torch.get_num_threads() and plan["memory"]["expected_peak"] <= 2e9


@pytest.mark.skipif(sys.platform == "win32", reason="files are not sparse by themselves")
def test_a_calibrated_7b_model_fits_into_24_gb(tmp_path, no_data, write_recipe):
    """Four experts, two threads: covariances of the widest matrix, and what a factorisation takes."""
    config = LlamaConfig(vocab_size=32_000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    model = write_headers(tmp_path / "model", config)
    keys = {"preset": "recommended", "calibration": {"file": "measured.safetensors"}}
    plan = make_plan(parse_recipe(write_recipe(model, [model] * 4, **keys)))
    memory = plan_memory(plan, 24 * 10**9, threads=2)
    least = 4 * 4 * 11008**2 + 3 * 8 * 11008**2
    assert memory.threads == 2 and 2 * least < memory.expected_peak < 15e9
    assert plan_memory(plan, memory_limit(plan.recipe, None), threads=2).expected_peak <= 7e9  # the default
    with pytest.raises(ValueError, match=r"expected at least [5-7]\.\d\d GB for 4 experts"):
        plan_memory(plan, 2 * 10**9, threads=2)


@pytest.mark.parametrize("num_experts", [8, 62])
def test_the_bound_holds_for_many_experts_too(tmp_path, no_data, write_recipe, num_experts):
    """With more experts there are fewer threads and smaller chunks; not more memory."""
    config = LlamaConfig(vocab_size=128_256, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1)
    model = write_headers(tmp_path / "model", config)
    plan = make_plan(parse_recipe(write_recipe(model, [model] * num_experts, preset="paper-ties")))
    memory = plan_memory(plan, 2 * 10**9, threads=8)
    assert memory.expected_peak <= 2e9
    assert memory.threads >= (6 if num_experts == 8 else 1)


@pytest.fixture
def tiny_plan(make_experts, write_recipe):
    base, experts = make_experts("qwen2", 4)
    return make_plan(parse_recipe(write_recipe(base, experts, preset="paper-ties")))


def test_a_smaller_budget_takes_smaller_chunks_then_fewer_threads(tiny_plan):
    choices = [plan_memory(tiny_plan, budget * 10**6, threads=4) for budget in (2000, 700, 500, 350)]
    assert [choice.threads for choice in choices] == [4, 4, 2, 1]
    assert choices[0].chunk_bytes == CHUNK_BYTES > choices[1].chunk_bytes
    assert all(choice.expected_peak <= choice.max_memory for choice in choices)


def test_a_budget_that_is_too_small_says_what_is_needed(tiny_plan):
    with pytest.raises(ValueError, match=r"max_memory is 0.05 GB, expected at least 0\.\d\d GB for 4 experts"):
        plan_memory(tiny_plan, 50 * 10**6, threads=2)


def test_more_experts_and_methods_that_trim_need_more(make_experts, write_recipe):
    sizes = []
    for num_experts, preset in ((3, "paper-dare"), (3, "paper-ties"), (4, "paper-ties")):
        base, experts = make_experts("llama", num_experts)
        plan = make_plan(parse_recipe(write_recipe(base, experts, preset=preset)))
        sizes.append(held_bytes(plan, "model.embed_tokens"))
    assert sizes == sorted(sizes)


def test_the_budget_changes_no_byte(make_experts, write_recipe, tmp_path):
    base, experts = make_experts("llama", 3)
    recipe = parse_recipe(write_recipe(base, experts, preset="paper-ties"))
    for budget in ("320MB", "2GB"):
        convert(recipe, tmp_path / budget, max_memory=budget, progress=False)
    small, large = (load_file(tmp_path / budget / "model.safetensors") for budget in ("320MB", "2GB"))
    assert small.keys() == large.keys() and all(torch.equal(small[name], large[name]) for name in small)
    with pytest.raises(ValueError, match="max_memory is '2 apples'"):
        convert(recipe, tmp_path / "out", max_memory="2 apples", progress=False)


PEAK = """
import sys
from pathlib import Path
import torch
from conversion.convert import convert
from conversion.merging.memory_budget import plan_memory
from conversion.merging.plan import make_plan
from conversion.merging.recipe import load_recipe

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

torch.set_num_threads(2)
before = resident("VmRSS")
convert(sys.argv[1], sys.argv[2], max_memory=sys.argv[3], progress=False)
print(resident("VmHWM") - before)
print(plan_memory(make_plan(load_recipe(sys.argv[1])), int(sys.argv[3]), 2).expected_peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_measured_peak_is_inside_the_bound(make_experts, write_recipe, tmp_path):
    """On tensors that are larger than a chunk, in the dtype that takes the most."""
    base, experts = make_experts("llama", 4, hidden_size=512, vocab_size=20_000, num_hidden_layers=1, shared=0.0)
    write_recipe(base, experts, path=tmp_path / "recipe.json", preset="paper-ties")
    budget = 520 * 10**6
    command = [sys.executable, "-c", PEAK, tmp_path / "recipe.json", tmp_path / "out", str(budget)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peak, expected = map(int, done.stdout.split())
    assert peak <= expected <= budget


def test_a_full_disk_is_told(tiny_plan, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "free_bytes", lambda out: 10)
    plan = plan_conversion(tiny_plan.recipe, tmp_path / "out")
    console = Console(width=200, record=True, file=open(os.devnull, "w", encoding="utf-8"))
    with console.file:
        console.print(*plan_tables(plan), sep="\n")
    text = console.export_text()
    assert "NOT ENOUGH" in text
    assert "tied head" in text and "copied exactly" in text and "threads with chunks of" in text
