"""What can be tested of the GPU benchmark without a GPU: what it runs, what it counts, and how it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from modeling_channel_merged.active_experts import ActiveExperts

FOLDER = Path(__file__).parents[2] / "hub_examples"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import benchmark_gpu

    return benchmark_gpu


@pytest.fixture
def config():
    return LlamaConfig(vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4)


@pytest.fixture
def models(benchmark, config):
    dense = benchmark.dense_model(config, torch.bfloat16, "cpu")
    return dense, benchmark.merged_model(config, 4, 2, torch.bfloat16, "cpu")


def test_touched_bytes(benchmark, config, models):
    """One expert touches what the dense model reads, all experts touch all rows, two something between."""
    dense, merged = (benchmark.linear_layers(model) for model in models)
    assert len(dense) == len(merged) == 2 * 7 + 1
    block = 4 * 24 * 24 + 3 * 24 * 36
    assert benchmark.touched_bytes(dense, []) == 2 * (2 * block + 40 * 24)
    for expert in range(4):
        assert benchmark.touched_bytes(merged, [expert]) == benchmark.touched_bytes(dense, [expert])
    everything = sum(layer.weight.nbytes for layer in merged)
    assert benchmark.touched_bytes(merged, range(4)) == everything
    assert benchmark.touched_bytes(dense, []) < benchmark.touched_bytes(merged, [0, 2]) < everything


def test_steps_call_every_layer_once(benchmark, models):
    active, calls = benchmark.mixed(3, 4, "cpu"), []
    assert isinstance(active, ActiveExperts) and active.expert_index.tolist() == [0, 1, 2]
    layers = [benchmark.linear_layers(model) for model in models]
    for layer in [*layers[0], *layers[1]]:
        layer.register_forward_hook(lambda layer, args, output: calls.append((layer, output.shape)))
    benchmark.linear_step(layers[0], 3, None)()
    benchmark.linear_step(layers[1], 3, active)()
    assert [layer for layer, _ in calls] == [*layers[0], *layers[1]]
    assert all(shape == (3, 1, layer.out_features) for layer, shape in calls)


def test_whole_model(benchmark, config, models, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PROMPT", 5)
    monkeypatch.setattr(benchmark, "LONG_PROMPT", 7)
    monkeypatch.setattr(benchmark, "NEW_TOKENS", 2)
    results = {str(batch): benchmark.model_speeds(*models, config, batch, 1, "cpu") for batch in (1, 4)}
    assert [list(result) for result in results.values()] == [["dense", "one expert"], ["dense", "one expert", "mixed"]]
    assert results["1"]["dense"]["prompt"] == 7 and results["4"]["mixed"]["decode"] > 0
    linear = {
        "dense": {"seconds": 0.002, "share of ceiling": 0.9},
        "mixed": {"seconds": 0.004, "share of ceiling": 0.8},
    }
    benchmark.print_tables({"linear": {"4": linear}, "model": results})
    assert "0.500" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_needs_a_gpu():
    """One clear line, no traceback."""
    done = subprocess.run([sys.executable, str(FOLDER / "benchmark_gpu.py")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines() == ["benchmark_gpu needs a CUDA GPU, found none"]
