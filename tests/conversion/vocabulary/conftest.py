"""A base and experts of different vocabularies on disk, and the union of them."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from conversion.convert import convert
from conversion.merging.recipe import parse_recipe

FAMILIES = {
    "llama": lambda size: LlamaConfig(**SIZES, vocab_size=size),
    "llama-tied": lambda size: LlamaConfig(**SIZES, vocab_size=size, tie_word_embeddings=True),
}
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
NUM_BASE_TOKENS = 259  # 256 bytes, <s>, </s>, <pad>
BASE_SIZE = 264  # five rows of padding
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
FIM_TEMPLATE = "\n{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}<fim>"
BASE_TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{{ eos_token }}"
NAMES = ("math", "chat", "code", "small")
# The merged ids of each expert's own ids: the base's tokens, chat's, code's, and the padding of own ids 259 to 263.
UNION = {
    "math": [*range(259), 263, 264, 265, 266, 267],
    "chat": [*range(259), 259, 260, 265, 266, 267],
    "code": [*range(259), 261, 262],
    "small": [*range(259)],
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every text is its bytes; three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def extended(
    *tokens: str | AddedToken, eos: str | None = None, template: str | None = None
) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) if isinstance(t, str) else t for t in tokens])
    if eos is not None:
        tokenizer.eos_token = eos
    tokenizer.chat_template = template
    return tokenizer


def model_of_size(family: str, size: int, seed: int, start: PreTrainedModel | None = None) -> PreTrainedModel:
    """A random model, or one near `start` with as many tokens as they share."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](size)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, parameter in model.named_parameters() if start is not None else ():
            shared = start.get_parameter(name)[: len(parameter)]
            some = torch.rand(len(shared)) < 0.5  # channels that the fine-tune changed
            parameter[: len(shared)] = torch.where(
                some.view(-1, *[1] * (shared.dim() - 1)), shared + 0.02 * torch.randn_like(shared), shared
            )
    return model


def save(model: PreTrainedModel, tokenizer, folder: Path, eos: int | None = None) -> Path:
    if eos is not None:
        model.config.eos_token_id = eos
    model.generation_config = GenerationConfig(bos_token_id=256, eos_token_id=eos or 257, pad_token_id=258)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Experts:
    """A base and experts of different vocabularies on disk."""

    base: Path
    folders: dict[str, Path]

    def recipe(self, *names: str, **keys):
        names = names or tuple(self.folders)
        return parse_recipe(
            {
                "base_model": str(self.base),
                "experts": [{"name": name, "model": str(self.folders[name])} for name in names],
                **keys,
            }
        )

    def convert(self, out: Path, *names: str, **keys) -> Path:
        keys = {"grouping": {"num_groups": len(names or self.folders)}, "tokenizer_source": "union", **keys}
        convert(self.recipe(*names, **keys), out, progress=False)
        return out

    def dense(self, name: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folders[name]).eval()

    def tokenizer(self, name: str):
        return AutoTokenizer.from_pretrained(self.folders[name])


def make(folder: Path, family: str = "llama") -> Experts:
    """A padded base; an expert with its vocabulary; one that uses its padding for tokens; one with the same ids for
    other tokens and no padding; one without padding."""
    base = model_of_size(family, BASE_SIZE, 0)
    tokenizers = {
        "math": extended(template=None),
        "chat": extended("<|im_start|>", "<|im_end|>", eos="<|im_end|>", template=CHATML),
        "code": extended("[PAD]", AddedToken("<fim>", special=False, normalized=False), template=FIM_TEMPLATE),
        "small": extended(),
    }
    sizes = {"math": BASE_SIZE, "chat": BASE_SIZE, "code": 261, "small": NUM_BASE_TOKENS}
    folders = {
        name: save(
            model_of_size(family, sizes[name], seed, base),
            tokenizers[name],
            folder / name,
            260 if name == "chat" else None,
        )
        for seed, name in enumerate(sizes, start=1)
    }
    return Experts(save(base, extended(template=BASE_TEMPLATE), folder / "base"), folders)


@pytest.fixture(scope="session", params=FAMILIES)
def experts(request, tmp_path_factory) -> Experts:
    return make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Experts:
    return make(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def merged(experts, tmp_path_factory) -> Path:
    """The union of all of them with as many groups as experts: every row is exact."""
    return experts.convert(tmp_path_factory.mktemp("union") / "merged")


@pytest.fixture(scope="session")
def merged_llama(llama, tmp_path_factory) -> Path:
    return llama.convert(tmp_path_factory.mktemp("union") / "merged")
