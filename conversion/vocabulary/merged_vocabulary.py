"""The vocabulary of the merged model, and where the ids of the base and of every expert are in it.

A checkpoint's vocabulary is its embedding: `size` rows, of which its tokenizer names some as tokens; the others are
padding. The merged vocabulary's tokens are the channels of the merged embedding and head, and every checkpoint's own
ids are mapped to them:

- `base`: the channels are the base's ids. An expert's token goes to the base's token of the same string, its padding
  and added tokens otherwise to the base's padding or added token of the same id. What finds no channel is dropped, and
  named in a warning.
- `union`: first the base's tokens at their own ids, then every token that only experts have, in the experts' order,
  once for each string; then padding, once for each own id that an expert has no token at. Nothing is dropped.

Where the merged tokenizer cannot segment as an expert's own did, the report says so, measured on `SAMPLES`; the
expert's own tokenizer lies in `experts/<name>/` of the checkpoint.

Shapes: N experts, V channels of the merged vocabulary.
"""

import copy
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from conversion.io.model_files import same_file
from conversion.io.wording import first_names
from conversion.vocabulary.chat_markers import DerivedTurns, derive_turns
from conversion.vocabulary.own_vocabulary import DEFAULT_TEMPLATE, OwnVocabulary, named_templates, other_templates
from conversion.vocabulary.union_tokenizer import PIECE_MARK, SAMPLES, extended_tokenizer, sample_texts

logger = logging.getLogger(__name__)

MAX_NAMES = 20  # in a warning


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

    @property
    def chat_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """A copy of the merged model's tokenizer, with its chat templates."""
        tokenizer = copy.deepcopy(self.tokenizer)
        if tokenizer is not None:
            tokenizer.chat_template = self.chat_templates or None
        return tokenizer

    @cached_property
    def chat_turns(self) -> DerivedTurns:
        """The markers by which the merged model finds the user's turns in a prompt."""
        return derive_turns(self.chat_tokenizer)

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
                "own_chat_template": own.name in other_templates(self.chat_templates),
            }
        return {
            "source": self.source,
            "size": self.size,
            "base_size": self.base.size,
            "experts": experts,
            "chat_turns": self.chat_turns.record(),
        }

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
            first_names(tokens, MAX_NAMES, repr),
        )
    if padding:
        logger.warning("expert %r has %d padding rows beyond the base's, they are dropped", own.name, padding)
    if renamed := vocabulary.renamed(expert):
        logger.warning(
            "expert %r has %d tokens that the base's tokenizer calls otherwise, their rows are kept: %s",
            own.name,
            len(renamed),
            first_names(renamed, MAX_NAMES, repr),
        )
    if own.rowless_tokens:
        logger.warning(
            "expert %r has a tokenizer of more tokens than its embedding has rows (%d), left out are: %s",
            own.name,
            own.size,
            first_names(own.rowless_tokens, MAX_NAMES, repr),
        )
    if not vocabulary._mapped(vocabulary.channels[expert], own.eos_token_ids) and own.eos_token_ids:
        logger.warning("expert %r loses its end-of-sequence token: its answers end at the base's", own.name)


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
