"""Seconds and memory of a conversion against mergekit on the same files; the memory bound on a large set.

    make bench-conversion

writes a base and four experts with the shape of a 322M-parameter Llama (random, bf16, an expert is the base and small
noise) to a temporary folder and runs, one after the other and each in a process of its own: reading the bytes,
mergekit's `task_arithmetic` and `ties`, and ours in `linear` K = 2, `paper-ties` and `paper-dare`. Seconds are those
of the work without the imports; memory is the peak of the resident set above what the process had after its imports.
A table, then one line of JSON.

    make bench-conversion BENCH_ARGS=--memory

converts a set of another shape instead: a base of 3.3 GB with a vocabulary of 128k and four experts, then the same
with eight experts (the four twice), under a budget of `--max-memory`. It needs 25 GB of disk for a while.

The floor of any conversion is the line "read": every byte of base and experts once. Ours reads twice.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

SHAPES = {
    "322M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "num_attention_heads": 16},
    "1.7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "vocab_size": 128_256,
    },
}
VOCABULARY = 32000
NOISE = 0.002  # of the experts' deltas; the base's weights have 0.02
EXPERTS = ("instruct", "math", "code", "chinese", "law", "medicine", "poetry", "legal")

OURS = {
    "ours linear K = 2": {"merge_method": "linear", "grouping": {"num_groups": 2}},
    "ours paper-ties": {"preset": "paper-ties"},
    "ours paper-dare": {"preset": "paper-dare"},
}
MERGEKIT = {
    "mergekit task_arithmetic": ("task_arithmetic", {}),
    "mergekit ties": ("ties", {"density": 0.7}),
}
TARGETS = {  # contender, the one it is compared with, how many times faster it should be at least
    "ours paper-ties": ("mergekit ties", 5.0),
    "ours linear K = 2": ("mergekit task_arithmetic", 1.0),
}


@dataclass(frozen=True)
class Usage:
    """What one contender needed."""

    wall_seconds: float
    cpu_seconds: float
    peak_memory: int  # bytes above the resident set after imports
    load: float  # of the machine, one minute's average when it began


# The checkpoints


def write_checkpoints(folder: Path, shape: str, num_experts: int) -> int:
    """A random base and its experts under `folder`; returns their bytes."""
    config = LlamaConfig(**{"vocab_size": VOCABULARY} | SHAPES[shape], max_position_embeddings=4096)
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    header, size = checkpoint_header(shapes)
    for number, name in enumerate(("base", *EXPERTS[:num_experts])):
        (folder / name).mkdir(parents=True)
        config.save_pretrained(folder / name)
        with (folder / name / "model.safetensors").open("wb") as stream:
            stream.write(header)
            for block in random_blocks(shapes, number):
                stream.write(memoryview(block.view(torch.uint8).numpy()))
    return (num_experts + 1) * size


def checkpoint_header(shapes: dict[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """Header of a safetensors file of bf16 tensors, and the size of the whole file."""
    entries, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + offset


def random_blocks(shapes: dict[str, tuple[int, ...]], expert: int, block: int = 1 << 22) -> Iterator[torch.Tensor]:
    """The tensors' values in order, flat blocks of bf16: the base's (expert 0), and noise of the expert's own.

    The noise is one random block per expert, read from another place and with another sign at every turn.
    """
    noise = torch.randn(2 * block, generator=torch.Generator().manual_seed(1000 + expert)).mul_(NOISE)
    weights = torch.randn(2 * block, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    turn = 0
    for shape in shapes.values():
        left = torch.Size(shape).numel()
        while left:
            size = min(left, block)
            turn += 1
            begin = turn * 65_537 % block
            values = weights[begin : begin + size] + (1.0 if len(shape) == 1 else 0.0)
            if expert:
                begin = turn * 104_729 * expert % block
                values = values.add(noise[begin : begin + size], alpha=1 - 2 * (turn % 2))
            yield values.bfloat16()
            left -= size


# The contenders, each run by a child process


def run_read(work: Path) -> None:
    """Read every byte of every checkpoint once."""
    buffer = bytearray(1 << 24)
    for file in sorted(work.glob("models/*/*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def mergekit_runner(method: str, parameters: dict[str, float]) -> Callable[[Path], None]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    def run(work: Path) -> None:
        models = sorted(path for path in (work / "models").iterdir() if path.name != "base")
        config = {
            "merge_method": method,
            "base_model": str(work / "models" / "base"),
            "models": [{"model": str(path), "parameters": {"weight": 1.0, **parameters}} for path in models],
            "dtype": "bfloat16",
        }
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(config), str(work / "out"), options)

    return run


def our_runner(recipe: dict, max_memory: str) -> Callable[[Path], None]:
    from conversion.convert import convert
    from conversion.merging.recipe import parse_recipe

    def run(work: Path) -> None:
        models = sorted(path for path in (work / "models").iterdir() if path.name != "base")
        data = {
            "base_model": str(work / "models" / "base"),
            "experts": [{"name": path.name, "model": str(path)} for path in models],
            **recipe,
        }
        convert(parse_recipe(data), work / "out", max_memory=max_memory, progress=False)

    return run


def make_runner(name: str, max_memory: str) -> Callable[[Path], None]:
    if name == "read":
        return run_read
    if name in MERGEKIT:
        return mergekit_runner(*MERGEKIT[name])
    return our_runner(OURS[name], max_memory)


def resident_bytes(field: str) -> int:
    """`VmRSS`, the resident set now, or `VmHWM`, its peak, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {field}")


def run_child(name: str, work: Path, max_memory: str) -> None:
    """Run one contender in this process and print what it needed."""
    load = os.getloadavg()[0]
    runner = make_runner(name, max_memory)
    before = resident_bytes("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    runner(work)
    usage = Usage(time.perf_counter() - wall, time.process_time() - cpu, resident_bytes("VmHWM") - before, load)
    print(json.dumps(asdict(usage)))


def measure(name: str, work: Path, max_memory: str) -> Usage:
    """Run one contender in a process of its own; its output is thrown away."""
    command = [sys.executable, __file__, "--contender", name, "--work", str(work), "--max-memory", max_memory]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
        return Usage(**json.loads(done.stdout.splitlines()[-1]))
    finally:
        shutil.rmtree(work / "out", ignore_errors=True)


# The two benchmarks


def bench_speed(work: Path, max_memory: str, console: Console) -> dict:
    """Every contender on the 322M checkpoints."""
    total = write_checkpoints(work / "models", "322M", 4)
    names = ["read", *MERGEKIT, *OURS]
    usages = {}
    table = Table(
        "contender", "wall s", "CPU s", "peak GB", "of reading", title=f"5 checkpoints, {total / 1e9:.2f} GB"
    )
    for name in names:
        usages[name] = usage = measure(name, work, max_memory)
        reading = usage.wall_seconds / usages["read"].wall_seconds
        numbers = (usage.wall_seconds, usage.cpu_seconds, usage.peak_memory / 1e9, reading)
        table.add_row(name, *(f"{number:.2f}" for number in numbers))
    console.print(table)
    ratios = {}
    for ours, (theirs, target) in TARGETS.items():
        ratios[f"{ours} / {theirs}"] = ratio = usages[theirs].wall_seconds / usages[ours].wall_seconds
        verdict = "reached" if ratio >= target else "MISSED"
        console.print(f"{ours}: {ratio:.2f} times as fast as {theirs}, target {target:g}: {verdict}")
    return {"bytes": total, "contenders": {name: asdict(usage) for name, usage in usages.items()}, "speedup": ratios}


def bench_memory(work: Path, max_memory: str, console: Console) -> dict:
    """Peak memory of paper-ties on a set with large matrices, for four experts and for eight, each there twice."""
    results = {}
    table = Table("experts", "input GB", "wall s", "CPU s", "peak GB", title=f"paper-ties, --max-memory {max_memory}")
    total = write_checkpoints(work / "models", "1.7B", 4)
    for num_experts in (4, 8):
        for name, twin in zip(EXPERTS[4:num_experts], EXPERTS, strict=False):
            (work / "models" / name).symlink_to(work / "models" / twin)
            total += (work / "models" / twin / "model.safetensors").stat().st_size
        usage = measure("ours paper-ties", work, max_memory)
        results[num_experts] = {"bytes": total, **asdict(usage)}
        numbers = (total / 1e9, usage.wall_seconds, usage.cpu_seconds, usage.peak_memory / 1e9)
        table.add_row(str(num_experts), *(f"{number:.2f}" for number in numbers))
    console.print(table)
    return {"max_memory": max_memory, "experts": results}


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "safetensors", "mergekit")
    found = {package: importlib.metadata.version(package) for package in packages}
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {**found, "python": platform.python_version(), "commit": commit}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="the memory bound on a large set instead of speed")
    parser.add_argument("--max-memory", default="2GB", help="our memory budget")
    parser.add_argument("--work", type=Path, help="where a temporary folder is made; default: the system's")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.contender:
        run_child(arguments.contender, arguments.work, arguments.max_memory)
        return
    console = Console()
    console.print(f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}")
    benchmark = bench_memory if arguments.memory else bench_speed
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="bench-conversion-") as work:
        results = benchmark(Path(work), arguments.max_memory, console)
    print(json.dumps({**results, "cores": os.cpu_count(), "versions": versions()}))


if __name__ == "__main__":
    main()
