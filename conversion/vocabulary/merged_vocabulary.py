"""The vocabularies of the base and the experts, and the one that the merged model has.

A checkpoint's vocabulary is its embedding: `size` rows, of which its tokenizer names some as tokens; the others are
padding. The merged vocabulary's tokens are the channels of the merged embedding and head, and every checkpoint's own
ids are mapped to them:

- `base`: the channels are the base's ids. An expert's token goes to the base's token of the same string, its padding
  and added tokens otherwise to the base's padding or added token of the same id. What finds no channel is dropped, and
  named in a warning.
- `union`: first the base's tokens at their own ids, then every token that only experts have, in the experts' order,
  once for each string; then padding, once for each own id that an expert has no token at. Nothing is dropped.

The tokenizer of a union is the base's with the experts' added tokens. Pieces of an expert's own segmentation (a model
that was extended by another language) are in it too, so that every id decodes; but they never match in a text, or
other experts would be given tokens that they do not know. Where one tokenizer cannot segment as an expert's own did,
the report says so, measured on `SAMPLES`; the expert's own tokenizer lies in `experts/<name>/` of the checkpoint.

Shapes: N experts, V channels of the merged vocabulary.
"""

import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, decoders
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from conversion.channels.row_layout import RowLayout, layout_rows
from conversion.io.foreign_files import check_token_ids, foreign, one_line, read_json
from conversion.io.model_files import (
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    check_file_name,
    copy_files,
    drop_code_references,
    read_config_file,
    same_file,
    write_json,
)

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

# A private character that no text has in front of a piece; the decoder takes it away again.
PIECE_MARK = "\uf8ff"

SAMPLES = (
    "Hello, how are you today?",
    "The quick brown fox jumps over the lazy dog.",
    "What is 12.5 % of 1,234,567? Let x = 3y - 7; solve for y.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    '\t{"key": [1, 2, null], "nested": {"empty": ""}}',
    "  two spaces before, and three   between; a line\r\nand another\n\n\nfar below",
    "https://example.org/a/path?query=1&other=two#part",
    "请用中文介绍一下人工智能的历史。",
    "日本語の文章もあります。",
    "Привет, как дела?",
    "مرحبا بالعالم",
    "À l'œuvre on connaît l'artisan; Straße, naïve, coöperate",
    "∑ x² ≥ ∫ f(t) dt → ∞",
    "🙂👩‍👩‍👧 emoji",
)


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
    tokenizer = load_tokenizer(name, folder)
    if tokenizer is None and base is not None:
        tokenizer, folder = base.tokenizer, base.tokenizer_folder
    return OwnVocabulary(name, size, tokenizer, folder, special_ids, generation_config)


def load_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase | None:
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
    if "auto_map" not in read_config_file(folder / TOKENIZER_CONFIG):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with tempfile.TemporaryDirectory() as copy:
        copy_files(folder, Path(copy), (*TOKENIZER_FILES, "config.json"))
        return AutoTokenizer.from_pretrained(copy, trust_remote_code=False)


@dataclass(frozen=True)
class MergedVocabulary:
    """The merged model's vocabulary, and where every checkpoint's own ids are in it."""

    source: str  # "base" or "union"
    size: int  # V
    base: OwnVocabulary
    experts: tuple[OwnVocabulary, ...]
    base_channels: torch.LongTensor  # (base.size,) the channel of each of the base's ids, -1: none
    channels: tuple[torch.LongTensor, ...]  # for each expert (its size,), likewise
    additions: tuple[str, ...]  # tokens that the base's tokenizer lacks, at the channels after its own

    @cached_property
    def present(self) -> torch.BoolTensor:
        """Whether each expert has a row for each channel: (N, V)."""
        return torch.stack([inverse(channels, self.size) >= 0 for channels in self.channels])

    @cached_property
    def is_identity(self) -> bool:
        """Whether every checkpoint's ids are the merged ones, all of them."""
        same = torch.arange(self.size)
        return all(torch.equal(channels, same) for channels in (self.base_channels, *self.channels))

    @property
    def missing(self) -> list[int]:
        """How many channels each expert has no row for."""
        return (~self.present).sum(1).tolist()

    def dropped(self, expert: int) -> tuple[list[str], int]:
        """Tokens of an expert that have no channel, and how many of its padding rows have none."""
        own = self.experts[expert]
        numbers = (self.channels[expert] < 0).nonzero()[:, 0].tolist()
        tokens = [own.tokens[number] for number in numbers if number in own.tokens]
        return tokens, len(numbers) - len(tokens)

    def renamed(self, expert: int) -> list[str]:
        """Tokens of an expert whose row is kept at a channel that the merged tokenizer calls otherwise."""
        if self.source == "union":
            return []
        own, channels = self.experts[expert], self.channels[expert].tolist()
        return [
            token
            for number, token in own.tokens.items()
            if number < own.size and channels[number] >= 0 and self.base.tokens.get(channels[number]) != token
        ]

    def eos_token_ids(self, expert: int) -> list[int]:
        """The channels at which an expert's answer ends; the base's where none of its own is left."""
        own = sorted(set(self._mapped(self.channels[expert], self.experts[expert].eos_token_ids)))
        return own or sorted(set(self._mapped(self.base_channels, self.base.eos_token_ids)))

    @property
    def all_eos_token_ids(self) -> list[int]:
        return sorted({number for expert in range(len(self.experts)) for number in self.eos_token_ids(expert)})

    def expert_eos_token_ids(self) -> dict[str, list[int]] | None:
        """Every expert's end-of-sequence tokens by its name; None where all have the same."""
        ends = {own.name: self.eos_token_ids(expert) for expert, own in enumerate(self.experts)}
        return ends if len(set(map(tuple, ends.values()))) > 1 else None

    def expert_records(self) -> dict[str, dict[str, Any]]:
        """What config.json says of every expert's own vocabulary, which its export restores.

        An expert that lost ids in the middle of its vocabulary has no record.
        """
        records = {}
        for own, channels in zip(self.experts, self.channels, strict=True):
            kept = channels[channels >= 0]
            if torch.equal(channels[: len(kept)], kept):
                special = {key: value for key, value in own.special_ids.items() if _all_below(value, len(kept))}
                records[own.name] = {"size": len(kept), "runs": channel_runs(kept), **special}
        return records

    def base_channel(self, value: int | list[int] | None) -> int | list[int] | None:
        """One of the base's special tokens, or several, as channels; None for those that are none."""
        if isinstance(value, int):
            return next(iter(self._mapped(self.base_channels, [value])), None)
        return None if value is None else self._mapped(self.base_channels, value)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The merged model's tokenizer; None where the base has none."""
        if not self.additions:
            return self.base.tokenizer
        return extended_tokenizer(self.base.tokenizer, self._tokens_to_add(), max(self.base.tokens) + 1)

    def _tokens_to_add(self) -> list[AddedToken]:
        """The additions as the first expert that has them writes them."""
        tokens = []
        for addition in self.additions:
            own = next(own for own in self.experts if own.has(addition))
            number = own.ids[addition]
            piece = AddedToken(PIECE_MARK + addition, special=False, normalized=False)
            tokens.append(piece if own.is_piece(number) else own.added_tokens[number])
        return tokens

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """Chat templates by name: one for every expert, and the default; none where nobody has any.

        The default is the base's, else that of the first expert that has one; experts without a template get it too.
        Further named templates of a checkpoint keep their name, an expert's with its own name before it.
        """
        special = {} if self.tokenizer is None else self.tokenizer.special_tokens_map
        base = named_templates(self.base.tokenizer)
        own = [
            {
                key: with_special_tokens(text, expert.tokenizer.special_tokens_map, special)
                for key, text in named_templates(expert.tokenizer).items()
            }
            for expert in self.experts
        ]
        default = next((named[DEFAULT_TEMPLATE] for named in (base, *own) if DEFAULT_TEMPLATE in named), None)
        if default is None:
            return {}
        templates = {**base, DEFAULT_TEMPLATE: default}
        for expert, named in zip(self.experts, own, strict=True):
            if expert.name in {*base, DEFAULT_TEMPLATE}:
                raise ValueError(
                    f"expert {expert.name!r} has the name of a chat template of the base "
                    f"({', '.join(sorted({*base, DEFAULT_TEMPLATE}))}): give it another name"
                )
            named = {DEFAULT_TEMPLATE: default, **named}
            for key, text in named.items():
                name = expert.name if key == DEFAULT_TEMPLATE else f"{expert.name}-{key}"
                if (other := same_file(name, templates)) is not None:
                    raise ValueError(
                        f"expert {expert.name!r}: its chat template would be {name!r}, and {other!r} is there "
                        "already: give the expert another name"
                    )
                templates[name] = text
        return templates

    def report(self) -> dict[str, Any]:
        """What became of every expert's vocabulary, and whether the merged tokenizer encodes as its own did."""
        experts = {}
        for number, own in enumerate(self.experts):
            tokens, padding = self.dropped(number)
            only = self.present[number] & (self.present.sum(0) == 1)
            experts[own.name] = {
                "size": own.size,
                "tokens": len(own.token_ids),
                "channels_that_only_it_has": int(only.sum()),
                "channels_that_it_lacks": self.missing[number],
                "dropped_tokens": tokens,
                "dropped_padding_rows": padding,
                "renamed_tokens": self.renamed(number),
                "tokens_without_row": own.rowless_tokens,
                "eos_token_ids": self.eos_token_ids(number),
                "encoding": self._compare_encodings(number),
            }
        return {"source": self.source, "size": self.size, "base_size": self.base.size, "experts": experts}

    def _compare_encodings(self, expert: int) -> dict[str, Any] | None:
        """The merged tokenizer against the expert's own one on sample texts; None without an own one."""
        own = self.experts[expert]
        if own.tokenizer is None or self.tokenizer is None:
            return None
        texts = list(sample_texts(own))
        pairs = [self._encodings(expert, text) for text in texts]
        different = [(text, *pair) for text, pair in zip(texts, pairs, strict=True) if pair[0] != pair[1]]
        whole = self._encodings(expert, SAMPLES[0], add_special_tokens=True)
        additions = zip(self.additions, self._tokens_to_add(), strict=True)
        first = None
        if different:
            text, theirs, ours = different[0]
            first = {"text": text, "own": theirs, "merged": ours}
        return {
            "samples": len(texts),
            "same": len(texts) - len(different),
            "first_difference": first,
            "same_with_special_tokens": whole[0] == whole[1],
            "foreign_tokens": [name for name, token in additions if name == token.content and not own.has(name)],
        }

    def _encodings(self, expert: int, text: str, add_special_tokens: bool = False) -> tuple[list[int], list[int]]:
        """Channels of a text as the expert's own tokenizer has it (-1: none), and as the merged one."""
        channels, own = self.channels[expert], self.experts[expert].tokenizer
        numbers = own.encode(text, add_special_tokens=add_special_tokens)
        mapped = [int(channels[number]) if number < len(channels) else -1 for number in numbers]
        return mapped, self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    @staticmethod
    def _mapped(channels: torch.LongTensor, numbers: Iterable[int]) -> list[int]:
        """Channels of own ids; those that have none are left out."""
        found = [int(channels[number]) for number in numbers if 0 <= number < len(channels)]
        return [channel for channel in found if channel >= 0]


def merge_vocabularies(source: str, base: OwnVocabulary, experts: Iterable[OwnVocabulary]) -> MergedVocabulary:
    """The merged vocabulary by `tokenizer_source`, `base` or `union`; warns of everything that does not fit in.

    Raises:
        ValueError: a union without a fast tokenizer of the base, or whose tokens it cannot be given, or an expert with
            the name of one of the base's chat templates.
    """
    experts = tuple(experts)
    if source == "union":
        experts = tuple(_with_a_tokenizer(own, base) for own in experts)
        vocabulary = _union(base, experts)
    else:
        channels = tuple(_by_base(base, own) for own in experts)
        vocabulary = MergedVocabulary(source, base.size, base, experts, torch.arange(base.size), channels, ())
    for expert in range(len(experts)):
        _warn(vocabulary, expert)
    _ = vocabulary.tokenizer, vocabulary.chat_templates  # what is wrong with them is told now
    return vocabulary


def _with_a_tokenizer(own: OwnVocabulary, base: OwnVocabulary) -> OwnVocabulary:
    """A union needs every token's name: an expert without a tokenizer is taken to have the base's."""
    if base.tokenizer is None or not base.tokenizer.is_fast:
        raise ValueError("tokenizer_source 'union' needs a fast tokenizer of the base model, which has none")
    if own.tokenizer is None:
        logger.warning("expert %r has no tokenizer: it is taken to use the base's", own.name)
        return replace(own, tokenizer=base.tokenizer, tokenizer_folder=base.tokenizer_folder)
    return own


def _by_base(base: OwnVocabulary, own: OwnVocabulary) -> torch.LongTensor:
    """The base's id of each of an expert's ids: (own.size,), -1 where there is none."""
    channels = [-1] * own.size
    if base.tokenizer is None or own.tokenizer is None:
        shared = min(base.size, own.size)
        channels[:shared] = range(shared)
        return torch.tensor(channels)
    for number, token in own.tokens.items():
        if number < own.size and base.has(token):
            channels[number] = base.ids[token]
    taken = set(channels)
    for number in range(min(base.size, own.size)):
        if channels[number] < 0 and number not in taken and not (own.is_piece(number) or base.is_piece(number)):
            channels[number] = number
    return torch.tensor(channels)


def _union(base: OwnVocabulary, experts: tuple[OwnVocabulary, ...]) -> MergedVocabulary:
    """All tokens of all checkpoints: the base's at their ids, then the experts', then padding."""
    num_base_tokens = max(base.tokens) + 1
    tokens, additions = dict(base.ids), []
    for own in experts:
        for number, token in own.tokens.items():
            if number < own.size and token not in tokens:
                tokens[token] = num_base_tokens + len(additions)
                additions.append(token)
    holes = {number: number for number in range(num_base_tokens) if number not in base.tokens}
    unnamed = {number for own in experts for number in range(own.size) if number not in own.tokens} - holes.keys()
    padding = holes | {
        number: place for place, number in enumerate(sorted(unnamed), start=num_base_tokens + len(additions))
    }
    size = num_base_tokens + len(additions) + len(unnamed)

    def channels_of(own: OwnVocabulary) -> torch.LongTensor:
        found = (
            tokens[own.tokens[number]] if number in own.tokens else padding.get(number, -1)
            for number in range(own.size)
        )
        return torch.tensor(list(found), dtype=torch.int64)

    return MergedVocabulary(
        "union", size, base, experts, channels_of(base), tuple(map(channels_of, experts)), tuple(additions)
    )


def _all_below(value: int | list[int] | None, size: int) -> bool:
    """Whether a special token's id, or all of several, are in a vocabulary; a negative one stands for none."""
    return value is not None and all(number < size for number in ([value] if isinstance(value, int) else value))


def _warn(vocabulary: MergedVocabulary, expert: int) -> None:
    own = vocabulary.experts[expert]
    tokens, padding = vocabulary.dropped(expert)
    if tokens:
        logger.warning(
            "expert %r has %d tokens that the base does not have, their rows are dropped (tokenizer_source: base): %s",
            own.name,
            len(tokens),
            some(tokens),
        )
    if padding:
        logger.warning("expert %r has %d padding rows beyond the base's, they are dropped", own.name, padding)
    if renamed := vocabulary.renamed(expert):
        logger.warning(
            "expert %r has %d tokens that the base's tokenizer calls otherwise, their rows are kept: %s",
            own.name,
            len(renamed),
            some(renamed),
        )
    if own.rowless_tokens:
        logger.warning(
            "expert %r has a tokenizer of more tokens than its embedding has rows (%d), left out are: %s",
            own.name,
            own.size,
            some(own.rowless_tokens),
        )
    if not vocabulary._mapped(vocabulary.channels[expert], own.eos_token_ids) and own.eos_token_ids:
        logger.warning("expert %r loses its end-of-sequence token: its answers end at the base's", own.name)


def extended_tokenizer(base: PreTrainedTokenizerBase, tokens: list[AddedToken], first: int) -> PreTrainedTokenizerBase:
    """The base's tokenizer with further tokens, the first at id `first`, as it will be loaded from its files.

    Raises:
        ValueError: a token would get another id than the next one, or a text without it would be encoded otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        # Some classes build their own pipeline and forget what was changed in tokenizer.json; this one loads it.
        file = Path(folder) / TOKENIZER_CONFIG
        write_json(file, {**read_config_file(file), "tokenizer_class": "PreTrainedTokenizerFast"})
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if any(token.content.startswith(PIECE_MARK) for token in tokens):
            backend = tokenizer.backend_tokenizer
            if backend.decoder is None:
                raise ValueError(
                    "the base's tokenizer has no decoder, so the pieces of an expert with another segmentation cannot "
                    "be decoded: use tokenizer_source 'base'"
                )
            backend.decoder = decoders.Sequence([decoders.Replace(PIECE_MARK, ""), backend.decoder])
        tokenizer.add_tokens(tokens)
        tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    for number, token in enumerate(tokens, start=first):
        if tokenizer.convert_tokens_to_ids(token.content) != number:
            raise ValueError(
                f"the base's tokenizer gives the token {token.content!r} the id "
                f"{tokenizer.convert_tokens_to_ids(token.content)}, expected {number}: its ids have gaps that it fills"
            )
    for text in SAMPLES:
        if not any(token.content in text for token in tokens) and tokenizer.encode(text) != base.encode(text):
            raise ValueError(f"the base's tokenizer ({type(base).__name__}) cannot be extended: it changes {text!r}")
    return tokenizer


def sample_texts(own: OwnVocabulary, max_added_tokens: int = 256) -> Iterator[str]:
    """Texts on which an expert's tokenizer is compared: general ones, its added tokens, a rendered conversation."""
    yield from SAMPLES
    for token in list(own.added_tokens.values())[-max_added_tokens:]:
        yield f"one{token.content}two {token.content} three"
    for template in named_templates(own.tokenizer).values():
        try:
            messages = [{"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "42."}]
            yield own.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception:  # a template may refuse a conversation that it is not for
            continue


def named_templates(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, str]:
    """A tokenizer's chat templates by name; a single one is the default."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return {}
    return dict(template) if isinstance(template, Mapping) else {DEFAULT_TEMPLATE: template}


def with_special_tokens(template: str, own: Mapping[str, Any], merged: Mapping[str, Any]) -> str:
    """A chat template that writes its own special tokens (`{{ eos_token }}`) also under another tokenizer."""
    settings = []
    for name in sorted(own.keys() | merged.keys()):
        value = own.get(name, "")
        if value != merged.get(name) and isinstance(value, str) and re.search(rf"\b{name}\b", template):
            # The plus keeps a line break at the template's beginning.
            settings.append(f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} +%}}")
    return "".join(settings) + template


def inverse(channels: torch.LongTensor, size: int) -> torch.LongTensor:
    """The own id of each of `size` channels, -1 where there is none, from the channel of each own id."""
    numbers = torch.full((size,), -1)
    own = (channels >= 0).nonzero()[:, 0]
    numbers[channels[own]] = own
    return numbers


def channel_runs(channels: torch.LongTensor) -> list[list[int]]:
    """Channels of own ids 0, 1, ... as runs of consecutive channels: [first channel, length]."""
    edges = [0, *((channels.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(channels)]
    return [[int(channels[a]), b - a] for a, b in pairwise(edges) if b > a]


def layout_present(labels: torch.Tensor, present: torch.Tensor) -> RowLayout:
    """`layout_rows` of channels that not all experts have.

    Args:
        labels: (N, O) groups.
        present: (N, O) bool; labels elsewhere mean nothing.

    Returns:
        The layout; `channel_index` is -1 where an expert has no such channel.
    """
    experts = torch.arange(len(labels))[:, None]
    layout = layout_rows(torch.where(present, labels, len(labels) + experts))
    lead = (layout.row_owners & -layout.row_owners).double().log2().long()  # the lowest owner
    kept = present[lead, layout.row_channel]
    number = kept.cumsum(0) - 1
    index = torch.where(present, number[layout.channel_index.long()], -1)
    return RowLayout(index.to(torch.int32), layout.row_channel[kept], layout.row_owners[kept])


def fill_missing_rows(experts: list[torch.Tensor], base: torch.Tensor, present: torch.Tensor) -> None:
    """Give experts that lack a channel, in place, the row of the first that has it, or the base's if none has.

    As a copy it makes no difference to the channel's number of distinct rows, and with weight 0 none to its groups.

    Args:
        experts: N tensors (C, *).
        base: (C, *).
        present: (N, C) bool.
    """
    first = present.int().argmax(0)
    nobody = ~present.any(0)
    for rows, has in zip(experts, present, strict=True):
        for source, other in enumerate(experts):
            wanted = ~has & (first == source) & ~nobody
            if wanted.any():
                rows[wanted] = other[wanted].to(rows.dtype)
        if nobody.any():
            rows[nobody] = base[nobody].to(rows.dtype)


def some(names: list[str], limit: int = 20) -> str:
    """The first names, quoted, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
