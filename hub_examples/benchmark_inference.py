"""Tokens per second of a channel-merged model against dense models of the same base, in one process.

    make bench

runs the CPU set. For each shape, random weights: the merged model (N = 4 experts, K = 2 random groups per channel) and
the dense base are built once; contenders take turns within every repetition, so that drift of the machine hits all of
them; medians are reported. A table, then one line of JSON.

- one expert: every expert in turn against the dense base; prefill of the prompt, then decoding token by token.
- mixed batch: the batch spread over all experts against (a) N dense models, each run on its own rows, (b) one dense
  model on the whole batch, (c) the base with one LoRA adapter (rank 16) per expert and `adapter_names`.
- ceiling: weight bytes that a decode step must read over the memory bandwidth measured by summing a large tensor.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from modeling_channel_merged import ChannelMergedConfig, ChannelMergedForCausalLM
from modeling_channel_merged.channel_merged_layers import find_modules
from modeling_channel_merged.channel_ops import layout_rows

SHAPES = {
    "322M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "num_attention_heads": 16},
    "0.5B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
PROMPT, VOCABULARY = 512, 32000

Forward = Callable[..., object]


@dataclass(frozen=True)
class Speed:
    """Tokens per second over the batch."""

    prefill: float
    decode: float


def base_config(shape: str) -> LlamaConfig:
    return LlamaConfig(**SHAPES[shape], vocab_size=VOCABULARY, max_position_embeddings=4096)


@torch.no_grad()
def fill(model: nn.Module):
    """Random weights of the size that Transformers initialises with."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)


def dense_model(config: LlamaConfig, dtype: torch.dtype, device: str) -> nn.Module:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    fill(model)
    return model


def merged_model(
    config: LlamaConfig, num_experts: int, num_groups: int, dtype: torch.dtype, device: str
) -> ChannelMergedForCausalLM:
    """Each channel's experts fall into at most `num_groups` groups at random."""
    with torch.device("meta"):
        modules = find_modules(AutoModelForCausalLM.from_config(config))
    generator = torch.Generator().manual_seed(0)
    layouts = {
        path: layout_rows(torch.randint(0, num_groups, (num_experts, spec.out_features), generator=generator))
        for path, spec in modules.channel.items()
    }
    rows = {path: len(layout.row_channel) for path, layout in layouts.items()}
    names = [f"expert_{expert}" for expert in range(num_experts)]
    merged_config = ChannelMergedConfig(text_config=config, expert_names=names, rows=rows, dtype=dtype)
    merged_config.text_config.dtype = dtype
    with torch.device(device):
        model = ChannelMergedForCausalLM(merged_config).eval()
    fill(model)
    nn.init.normal_(model.router.head.weight)
    for path, layout in layouts.items():
        model.model.get_submodule(path).channel_index.copy_(layout.channel_index)
    return model


def synchronize(device: str):
    if device != "cpu":
        torch.accelerator.synchronize()


@torch.inference_mode()
def run(forward: Forward, config: LlamaConfig, batch: int, prompt: int, new_tokens: int, device: str) -> Speed:
    """Prefill a prompt, then decode greedily token by token."""
    input_ids = torch.randint(0, VOCABULARY, (batch, prompt), device=device)
    cache = DynamicCache(config=config)
    synchronize(device)
    start = time.perf_counter()
    logits = forward(input_ids, past_key_values=cache, logits_to_keep=1).logits
    token = logits[:, -1:].argmax(-1)
    synchronize(device)
    middle = time.perf_counter()
    for _ in range(new_tokens):
        token = forward(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    synchronize(device)
    end = time.perf_counter()
    return Speed(batch * prompt / (middle - start), batch * new_tokens / (end - middle))


def take_turns(contenders: dict[str, Callable[[], Speed]], repetitions: int) -> dict[str, Speed]:
    """Median speeds; every repetition runs each contender once, after one round of warm-up."""
    for contender in contenders.values():
        contender()
    speeds: dict[str, list[Speed]] = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, contender in contenders.items():
            speeds[name].append(contender())
    return {
        name: Speed(statistics.median(s.prefill for s in values), statistics.median(s.decode for s in values))
        for name, values in speeds.items()
    }


def bandwidth(device: str) -> float:
    """Bytes per second at which a large float32 tensor is summed."""
    tensor = torch.ones(2**28 if device != "cpu" else 2**27, device=device)
    times = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        tensor.sum()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return tensor.nbytes / statistics.median(times)


def decode_bytes(model: nn.Module) -> int:
    """Weight bytes that one decode step of a dense model reads: all but the embedding table."""
    embedding = model.get_input_embeddings().weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not embedding)


def one_expert(
    shape: str,
    dtype: torch.dtype,
    batches: list[int],
    new_tokens: int,
    repetitions: int,
    device: str,
    num_experts: int,
) -> list[dict]:
    """Every expert alone against the dense base."""
    config = base_config(shape)
    dense, merged = dense_model(config, dtype, device), merged_model(config, num_experts, 2, dtype, device)
    ceiling = bandwidth(device) / decode_bytes(dense)
    results = []
    for batch in batches:

        def contender(forward: Forward, batch: int = batch) -> Callable[[], Speed]:
            return lambda: run(forward, config, batch, PROMPT, new_tokens, device)

        contenders = {"dense": contender(dense)}
        for expert in range(num_experts):
            contenders[f"expert {expert}"] = contender(
                lambda *args, expert=expert, **kwargs: merged(*args, expert_index=expert, **kwargs)
            )
        speeds = take_turns(contenders, repetitions)
        experts = [speeds[f"expert {expert}"] for expert in range(num_experts)]
        results.append(
            {
                "shape": shape,
                "dtype": str(dtype).removeprefix("torch."),
                "batch": batch,
                "dense_prefill": speeds["dense"].prefill,
                "dense_decode": speeds["dense"].decode,
                "decode_ceiling": ceiling * batch,
                "prefill_ratio": statistics.mean(s.prefill for s in experts) / speeds["dense"].prefill,
                "decode_ratio": statistics.mean(s.decode for s in experts) / speeds["dense"].decode,
                "prefill_ratios": [s.prefill / speeds["dense"].prefill for s in experts],
                "decode_ratios": [s.decode / speeds["dense"].decode for s in experts],
            }
        )
    return results


def lora_model(dense: nn.Module, num_experts: int, rank: int = 16) -> nn.Module:
    """The dense base with one LoRA adapter per expert on every linear map of its blocks."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(dense, config, adapter_name="expert_0")
    for expert in range(1, num_experts):
        model.add_adapter(f"expert_{expert}", config)
    return model.eval()


def mixed_batch(
    shape: str,
    dtype: torch.dtype,
    batches: list[int],
    new_tokens: int,
    repetitions: int,
    device: str,
    num_experts: int,
) -> list[dict]:
    """A batch spread evenly over all experts.

    The N dense models share one set of weights: they run one after the other, their speed is the same, and N sets
    would not fit the small machines that this runs on.
    """
    config = base_config(shape)
    dense, merged = dense_model(config, dtype, device), merged_model(config, num_experts, 2, dtype, device)
    adapted = lora_model(dense_model(config, dtype, device), num_experts)
    results = []
    for batch in batches:
        rows = batch // num_experts
        experts = [row % num_experts for row in range(batch)]
        expert_index = torch.tensor(experts, device=device)
        adapters = [f"expert_{expert}" for expert in experts]

        def merged_run(batch: int = batch, expert_index: torch.Tensor = expert_index) -> Speed:
            return run(
                lambda *args, **kwargs: merged(*args, expert_index=expert_index, **kwargs),
                config, batch, PROMPT, new_tokens, device,
            )  # fmt: skip

        def dense_each(rows: int = rows) -> Speed:
            speeds = [run(dense, config, rows, PROMPT, new_tokens, device) for _ in range(num_experts)]
            # N models one after the other: the times add up, so the speed of the whole batch is one model's mean.
            return Speed(
                num_experts / sum(1 / s.prefill for s in speeds), num_experts / sum(1 / s.decode for s in speeds)
            )

        contenders = {
            "merged": merged_run,
            "dense each": dense_each,
            "dense whole": lambda batch=batch: run(dense, config, batch, PROMPT, new_tokens, device),
            "LoRA": lambda batch=batch, adapters=adapters: run(
                lambda *args, **kwargs: adapted(*args, adapter_names=adapters, **kwargs),
                config, batch, PROMPT, new_tokens, device,
            ),
        }  # fmt: skip
        speeds = take_turns(contenders, repetitions)
        result = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "batch": batch}
        for name in ("dense each", "dense whole", "LoRA"):
            key = name.replace(" ", "_").lower()
            result[f"prefill_vs_{key}"] = speeds["merged"].prefill / speeds[name].prefill
            result[f"decode_vs_{key}"] = speeds["merged"].decode / speeds[name].decode
        results.append(result)
    return results


def model_bytes(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def serving(shape: str, dtype: torch.dtype, new_tokens: int, repetitions: int, device: str, num_experts: int) -> dict:
    """What switching, memory and routing cost."""
    config = base_config(shape)
    dense, merged = dense_model(config, dtype, device), merged_model(config, num_experts, 2, dtype, device)
    stored = sum(p.numel() for name, p in merged.named_parameters() if not name.startswith("router"))
    separate = num_experts * sum(p.numel() for p in dense.parameters())
    input_ids = torch.randint(0, VOCABULARY, (1, PROMPT), device=device)
    route, answer, steady, switched = [], [], [], []
    with torch.inference_mode():
        for _ in range(repetitions + 1):
            start = time.perf_counter()
            merged.route(input_ids)
            synchronize(device)
            route.append(time.perf_counter() - start)
            speed = run(
                lambda *args, **kwargs: merged(*args, expert_index=0, **kwargs), config, 1, PROMPT, new_tokens, device
            )
            answer.append(PROMPT / speed.prefill + new_tokens / speed.decode)
            for expert in range(num_experts):
                for times in (switched, steady):  # the first token after a switch, then one more of the same expert
                    start = time.perf_counter()
                    merged(input_ids[:, :1], expert_index=expert, use_cache=False)
                    synchronize(device)
                    times.append(time.perf_counter() - start)
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "stored_share": stored / separate,
        "memory_share": model_bytes(merged) / (num_experts * model_bytes(dense)),
        "routing_share": statistics.median(route) / (statistics.median(route) + statistics.median(answer)),
        "router_layers": merged.config.router["layers"],
        "switch_ms": 1e3 * (statistics.median(switched) - statistics.median(steady)),
    }


def by_number_of_experts(shape: str, dtype: torch.dtype, new_tokens: int, repetitions: int, device: str) -> list[dict]:
    """Cost of one expert against the number of experts, K = 2."""
    config = base_config(shape)
    dense, results = dense_model(config, dtype, device), []
    for num_experts in (2, 4, 8, 16):
        merged = merged_model(config, num_experts, 2, dtype, device)
        maps = [m for m in merged.channel_modules().values() if hasattr(m, "derived")]
        contenders = {
            "dense": lambda: run(dense, config, 1, PROMPT, new_tokens, device),
            "merged": lambda merged=merged, last=num_experts // 2: run(
                lambda *args, **kwargs: merged(*args, expert_index=last, **kwargs),
                config, 1, PROMPT, new_tokens, device,
            ),
        }  # fmt: skip
        speeds = take_turns(contenders, repetitions)
        runs = [len(expert.slices) for module in maps for expert in module.derived.runs]
        results.append(
            {
                "shape": shape,
                "dtype": str(dtype).removeprefix("torch."),
                "experts": num_experts,
                "mean_runs": statistics.mean(runs),
                "memory_share": model_bytes(merged) / (num_experts * model_bytes(dense)),
                "prefill_ratio": speeds["merged"].prefill / speeds["dense"].prefill,
                "decode_ratio": speeds["merged"].decode / speeds["dense"].decode,
            }
        )
    return results


SECTIONS = {
    "one": "One expert against one dense model",
    "mixed": "Mixed batches",
    "serving": "Switching, memory, routing",
    "experts": "Number of experts",
}


def table(title: str, results: list[dict]) -> Table:
    columns = [key for key, value in results[0].items() if not isinstance(value, list)]
    drawn = Table(*columns, title=title)
    for result in results:
        values = (result[key] for key in columns)
        drawn.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values))
    return drawn


def environment(device: str) -> dict:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or None,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="one,mixed,serving,experts", help="any of these, comma-separated")
    parser.add_argument("--shapes", default="322M,0.5B", help=f"any of {','.join(SHAPES)}")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batches", default="1,8", help="batch sizes of one expert")
    parser.add_argument("--mixed-batches", default="8,32")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    shapes, batches = args.shapes.split(","), [int(batch) for batch in args.batches.split(",")]
    mixed_batches = [int(batch) for batch in args.mixed_batches.split(",")]
    dtypes = [getattr(torch, name) for name in args.dtypes.split(",")]
    common = (args.new_tokens, args.repetitions, args.device)
    console, report = Console(), {**environment(args.device), "bandwidth_gb_s": bandwidth(args.device) / 1e9}
    for section in args.sections.split(","):
        results = []
        for shape, dtype in itertools.product(shapes, dtypes):
            if section == "one":
                results += one_expert(shape, dtype, batches, *common, args.num_experts)
            elif section == "mixed":
                results += mixed_batch(shape, dtype, mixed_batches, *common, args.num_experts)
            elif section == "serving":
                results.append(serving(shape, dtype, *common, args.num_experts))
            elif section == "experts":
                results += by_number_of_experts(shape, dtype, *common)
            else:
                parser.error(f"unknown section {section!r}, expected any of {', '.join(SECTIONS)}")
        report[section] = results
        console.print(table(SECTIONS[section], results))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
