"""The vocabulary of one checkpoint: its embedding's rows, and the tokens that its tokenizer has for them."""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from conversion.io.foreign_files import check_token_ids, foreign, read_json
from conversion.io.model_files import (
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    check_file_name,
    copy_files,
    drop_code_references,
    read_config_file,
)
from conversion.io.wording import one_line

logger = logging.getLogger(__name__)

TOKENIZER_SOURCES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
)
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DEFAULT_TEMPLATE = "default"


@dataclass(frozen=True)
class OwnVocabulary:
    """One checkpoint's own vocabulary."""

    name: str
    size: int  # rows of its embedding
    tokenizer: PreTrainedTokenizerBase | None
    tokenizer_folder: Path
    special_ids: Mapping[str, Any]  # bos_token_id, eos_token_id, pad_token_id of its config
    generation_config: GenerationConfig

    @cached_property
    def ids(self) -> dict[str, int]:
        """The tokenizer's tokens and their ids, also those beyond the embedding."""
        return dict(self.tokenizer.get_vocab()) if self.tokenizer is not None else {}

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Tokens by id, ascending. Ids that are not here are padding."""
        return {number: token for token, number in sorted(self.ids.items(), key=lambda item: item[1])}

    @cached_property
    def added_tokens(self) -> dict[int, AddedToken]:
        """Tokens that the tokenizer looks for in a text before it segments the rest."""
        return dict(self.tokenizer.added_tokens_decoder) if self.tokenizer is not None else {}

    @property
    def token_ids(self) -> torch.LongTensor:
        """Ids of the embedding's rows that are tokens; all of them where there is no tokenizer."""
        if self.tokenizer is None:
            return torch.arange(self.size)
        return torch.tensor([number for number in self.tokens if number < self.size], dtype=torch.int64)

    @property
    def rowless_tokens(self) -> list[str]:
        """Tokens that have no row in the embedding."""
        return [token for number, token in self.tokens.items() if number >= self.size]

    def has(self, token: str) -> bool:
        """Whether a token has a row in the embedding."""
        return self.ids.get(token, self.size) < self.size

    def is_piece(self, number: int) -> bool:
        """Whether an id is a token of the tokenizer's own segmentation, neither padding nor added."""
        return number in self.tokens and number not in self.added_tokens

    @property
    def eos_token_ids(self) -> list[int]:
        """All ids that this checkpoint calls its end of sequence, in generation config, config or tokenizer."""
        found = set()
        for value in (
            self.generation_config.eos_token_id,
            self.special_ids.get("eos_token_id"),
            getattr(self.tokenizer, "eos_token_id", None),
        ):
            found.update([] if value is None else [value] if isinstance(value, int) else value)
        return sorted(number for number in found if 0 <= number < self.size)


def read_vocabulary(
    name: str, folder: Path, config: PreTrainedConfig, size: int, base: OwnVocabulary | None = None
) -> OwnVocabulary:
    """One checkpoint's vocabulary: an embedding of `size` rows, and the tokenizer of its folder if it has one.

    An adapter, whose `base` is given, has the base's tokenizer and generation config where it brings none.
    """
    if base is not None and not (folder / "generation_config.json").exists():
        generation_config = base.generation_config
    elif (folder / "generation_config.json").exists():
        with foreign(f"{name}: generation_config.json cannot be read"):
            read_json(folder / "generation_config.json")
            generation_config = GenerationConfig.from_pretrained(folder)
    else:
        generation_config = GenerationConfig.from_model_config(config)
    drop_code_references(generation_config)
    special_ids = {key: getattr(config, key, None) for key in SPECIAL_IDS}
    check_token_ids(special_ids, f"{name}: config.json")
    check_token_ids(
        {key: getattr(generation_config, key, None) for key in SPECIAL_IDS}, f"{name}: generation_config.json"
    )
    tokenizer = find_tokenizer(name, folder)
    if tokenizer is None and base is not None:
        tokenizer, folder = base.tokenizer, base.tokenizer_folder
    return OwnVocabulary(name, size, tokenizer, folder, special_ids, generation_config)


def find_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase | None:
    """A folder's tokenizer; None where it has none, or one that cannot be loaded, which is said.

    Raises:
        ValueError: tokenizer_config.json is no JSON object, or a chat template's name cannot name a file.
    """
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_SOURCES):
        return None
    has_code = "auto_map" in read_config_file(folder / TOKENIZER_CONFIG)
    try:
        tokenizer = read_tokenizer(folder)
    except Exception as error:  # whatever a broken file or a missing backend makes of it
        code = " (its own code, auto_map, is never run here)" if has_code else ""
        logger.warning("the tokenizer of %s cannot be loaded%s: %s", name, code, one_line(error))
        return None
    if has_code:
        logger.warning(
            "the tokenizer of %s has code of its own (auto_map), which is never run here: %s reads its files, and may "
            "segment otherwise",
            name,
            type(tokenizer).__name__,
        )
    for template in named_templates(tokenizer):
        check_file_name(template, f"{name}: the chat template")
    return tokenizer


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer by Transformers' own classes, whatever code its files name."""
    if (file := folder / "tokenizer.json").exists():
        Tokenizer.from_file(str(file))  # an error where it is none: Transformers makes an empty tokenizer of that
    if "auto_map" not in read_config_file(folder / TOKENIZER_CONFIG):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with tempfile.TemporaryDirectory() as copy:
        copy_files(folder, Path(copy), (*TOKENIZER_FILES, "config.json"))
        return AutoTokenizer.from_pretrained(copy, trust_remote_code=False)


def named_templates(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, str]:
    """A tokenizer's chat templates by name; a single one is the default."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return {}
    return dict(template) if isinstance(template, Mapping) else {DEFAULT_TEMPLATE: template}


def other_templates(templates: Mapping[str, str]) -> list[str]:
    """Names of the chat templates that are not the default one, by another name or its own."""
    return [name for name, text in templates.items() if text != templates.get(DEFAULT_TEMPLATE)]
