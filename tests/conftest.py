"""Tiny experts on disk, and the settings under which everything is tested."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# Without a GPU, kernels run in Triton's interpreter. Triton reads this when first imported: by Transformers, below.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 259  # 256 bytes and three special tokens


@pytest.fixture(scope="session")
def without_package() -> str:
    """Code that a fresh process runs first, so that it finds nothing of this checkout."""
    return """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_channel_merged", "conversion"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def torchrun(tmp_path):
    """Run a script or `-m` a module on two CPU processes in `tmp_path`, which must succeed: what they say."""

    def call(*arguments: str) -> subprocess.CompletedProcess:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        result = subprocess.run(
            [*launch, *arguments],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        return result

    return call


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Fresh memory is filled with NaN, so that what nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def tiny_config(family: str, **overrides) -> PreTrainedConfig:
    """A small config of a family, with sizes that no two dimensions share."""
    sizes = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    if family == "llama":
        return LlamaConfig(**sizes | overrides)
    if family == "mistral":  # a window of keys
        return MistralConfig(**sizes | {"sliding_window": 32} | overrides)
    if family == "qwen2":  # biases in q, k, v; tied embeddings
        return Qwen2Config(**sizes | {"tie_word_embeddings": True} | overrides)
    if family == "qwen3":  # norms of q and k
        return Qwen3Config(**sizes | {"head_dim": 8} | overrides)
    if family == "gpt2":  # transposed fused matrices with biases, learned positions, tied embeddings
        sizes = dict(vocab_size=VOCAB_SIZE, n_embd=24, n_inner=40, n_layer=2, n_head=4, n_positions=64)
        tokens = dict(bos_token_id=256, eos_token_id=257, pad_token_id=258)
        return GPT2Config(**sizes | tokens | overrides)
    raise ValueError(f"unknown family {family!r}")


def tiny_model(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model whose norms and biases are random too, so that no parameter is a trivial one."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: every text is its bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    fast.save_pretrained(folder)
    return fast


def save_checkpoint(model: PreTrainedModel, folder: Path, shards: int = 1) -> Path:
    """Save a model in about `shards` safetensors files, with tokenizer and generation config."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.generation_config = GenerationConfig(bos_token_id=256, eos_token_id=257, pad_token_id=258)
    model.save_pretrained(folder, max_shard_size=max(1, size // shards) if shards > 1 else "5GB")
    save_tokenizer(folder)
    return folder


def tuned(base: PreTrainedModel, seed: int, delta_scale: float, shared: float) -> PreTrainedModel:
    """A fine-tune of `base`: random deltas; a part `shared` of the rows of each matrix stays the base's own."""
    model = AutoModelForCausalLM.from_config(base.config).eval()
    model.load_state_dict(base.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            delta = torch.randn(parameter.shape, generator=generator) * delta_scale
            if parameter.dim() == 2:
                rows = torch.rand(parameter.shape[0], generator=generator) < shared
                delta[rows] = 0
            parameter.add_(delta)
    return model


@pytest.fixture
def make_experts(tmp_path):
    """Factory of a tiny base and its experts on disk.

    `make_experts(family, num_experts, dtype=, delta_scale=, shared=, seed=, shards=) -> (base folder, expert folders)`
    """

    def make(
        family: str = "llama",
        num_experts: int = 4,
        *,
        dtype: torch.dtype = torch.float32,
        delta_scale: float = 0.02,
        shared: float = 0.2,
        seed: int = 0,
        shards: int = 1,
        folder: Path | None = None,
        **overrides,
    ) -> tuple[Path, list[Path]]:
        folder = folder or tmp_path / f"{family}-{num_experts}-{str(dtype)[6:]}-{seed}-{shards}"
        base = tiny_model(family, seed, **overrides)
        experts = [
            tuned(base, seed * 1000 + number + 1, delta_scale, shared).to(dtype) for number in range(num_experts)
        ]
        folders = [save_checkpoint(model, folder / f"expert{number}", shards) for number, model in enumerate(experts)]
        return save_checkpoint(base.to(dtype), folder / "base", shards), folders

    return make


@pytest.fixture
def write_recipe():
    """Factory of recipes: `write_recipe(base, experts, **keys)` gives the mapping; experts are e0, e1, ..."""

    def write(base: Path, experts: list[Path], path: Path | None = None, **keys) -> dict:
        recipe = {
            "base_model": str(base),
            "experts": [{"name": f"e{number}", "model": str(model)} for number, model in enumerate(experts)],
            **keys,
        }
        if path is not None:
            path.write_text(json.dumps(recipe), encoding="utf-8")
        return recipe

    return write
