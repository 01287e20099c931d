"""What converting the 7B recipes would take, without a byte of their weights.

    python hub_examples/plan_without_weights.py hub_examples/mistral_7b/recipe.yaml

A dry run reads configs, tokenizers and the headers of weights. Here these are made from what is published of the
models: each checkpoint is a sparse file with a true header, and takes no room on the disk. The tokens are made up, in
the right number. With the real models on the disk, `channel-merge convert RECIPE OUT --dry-run` says the same of them.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from conversion.merging.dry_run import plan_conversion, plan_tables
from conversion.merging.recipe import load_recipe

MISTRAL_7B = {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "sliding_window": 4096, "max_position_embeddings": 32768},
}
QWEN_7B = {
    **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
    **{"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072},
    **{"tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151643},
}


@dataclass(frozen=True)
class Facts:
    """What is known of a model: its config, and the tokens that it has beside the first `shared` of its base."""

    config: PreTrainedConfig
    shared: int
    own_tokens: tuple[str, ...] = ()

    @property
    def tokens(self) -> list[str]:
        return [f"token{number}" for number in range(self.shared)] + list(self.own_tokens)


def mistral(vocab_size: int, own_tokens: tuple[str, ...] = ()) -> Facts:
    return Facts(MistralConfig(vocab_size=vocab_size, **MISTRAL_7B), 32000, own_tokens)


CHINESE_TOKENS = tuple(f"字{number}" for number in range(63872 - 32000))
FACTS = {
    "mistralai/Mistral-7B-v0.1": mistral(32000),
    "cognitivecomputations/dolphin-2.2.1-mistral-7b": mistral(32002, ("<|im_end|>", "<|im_start|>")),
    "meta-math/MetaMath-Mistral-7B": mistral(32001, ("[PAD]",)),
    "uukuguy/speechless-code-mistral-7b-v1.0": mistral(32000),
    "itpossible/Chinese-Mistral-7B-Instruct-v0.1": mistral(63872, CHINESE_TOKENS),
    "Qwen/Qwen2.5-7B": Facts(Qwen2Config(vocab_size=152064, **QWEN_7B), 151665),
}
LORA_RANK = 16


def write_header(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 tensors whose data were never written: it reads as zeros, and takes no room."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)


def parameter_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def write_model(folder: Path, facts: Facts) -> None:
    """A checkpoint of that config, with as many tokens."""
    facts.config.save_pretrained(folder)
    write_header(folder / "model.safetensors", parameter_shapes(facts.config))
    vocabulary = {token: number for number, token in enumerate(facts.tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="token0"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="token0").save_pretrained(folder)


def write_adapter(folder: Path, base: Facts) -> None:
    """A LoRA adapter of all linear maps of the base's blocks."""
    folder.mkdir(parents=True)
    shapes = parameter_shapes(base.config)
    linear = [name for name in shapes if name.endswith("_proj.weight")]
    tensors = {}
    for name in linear:
        out_features, in_features = shapes[name]
        path = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{path}.lora_A.weight"] = (LORA_RANK, in_features)
        tensors[f"{path}.lora_B.weight"] = (out_features, LORA_RANK)
    write_header(folder / "adapter_model.safetensors", tensors)
    targets = sorted({name.split(".")[-2] for name in linear})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": LORA_RANK, "lora_alpha": 2 * LORA_RANK}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}), encoding="utf-8")


def plan(recipe: Path, folder: Path, **keys: Any) -> dict[str, Any]:
    """The dry run of a recipe, its models of headers alone written into `folder`; `keys` replace the recipe's own."""
    values = yaml.safe_load(recipe.read_text(encoding="utf-8")) | keys
    base = FACTS[values["base_model"]]
    write_model(folder / values["base_model"], base)
    for expert in values["experts"]:
        if expert["model"] in FACTS:
            write_model(folder / expert["model"], FACTS[expert["model"]])
        else:
            write_adapter(folder / expert["model"], base)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return plan_conversion(load_recipe(folder / "recipe.yaml"), folder / "merged")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    with tempfile.TemporaryDirectory() as folder:
        Console().print(*plan_tables(plan(parser.parse_args().recipe, Path(folder))), sep="\n", soft_wrap=True)


if __name__ == "__main__":
    main()
