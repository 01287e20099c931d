"""How each expert reads a prompt and writes its answer, in ids of the merged vocabulary, and where its answer ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from conversion.io.foreign_files import foreign
from conversion.io.model_files import EXPERT_FOLDER, TOKENIZER_CONFIG
from conversion.vocabulary.merged_vocabulary import MergedVocabulary
from conversion.vocabulary.own_vocabulary import DEFAULT_TEMPLATE, named_templates, read_tokenizer
from conversion.vocabulary.prompts import Prompt, render
from modeling_channel_merged.configuration_channel_merged import ChannelMergedConfig


class ExpertTokenizer:
    """How one expert reads and writes: its chat template and its own tokenizer, in ids of the merged vocabulary.

    Where the checkpoint does not keep the expert's own tokenizer, or it has no chat template, the merged one's serves.

    Args:
        name: the expert's.
        merged: the merged tokenizer.
        own: the expert's own one; None: the merged one serves.
        channels: with `own`, the merged vocabulary's id of each of its ids that has a row.
    """

    def __init__(
        self,
        name: str,
        merged: PreTrainedTokenizerBase,
        own: PreTrainedTokenizerBase | None = None,
        channels: list[int] | None = None,
    ):
        self.name = name
        self._merged = merged
        self._own = own
        self._channels = channels or []
        self._own_ids = {channel: number for number, channel in enumerate(self._channels)}

    @classmethod
    def of_checkpoint(
        cls, folder: Path, config: ChannelMergedConfig, merged: PreTrainedTokenizerBase, name: str
    ) -> "ExpertTokenizer":
        """As a merged checkpoint serves an expert: with its own tokenizer where the checkpoint keeps that."""
        own, channels = folder / EXPERT_FOLDER / name, config.vocabulary_channels(name)
        if channels is None or not (own / TOKENIZER_CONFIG).exists():
            return cls(name, merged)
        with foreign(f"the tokenizer of {own}"):
            return cls(name, merged, read_tokenizer(own), channels)

    @classmethod
    def of_vocabulary(cls, vocabulary: MergedVocabulary, expert: int) -> "ExpertTokenizer":
        """As the merged checkpoint will serve an expert that is not merged yet.

        Raises:
            ValueError: the base has no tokenizer, and so will the merged checkpoint.
        """
        if vocabulary.tokenizer is None:
            raise ValueError("texts need a tokenizer, and the base model has none")
        own, record = vocabulary.experts[expert], vocabulary.expert_records().get(vocabulary.experts[expert].name)
        merged = vocabulary.chat_tokenizer
        if own.tokenizer is None or record is None or vocabulary.dropped(expert)[0]:
            return cls(own.name, merged)
        channels = vocabulary.channels[expert]
        return cls(own.name, merged, own.tokenizer, channels[channels >= 0].tolist())

    def encode(self, prompt: Prompt, chat: bool) -> list[int]:
        """Ids of a prompt, in the expert's chat template or as it stands.

        Raises:
            ValueError: the expert's own tokenizer makes a token that its embedding had no row for, or its chat
                template has no place for a system message.
        """
        if chat and not isinstance(prompt, str):
            self._check_system_messages(prompt)
        return self._to_channels(self._tokenize(self._render(prompt) if chat else prompt, chat))

    def encode_answer(self, prompt: Prompt, answer: str, chat: bool) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of the answer that follows it; errors as in `encode`.

        In a chat template the white space between the two is the template's, unless the answer begins with its own.
        Both are tokenized as one text where the prompt's tokens are the same in it.
        """
        text = self._render(prompt) if chat else prompt
        if chat and not answer[:1].isspace():
            answer = self._lead(prompt, text, answer) + answer
        start, whole = self._tokenize(text, chat), self._tokenize(text + answer, chat)
        if whole[: len(start)] == start:
            own = whole[len(start) :]
        else:
            own = (self._own or self._merged)(answer, add_special_tokens=False)["input_ids"]
        return self._to_channels(start), self._to_channels(own)

    def _tokenize(self, text: str, chat: bool) -> list[int]:
        # A chat template writes the special tokens itself.
        return (self._own or self._merged)(text, add_special_tokens=not chat, verbose=False)["input_ids"]

    def _to_channels(self, numbers: list[int]) -> list[int]:
        """The merged vocabulary's ids of what the tokenizer gave."""
        if self._own is None:
            return numbers
        if (highest := max(numbers, default=0)) >= len(self._channels):
            raise ValueError(
                f"expert {self.name!r} has no row for the token {self._own.convert_ids_to_tokens(highest)!r} of its "
                "tokenizer, leave it out of the prompt"
            )
        return [self._channels[number] for number in numbers]

    def _check_system_messages(self, messages: list[dict[str, Any]]):
        """ValueError where the chat template refuses the system messages, or leaves them out without a word."""
        others = [message for message in messages if message["role"] != "system"]
        if not others or len(others) == len(messages):
            return
        without, reason = self._render(others), "it leaves system messages out"
        try:
            if self._render(messages) != without:
                return
        except ValueError as error:
            reason = str(error)
        raise ValueError(
            f"the chat template of expert {self.name!r} has no system role ({reason}): put what the system message "
            "says into the user's"
        )

    def _lead(self, prompt: Prompt, text: str, answer: str) -> str:
        """What white space the template has between a prompt, rendered as `text`, and an answer."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            whole = self._render([*messages, {"role": "assistant", "content": answer}], generation=False)
        except ValueError:  # a template of prompts alone
            return ""
        rest = whole.removeprefix(text)
        begins = whole.startswith(text) and rest.lstrip().startswith(answer)
        return rest[: len(rest) - len(rest.lstrip())] if begins else ""

    def decode(self, numbers: list[int]) -> str:
        """The text of an answer, without special tokens."""
        if self._own is None:
            return self._merged.decode(numbers, skip_special_tokens=True)
        own = [self._own_ids[number] for number in numbers if number in self._own_ids]
        return self._own.decode(own, skip_special_tokens=True)

    def decode_stream(self) -> Callable[[int], str]:
        """A function that takes an answer's tokens one after the other and gives the text that each completes.

        What it leaves out, such as half a character at the end, is in `decode` of all tokens.
        """
        tokenizer = getattr(self._own or self._merged, "backend_tokenizer", None)
        if tokenizer is None:  # one that is written in Python: it decodes whole answers only
            return lambda number: ""
        stream = DecodeStream(skip_special_tokens=True)

        def step(number: int) -> str:
            own = number if self._own is None else self._own_ids.get(number)
            return "" if own is None else stream.step(tokenizer, own) or ""

        return step

    def _render(self, prompt: Prompt, generation: bool = True) -> str:
        if DEFAULT_TEMPLATE in named_templates(self._own):
            return render(self._own, prompt, generation=generation)
        template = self.name if self.name in named_templates(self._merged) else None
        return render(self._merged, prompt, template, generation=generation)


def end_of_answer(model: Any, expert: str) -> set[int]:
    """The tokens that end an expert's answer."""
    ends = (model.config.expert_eos_token_ids or {}).get(expert, model.generation_config.eos_token_id)
    return {ends} if isinstance(ends, int) else {*(ends or ())}


def until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first that ends the answer; behind it is padding."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]
