"""Channel-merged checkpoints written straight from the stored form, with every expert's exact weights beside them."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from conversion.__main__ import main
from conversion.channels.row_layout import layout_rows
from conversion.checkpoints.checkpoint_report import inspect_checkpoint
from conversion.hub.model_card import write_card
from modeling_channel_merged.channel_merged_layers import find_modules
from modeling_channel_merged.configuration_channel_merged import ChannelMergedConfig

QUERIES = {
    "instruct": ["please", "write", "hello"],
    "math": ["one", "two", "plus"],
    "code": ["def", "print", "return"],
}
WORDS = ["one", "two", "three", "plus", "print", "def", "return", "hello", "please", "write", "你", "好", "吗", "user"]
SPECIAL_TOKENS = ["<pad>", "<eos>", "<unk>"]
VOCAB_SIZE = 23

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
ARCHITECTURES = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2-tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, tie_word_embeddings=False),
    "gpt2-tied": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=12, n_layer=2, n_head=3, n_positions=64, bos_token_id=None, eos_token_id=1
    ),
}


@dataclass
class StoredExperts:
    """A merged checkpoint, and what each expert's plain state dict must be."""

    folder: Path
    config: ChannelMergedConfig
    experts: list[dict[str, torch.Tensor]]
    labels: dict[str, torch.Tensor]  # module path -> (N, O) groups


def write_tokenizer(folder: Path, chat: bool = False) -> None:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL_TOKENS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )
    if chat:
        fast.chat_template = "{% for message in messages %}user {{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)


def write_checkpoint(
    folder: Path,
    architecture: str = "llama",
    expert_names: tuple[str, ...] = ("instruct", "math", "code"),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vocab_sizes: tuple[int, ...] | None = None,
    router_layers: int = 1,
) -> StoredExperts:
    """Random values and random groups in the stored form; row order and names are written down here once more."""
    generator = torch.Generator().manual_seed(seed)
    text_config, num_experts = ARCHITECTURES[architecture](), len(expert_names)
    text_config.dtype = dtype
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(text_config)
    modules = find_modules(base)
    tensors, rows, labels = {}, {}, {}
    experts = [{} for _ in expert_names]

    def random(*shape: int) -> torch.Tensor:
        return (0.3 * torch.randn(*shape, generator=generator)).to(dtype)

    for path, module in modules.channel.items():
        if module.tied_to:
            labels[path], rows[path] = labels[module.tied_to], rows[module.tied_to]
        else:
            group = torch.randint(0, num_experts, (num_experts, module.out_features), generator=generator)
            same = group[:, None] == group[None]
            labels[path] = same.int().argmax(0)  # the lowest expert of the group
        layout = layout_rows(labels[path])
        index = layout.channel_index.clone()
        if vocab_sizes and base.get_submodule(path) is base.get_output_embeddings():
            for expert, size in enumerate(vocab_sizes):
                index[expert, size:] = -1
        tensors[f"model.{path}.channel_index"] = index
        if module.tied_to:
            continue
        rows[path] = len(layout.row_channel)
        lead = (layout.row_owners & -layout.row_owners).double().log2().long()
        for name, shape in (("weight", (module.in_features,)), ("bias", ())):
            if name == "bias" and not module.bias:
                continue
            values = random(num_experts, module.out_features, *shape)
            tensors[f"model.{path}.rows.{name}"] = values[lead, layout.row_channel]
            for expert in range(num_experts):
                value = values[labels[path][expert], torch.arange(module.out_features)]
                transposed = module.kind == "conv1d" and name == "weight"
                experts[expert][f"{path}.{name}"] = value.T.contiguous() if transposed else value
    for path, names in modules.per_expert.items():
        for name in names:
            for expert in range(num_experts):
                value = 1 + random(*base.get_parameter(f"{path}.{name}").shape)
                tensors[f"model.{path}.experts.{expert}.{name}"] = experts[expert][f"{path}.{name}"] = value
    tensors["router.head.weight"] = torch.zeros(num_experts, text_config.hidden_size)
    tensors["router.head.bias"] = torch.zeros(num_experts)
    config = ChannelMergedConfig(
        text_config=text_config,
        expert_names=list(expert_names),
        rows=rows,
        router={"layers": router_layers},
        merge={"method": "linear"},
        architectures=["ChannelMergedForCausalLM"],
        dtype=dtype,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0}))
    (folder / "conversion_report.json").write_text(json.dumps(conversion_report(expert_names, VOCAB_SIZE)))
    write_card(folder)
    return StoredExperts(folder, config, experts, labels)


def conversion_report(expert_names: tuple[str, ...], vocabulary_size: int) -> dict:
    """What a conversion says of its experts, as far as the model card shows it."""
    card = {"license": "mit", "license_name": None, "license_link": None, "languages": ["en"]}
    vocabulary = {
        **{"size": vocabulary_size, "tokens": vocabulary_size, "encoding": None, "eos_token_ids": [1]},
        **{"channels_that_only_it_has": 0, "channels_that_it_lacks": 0, "dropped_padding_rows": 0},
        **{"dropped_tokens": [], "renamed_tokens": [], "tokens_without_row": []},
    }
    experts = [{"name": name, "model": name} for name in expert_names]
    return {
        "recipe": {"base_model": "base", "experts": [{**expert, "weight": 1.0} for expert in experts]},
        "base_model": {"name": "base_model", "model": "base"},
        "experts": experts,
        "dtype": "float32",
        "versions": {"torch": "2"},
        "cards": {"base": card, "experts": dict.fromkeys(expert_names, card)},
        "parameters": {"stored": 10, "experts_distinct": 15, "experts": 20, "indices": 5},
        "relative_errors": dict.fromkeys(expert_names, 0.5),
        "vocabulary": {
            **{"source": "base", "size": vocabulary_size, "base_size": vocabulary_size},
            "experts": dict.fromkeys(expert_names, vocabulary),
        },
        "modules": {"lm_head": {"owners": {"+".join(expert_names): 5}}},
    }


def router_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Queries of one to nine words that are easy to tell apart, the experts in turn."""
    generator, experts = random.Random(seed), list(QUERIES)
    return [
        {"text": " ".join(generator.choices(QUERIES[expert], k=generator.randint(1, 9))), "expert": expert}
        for expert in (experts[number % 3] for number in range(count))
    ]


def write_jsonl(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def write_norms(stored, path, **norms):
    """Change one module of the conversion's report."""
    file = stored.folder / "conversion_report.json"
    report = json.loads(file.read_text())
    for key, values in norms.items():
        report["modules"][path][key] |= values
    file.write_text(json.dumps(report))


@pytest.fixture
def stored(tmp_path) -> StoredExperts:
    """Three experts of a tiny Llama with grouped-query attention."""
    return write_checkpoint(tmp_path / "merged")


@pytest.fixture(name="write_checkpoint")
def write_checkpoint_fixture():
    return write_checkpoint


@pytest.fixture(name="router_rows")
def router_rows_fixture():
    return router_rows


@pytest.fixture(name="write_jsonl")
def write_jsonl_fixture():
    return write_jsonl


@pytest.fixture(name="write_tokenizer")
def write_tokenizer_fixture():
    return write_tokenizer


@pytest.fixture
def measured(stored):
    """The checkpoint with a conversion's report: e's delta norm is 2 + e, its error norm 1 in every module."""
    paths = [matrix.path for matrix in inspect_checkpoint(stored.folder).matrices]
    names = stored.config.expert_names
    module = {
        "delta_norms": {name: 2.0 + number for number, name in enumerate(names)},
        "error_norms": {name: 1.0 for name in names},
    }
    (stored.folder / "conversion_report.json").write_text(json.dumps({"modules": {path: module for path in paths}}))
    return stored


@pytest.fixture(name="write_norms")
def write_norms_fixture():
    return write_norms


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return stop.value.code, output.out, output.err

    return call


@pytest.fixture
def run_on_two_processes(torchrun):
    """Run the command line by torchrun on two CPU processes, which must succeed: what they say."""
    return lambda *arguments: torchrun("-m", "conversion", *arguments)
