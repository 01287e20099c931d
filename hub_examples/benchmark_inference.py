"""Tokens per second of a channel-merged model against dense models of the same base, in one process.

    make bench

For each shape, with random weights, the merged model (N = 4 experts, K = 2 random groups per channel) and its
contenders are built once. They take turns within every repetition and every decoded token, so that drift of the
machine hits all alike; medians are reported. A table for each section, then one line of JSON.

- one: every expert in turn against the dense base; prefill of the prompt, then decoding token by token.
- mixed: a batch spread over all experts against (a) N dense models, each run on its own rows, (b) one dense model on
  the whole batch, (c) the base with one LoRA adapter (rank 16) per expert and `adapter_names`.
- serving: switching experts, memory, load time, routing.
- experts: runs, memory and speed against the number of experts.
- continuous: requests of different lengths for all experts, there at once, by continuous batching: against the same
  requests in static batches (each runs until its longest answer ends), against N dense models that serve their own
  requests one model after the other, and against one dense model that serves all. Tokens are those asked for.

The ceiling is the memory bandwidth, measured by summing a large tensor, over the weight bytes that a decode step
reads.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, GenerationConfig, LlamaConfig

from conversion.channels.row_layout import layout_rows
from modeling_channel_merged import ChannelMergedConfig, ChannelMergedForCausalLM
from modeling_channel_merged.channel_merged_layers import ChannelMergedLinear, find_modules

SHAPES = {
    "322M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "num_attention_heads": 16},
    "0.5B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARY = 32000

Forward = Callable[..., object]
Parts = list[tuple[Forward, int]]  # models that run one after the other, each on so many rows of the batch


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


class Session:
    """One contender: its parts, each with a cache of its own."""

    def __init__(self, parts: Parts, config: LlamaConfig, prompt: int, device: str):
        self.parts, self.config, self.device = parts, config, device
        self.prompts = [torch.randint(0, config.vocab_size, (batch, prompt), device=device) for _, batch in parts]
        self.tokens, self.caches = [], []

    def prefill(self, prompts: list[torch.Tensor] | None = None) -> float:
        """Seconds to fill fresh caches with the prompts."""
        self.caches = [DynamicCache(config=self.config) for _ in self.parts]
        return self._run(self.prompts if prompts is None else prompts)

    def warm_up(self):
        """A few tokens on every path, thrown away."""
        self.prefill([prompt[:, :4] for prompt in self.prompts])
        self.step()

    def step(self) -> float:
        """Seconds to decode one token of every row."""
        return self._run(self.tokens)

    def _run(self, inputs: list[torch.Tensor]) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        self.tokens = [
            forward(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            for (forward, _), tokens, cache in zip(self.parts, inputs, self.caches, strict=True)
        ]
        synchronize(self.device)
        return time.perf_counter() - start


@torch.inference_mode()
def measure(
    contenders: dict[str, Parts], config: LlamaConfig, prompt: int, new_tokens: int, repetitions: int, device: str
) -> dict[str, Speed]:
    """Median speeds of contenders that take turns."""
    sessions = {name: Session(parts, config, prompt, device) for name, parts in contenders.items()}
    for session in sessions.values():
        session.warm_up()
    prefill = {name: [] for name in sessions}
    decode = {name: [] for name in sessions}
    with tqdm(total=repetitions + new_tokens, desc=", ".join(sessions), leave=False) as progress:
        for _ in range(repetitions):
            for name, session in sessions.items():
                prefill[name].append(session.prefill())
            progress.update()
        for _ in range(new_tokens):
            for name, session in sessions.items():
                decode[name].append(session.step())
            progress.update()
    batch = {name: sum(rows for _, rows in parts) for name, parts in contenders.items()}
    return {
        name: Speed(
            batch[name] * prompt / statistics.median(prefill[name]), batch[name] / statistics.median(decode[name])
        )
        for name in sessions
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


def with_experts(merged: ChannelMergedForCausalLM, expert_index: int | torch.Tensor) -> Forward:
    return lambda *args, **kwargs: merged(*args, expert_index=expert_index, **kwargs)


@dataclass(frozen=True)
class Setting:
    """What all sections need to know."""

    shape: str
    dtype: torch.dtype
    prompt: int
    new_tokens: int
    repetitions: int
    device: str
    num_experts: int

    @property
    def labels(self) -> dict[str, str]:
        return {"shape": self.shape, "dtype": str(self.dtype).removeprefix("torch.")}

    def measure(self, contenders: dict[str, Parts]) -> dict[str, Speed]:
        """Large batches, whose prefill takes long and varies little, repeat it less often."""
        batch = sum(rows for _, rows in next(iter(contenders.values())))
        repetitions = max(1, self.repetitions // batch)
        return measure(contenders, base_config(self.shape), self.prompt, self.new_tokens, repetitions, self.device)

    def dense(self) -> nn.Module:
        return dense_model(base_config(self.shape), self.dtype, self.device)

    def merged(self, num_experts: int | None = None) -> ChannelMergedForCausalLM:
        experts = self.num_experts if num_experts is None else num_experts
        return merged_model(base_config(self.shape), experts, 2, self.dtype, self.device)


def one_expert(setting: Setting, batches: list[int]) -> Iterator[dict]:
    """Every expert alone against the dense base."""
    dense, merged = setting.dense(), setting.merged()
    ceiling = bandwidth(setting.device) / decode_bytes(dense)
    for batch in batches:
        contenders = {"dense": [(dense, batch)]}
        for expert in range(setting.num_experts):
            contenders[f"expert {expert}"] = [(with_experts(merged, expert), batch)]
        speeds = setting.measure(contenders)
        base, experts = speeds["dense"], [speeds[f"expert {expert}"] for expert in range(setting.num_experts)]
        prefill, decode = ([getattr(s, kind) / getattr(base, kind) for s in experts] for kind in ("prefill", "decode"))
        yield {
            **setting.labels,
            "batch": batch,
            "prompt": setting.prompt,
            "dense prefill": base.prefill,
            "dense decode": base.decode,
            "ceiling": ceiling * batch,
            "prefill ratio": statistics.mean(prefill),
            "decode ratio": statistics.mean(decode),
            "worst decode": min(decode),
            "prefill ratios": prefill,
            "decode ratios": decode,
        }


def lora_model(dense: nn.Module, num_experts: int, rank: int = 16) -> nn.Module:
    """The dense base with one LoRA adapter per expert on every linear map of its blocks."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(dense, config, adapter_name="expert_0")
    for expert in range(1, num_experts):
        model.add_adapter(f"expert_{expert}", config)
    return model.eval()


def mixed_batch(setting: Setting, batches: list[int]) -> Iterator[dict]:
    """A batch spread evenly over all experts.

    The N dense models share one set of weights: they run one after the other, their speed is the same, and N sets
    would not fit the small machines that this runs on.
    """
    dense, merged, adapted = setting.dense(), setting.merged(), lora_model(setting.dense(), setting.num_experts)
    for batch in batches:
        experts = [row % setting.num_experts for row in range(batch)]
        adapters = [f"expert_{expert}" for expert in experts]
        contenders = {
            "merged": [(with_experts(merged, torch.tensor(experts, device=setting.device)), batch)],
            "dense each": [(dense, batch // setting.num_experts)] * setting.num_experts,
            "dense whole": [(dense, batch)],
            "LoRA": [(lambda *args, names=adapters, **kwargs: adapted(*args, adapter_names=names, **kwargs), batch)],
        }
        speeds = setting.measure(contenders)
        result = {**setting.labels, "batch": batch, "prompt": setting.prompt}
        for name in ("dense each", "dense whole", "LoRA"):
            result[f"prefill / {name}"] = speeds["merged"].prefill / speeds[name].prefill
            result[f"decode / {name}"] = speeds["merged"].decode / speeds[name].decode
        yield result


def model_bytes(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def load_seconds(model: nn.Module) -> float:
    """Seconds to load a model from files in the page cache, the faster of two times."""
    times = []
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for _ in range(2):
            start = time.perf_counter()
            type(model).from_pretrained(folder)
            times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def serving(setting: Setting) -> Iterator[dict]:
    """What switching, memory, loading and routing cost."""
    config, device = base_config(setting.shape), setting.device
    dense, merged = setting.dense(), setting.merged()
    stored = sum(p.numel() for name, p in merged.named_parameters() if not name.startswith("router"))
    separate = setting.num_experts * sum(p.numel() for p in dense.parameters())
    session = Session([(with_experts(merged, 0), 1)], config, setting.prompt, device)
    session.warm_up()
    route, prefill, steady, switched = [], [], [], []
    for _ in range(setting.repetitions):
        start = time.perf_counter()
        merged.route(session.prompts[0])
        synchronize(device)
        route.append(time.perf_counter() - start)
        prefill.append(session.prefill())
    step = [session.step() for _ in range(setting.new_tokens)]
    token = session.prompts[0][:, :1]
    for _ in range(5):
        for expert in range(setting.num_experts):
            for times in (switched, steady):  # the first token after a switch, then one more of the same expert
                start = time.perf_counter()
                merged(token, expert_index=expert, use_cache=False)
                synchronize(device)
                times.append(time.perf_counter() - start)
    answer = statistics.median(prefill) + 64 * statistics.median(step)
    yield {
        **setting.labels,
        "stored share": stored / separate,
        "memory share": model_bytes(merged) / (setting.num_experts * model_bytes(dense)),
        "load time per byte / dense": (load_seconds(merged) / model_bytes(merged))
        / (load_seconds(dense) / model_bytes(dense)),
        "router layers": merged.config.router["layers"],
        "routing / answer": statistics.median(route) / answer,
        "switch ms": 1e3 * (statistics.median(switched) - statistics.median(steady)),
        "token ms": 1e3 * statistics.median(steady),
    }


def by_number_of_experts(setting: Setting) -> Iterator[dict]:
    """Cost of one expert against the number of experts."""
    dense = setting.dense()
    for num_experts in (2, 4, 8, 16):
        merged = setting.merged(num_experts)
        speeds = setting.measure({"dense": [(dense, 1)], "merged": [(with_experts(merged, num_experts // 2), 1)]})
        runs = [
            len(expert.slices)
            for module in merged.channel_modules().values()
            if isinstance(module, ChannelMergedLinear)
            for expert in module.derived.runs
        ]
        yield {
            **setting.labels,
            "experts": num_experts,
            "mean runs": statistics.mean(runs),
            "memory share": model_bytes(merged) / (num_experts * model_bytes(dense)),
            "memory / dense": model_bytes(merged) / model_bytes(dense),
            "prefill ratio": speeds["merged"].prefill / speeds["dense"].prefill,
            "decode ratio": speeds["merged"].decode / speeds["dense"].decode,
        }
        del merged


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    new_tokens: int
    expert: int


def random_requests(setting: Setting, count: int) -> list[Request]:
    """Prompts and answers of a quarter to the whole of the setting's lengths, the experts in turn."""
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(2, count, generator=generator) * 0.75 + 0.25
    prompts, answers = (share * torch.tensor([[setting.prompt], [setting.new_tokens]])).ceil().int().tolist()
    return [
        Request(
            torch.randint(3, VOCABULARY, (prompt,), generator=generator).tolist(), answer, row % setting.num_experts
        )
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def serve_continuously(model: nn.Module, requests: list[Request], is_merged: bool) -> float:
    """Seconds until all requests are answered, from the moment that they are there."""
    config = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
    tokens = sum(len(request.prompt) + request.new_tokens for request in requests)
    options = ContinuousBatchingConfig(page_size=32, num_blocks=tokens // 32 + len(requests), max_batch_tokens=256)
    with model.continuous_batching_context_manager(config, continuous_batching_config=options) as manager:
        start = time.perf_counter()
        for request in requests:
            expert = {"expert_index": request.expert} if is_merged else {}
            manager.add_request(request.prompt, max_new_tokens=request.new_tokens, **expert)
        answered = 0
        while answered < len(requests):
            output = manager.get_result(timeout=600)
            if output is None or output.error is not None:
                raise RuntimeError(f"a request failed: {output and output.error}")
            answered += output.is_finished()
        return time.perf_counter() - start


def serve_in_batches(model: ChannelMergedForCausalLM, requests: list[Request], batch: int) -> float:
    """Seconds for static mixed batches in the order of arrival, padded on the left."""
    start = time.perf_counter()
    for first in range(0, len(requests), batch):
        together = requests[first : first + batch]
        length = max(len(request.prompt) for request in together)
        padding = [length - len(request.prompt) for request in together]
        model.generate(
            torch.tensor([[0] * n + request.prompt for n, request in zip(padding, together)], device=model.device),
            attention_mask=torch.tensor([[0] * n + [1] * (length - n) for n in padding], device=model.device),
            expert_index=[request.expert for request in together],
            max_new_tokens=max(request.new_tokens for request in together),
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
    synchronize(str(model.device))
    return time.perf_counter() - start


def continuous(setting: Setting, counts: list[int], batch: int = 8) -> Iterator[dict]:
    """Requests that are there at once, by continuous batching and otherwise."""
    dense, merged = setting.dense(), setting.merged()
    for count in counts:
        requests = random_requests(setting, count)
        own = [requests[expert :: setting.num_experts] for expert in range(setting.num_experts)]
        contenders = {
            "merged": lambda all=requests: serve_continuously(merged, all, True),
            "static batches": lambda all=requests: serve_in_batches(merged, all, batch),
            "dense each": lambda own=own: sum(serve_continuously(dense, theirs, False) for theirs in own),
            "dense whole": lambda all=requests: serve_continuously(dense, all, False),
        }
        seconds = {name: [] for name in contenders}
        for _ in range(setting.repetitions):
            for name, run in contenders.items():
                seconds[name].append(run())
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        result = {**setting.labels, "requests": count, "prompt": setting.prompt, "new tokens": setting.new_tokens}
        result["merged tokens/s"] = sum(request.new_tokens for request in requests) / medians["merged"]
        for name in ("static batches", "dense each", "dense whole"):
            result[f"merged / {name}"] = medians[name] / medians["merged"]
        yield {**result, "seconds": [seconds]}


TITLES = {
    "one": "One expert against one dense model",
    "mixed": "Mixed batches",
    "serving": "Switching, memory, loading, routing",
    "experts": "Number of experts",
    "continuous": "Continuous batching",
}


def cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(title: str, results: list[dict]) -> Table:
    columns = [key for key, value in results[0].items() if not isinstance(value, list)]
    drawn = Table(*columns, title=title)
    for result in results:
        drawn.add_row(*(cell(result[key]) for key in columns))
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
    parser.add_argument("--sections", nargs="+", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--shapes", nargs="+", default=["322M", "0.5B"], choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="batch sizes of one expert")
    parser.add_argument("--mixed-batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--requests", nargs="+", type=int, default=[32], help="requests of continuous batching")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--mixed-prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    sections = {
        "one": lambda setting: one_expert(setting, args.batches),
        "mixed": lambda setting: mixed_batch(setting, args.mixed_batches),
        "serving": serving,
        "experts": by_number_of_experts,
        "continuous": lambda setting: continuous(setting, args.requests),
    }
    console = Console(width=200)
    report = {**environment(args.device), **vars(args), "bandwidth_gb_s": bandwidth(args.device) / 1e9}
    for section in args.sections:
        report[section] = []
        for shape, dtype in itertools.product(args.shapes, args.dtypes):
            prompt = args.mixed_prompt if section in ("mixed", "continuous") else args.prompt
            setting = Setting(
                shape, getattr(torch, dtype), prompt, args.new_tokens, args.repetitions, args.device,
                args.num_experts,
            )  # fmt: skip
            for result in sections[section](setting):
                report[section].append(result)
                console.log(", ".join(f"{key} {cell(value)}" for key, value in result.items() if value is not None))
        console.print(table(TITLES[section], report[section]))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
