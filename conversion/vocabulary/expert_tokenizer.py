"""How each expert reads a prompt and writes its answer, in ids of the merged vocabulary, and where its answer ends."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from conversion.io.foreign_files import foreign
from conversion.io.model_files import EXPERT_FOLDER, TOKENIZER_CONFIG
from conversion.vocabulary.own_vocabulary import DEFAULT_TEMPLATE, named_templates, read_tokenizer
from conversion.vocabulary.prompts import Prompt, render
from modeling_channel_merged.configuration_channel_merged import ChannelMergedConfig


class ExpertTokenizer:
    """How one expert reads and writes: its chat template and its own tokenizer, in ids of the merged vocabulary.

    Where the checkpoint does not keep the expert's own tokenizer, or it has no chat template, the merged one's serves.

    Args:
        folder: the merged checkpoint.
        merged: its tokenizer.
        name: the expert's.
    """

    def __init__(self, folder: Path, config: ChannelMergedConfig, merged: PreTrainedTokenizerBase, name: str):
        self.name = name
        self._merged = merged
        self._own: PreTrainedTokenizerBase | None = None
        own, channels = folder / EXPERT_FOLDER / name, config.vocabulary_channels(name)
        if channels is not None and (own / TOKENIZER_CONFIG).exists():
            with foreign(f"the tokenizer of {own}"):
                self._own = read_tokenizer(own)
            self._channels = channels
            self._own_ids = {channel: number for number, channel in enumerate(channels)}

    def encode(self, prompt: Prompt, chat: bool) -> list[int]:
        """Ids of a prompt, in the expert's chat template or as it stands.

        Raises:
            ValueError: the expert's own tokenizer makes a token that its embedding had no row for.
        """
        tokenizer = self._own or self._merged
        # A chat template writes the special tokens itself.
        numbers = tokenizer(self._render(prompt) if chat else prompt, add_special_tokens=not chat)["input_ids"]
        if self._own is None:
            return numbers
        if (highest := max(numbers, default=0)) >= len(self._channels):
            raise ValueError(
                f"expert {self.name!r} has no row for the token {self._own.convert_ids_to_tokens(highest)!r} of its "
                "tokenizer, leave it out of the prompt"
            )
        return [self._channels[number] for number in numbers]

    def decode(self, numbers: list[int]) -> str:
        """The text of an answer, without special tokens."""
        if self._own is None:
            return self._merged.decode(numbers, skip_special_tokens=True)
        own = [self._own_ids[number] for number in numbers if number in self._own_ids]
        return self._own.decode(own, skip_special_tokens=True)

    def _render(self, prompt: Prompt) -> str:
        if DEFAULT_TEMPLATE in named_templates(self._own):
            return render(self._own, prompt)
        return render(self._merged, prompt, self.name if self.name in named_templates(self._merged) else None)


def end_of_answer(model: Any, expert: str) -> set[int]:
    """The tokens that end an expert's answer."""
    ends = (model.config.expert_eos_token_ids or {}).get(expert, model.generation_config.eos_token_id)
    return {ends} if isinstance(ends, int) else {*(ends or ())}


def until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first that ends the answer; behind it is padding."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]
