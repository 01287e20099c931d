"""A 7B channel-merged model on a CUDA GPU, against the dense model of the same base.

    python hub_examples/benchmark_gpu.py

Random weights in bfloat16, Llama-2-7B's shape, N = 4 experts, K = 2 random groups per channel. Contenders take turns
within every repetition and decoded token; medians are reported. Tables, then one line of JSON with hardware and
versions. Needs 48 GB of free GPU memory and as many minutes as it takes to fill it with random weights.

- linear layers: all matrix products of one decode step, replayed as a CUDA graph, so that no Python is timed. Beside
  the times stands the ceiling: the bytes of the rows that the batch touches over the measured memory bandwidth.
  "plain" is the same model without the kernel.
- whole model: decoding token by token and the prefill of a long prompt, called eagerly as `generate` does.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import transformers
from benchmark_inference import bandwidth, base_config, dense_model, measure, merged_model, with_experts
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig

from modeling_channel_merged import ChannelMergedForCausalLM, channel_kernels
from modeling_channel_merged.active_experts import ActiveExperts, activate
from modeling_channel_merged.channel_kernels import row_owners
from modeling_channel_merged.channel_merged_layers import ChannelMergedLinear

NUM_EXPERTS, NUM_GROUPS = 4, 2
BATCHES = (1, 8, 32)
PROMPT, NEW_TOKENS, LONG_PROMPT = 128, 64, 2048
NEEDED_BYTES = 48e9

Step = Callable[[], None]


@contextmanager
def without_kernel() -> Iterator[None]:
    """Every product within is a plain one."""
    with mock.patch.object(channel_kernels, "KERNEL_DTYPES", ()):
        yield


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """All matrices of a model, except those that are the rows of a merged one and the router's."""
    merged = [module for module in model.modules() if isinstance(module, ChannelMergedLinear)]
    return merged or [module for module in model.modules() if isinstance(module, nn.Linear)]


def linear_step(layers: list[nn.Module], batch: int, active: ActiveExperts | None) -> Step:
    """All matrix products of one decode step, each on random inputs (B, 1, I)."""
    parameter = next(layers[0].parameters())
    widths = {layer.in_features for layer in layers}
    inputs = {width: torch.randn(batch, 1, width, device=parameter.device).to(parameter.dtype) for width in widths}

    @torch.no_grad()
    def step():
        with activate(active):
            for layer in layers:
                layer(inputs[layer.in_features])

    return step


def touched_bytes(layers: list[nn.Module], experts: Iterable[int]) -> int:
    """Weight bytes that a step of these experts must read."""
    if not isinstance(layers[0], ChannelMergedLinear):
        return sum(layer.weight.nbytes for layer in layers)
    mask, total = sum(1 << expert for expert in experts), 0
    for layer in layers:
        owners = row_owners(layer.channel_index, layer.num_rows).owners
        total += int(((owners & mask) != 0).sum()) * layer.in_features * layer.weight.element_size()
    return total


def captured(step: Step) -> torch.cuda.CUDAGraph:
    """The step as a CUDA graph, after a warm-up that compiles its kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def mixed(batch: int, num_experts: int, device: str) -> ActiveExperts:
    """The rows of a batch spread over the experts."""
    return ActiveExperts.from_index(torch.arange(batch, device=device) % num_experts)


def linear_seconds(
    dense: nn.Module, merged: ChannelMergedForCausalLM, batch: int, repetitions: int, peak: float
) -> dict[str, dict[str, float]]:
    """Per contender: seconds of all products of one decode step, its ceiling, and the share reached of it."""
    dense_layers, merged_layers = linear_layers(dense), linear_layers(merged)
    mixes = {"one expert": ActiveExperts(1)}
    if batch > 1:
        mixes["mixed"] = mixed(batch, merged.config.num_experts, "cuda")
    graphs = {"dense": captured(linear_step(dense_layers, batch, None))}
    for name, active in mixes.items():
        graphs[name] = captured(linear_step(merged_layers, batch, active))
        with without_kernel():
            graphs[f"{name}, plain"] = captured(linear_step(merged_layers, batch, active))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repetitions):
        for name, graph in graphs.items():
            times[name].append(replay_seconds(graph))
    results = {}
    for name in graphs:
        layers = dense_layers if name == "dense" else merged_layers
        experts = range(min(batch, merged.config.num_experts)) if name.startswith("mixed") else [1]
        ceiling = touched_bytes(layers, experts) / peak
        seconds = statistics.median(times[name])
        results[name] = {"seconds": seconds, "ceiling": ceiling, "share of ceiling": ceiling / seconds}
    return results


def model_speeds(
    dense: nn.Module, merged: ChannelMergedForCausalLM, config: LlamaConfig, batch: int, repetitions: int, device: str
) -> dict[str, dict[str, float]]:
    """Per contender: tokens per second of the whole model, eagerly; the long prompt only at batch 1."""
    index = torch.arange(batch, device=device) % merged.config.num_experts

    contenders = {"dense": [(dense, batch)], "one expert": [(with_experts(merged, 1), batch)]}
    if batch > 1:
        contenders["mixed"] = [(with_experts(merged, index), batch)]
    prompt = LONG_PROMPT if batch == 1 else PROMPT
    speeds = measure(contenders, config, prompt, NEW_TOKENS, repetitions, device)
    return {
        name: {"prompt": prompt, "prefill": speed.prefill, "decode": speed.decode} for name, speed in speeds.items()
    }


def print_tables(results: dict):
    """Ratios to dense stand beside the figures."""
    console = Console()
    table = Table(title="linear layers of one decode step (CUDA graph)")
    for column in ("batch", "", "ms", "of dense's speed", "of ceiling"):
        table.add_column(column, justify="right")
    for batch, contenders in results["linear"].items():
        for name, row in contenders.items():
            ratio = contenders["dense"]["seconds"] / row["seconds"]
            table.add_row(batch, name, f"{row['seconds'] * 1e3:.3f}", f"{ratio:.3f}", f"{row['share of ceiling']:.3f}")
    console.print(table)
    table = Table(title="whole model, eager, tokens/s")
    for column in ("batch", "", "prompt", "prefill", "of dense", "decode", "of dense"):
        table.add_column(column, justify="right")
    for batch, contenders in results["model"].items():
        for name, row in contenders.items():
            dense = contenders["dense"]
            table.add_row(
                batch, name, str(row["prompt"]),
                f"{row['prefill']:.0f}", f"{row['prefill'] / dense['prefill']:.3f}",
                f"{row['decode']:.1f}", f"{row['decode'] / dense['decode']:.3f}",
            )  # fmt: skip
    console.print(table)


def environment() -> dict[str, str]:
    """Hardware, versions and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": channel_kernels.triton.__version__ if channel_kernels.triton else "none",
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=11)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmark_gpu needs a CUDA GPU, found none", file=sys.stderr)
        return 2
    free = torch.cuda.mem_get_info()[0]
    if free < NEEDED_BYTES:
        print(
            f"benchmark_gpu needs {NEEDED_BYTES / 1e9:.0f} GB of free GPU memory, found {free / 1e9:.0f} GB",
            file=sys.stderr,
        )
        return 2
    peak = bandwidth("cuda")
    config = base_config("7B")
    dense = dense_model(config, torch.bfloat16, "cuda")
    merged = merged_model(config, NUM_EXPERTS, NUM_GROUPS, torch.bfloat16, "cuda")
    results = {"environment": environment(), "bytes per second": peak, "linear": {}, "model": {}}
    for batch in BATCHES:
        results["linear"][str(batch)] = linear_seconds(dense, merged, batch, arguments.repetitions, peak)
        torch.cuda.empty_cache()
        results["model"][str(batch)] = model_speeds(dense, merged, config, batch, arguments.repetitions, "cuda")
    print_tables(results)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
