"""Prompts on their way to token ids: read, rid of what is no text, in a chat template, in a batch for the router."""

import reprlib
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from conversion.io.foreign_files import foreign, read_json_lines
from conversion.vocabulary.own_vocabulary import read_tokenizer
from modeling_channel_merged.configuration_channel_merged import ChannelMergedConfig
from modeling_channel_merged.router_inputs import router_messages

Prompt = str | list[dict[str, Any]]  # a text, or chat messages


def read_conversations(file: Path) -> list[Prompt]:
    """Chat messages from a JSONL file with one object a line that holds them as `messages`, as router data has them.

    Raises:
        ValueError: a line is something else.
    """
    conversations = []
    for number, row in read_json_lines(file):
        messages = row.get("messages")
        try:
            whole = all(
                isinstance(message["role"], str) and isinstance(message["content"], str) for message in messages
            )
        except (KeyError, TypeError):
            whole = False
        if not whole or not messages:
            expected = '{"messages": [{"role": ..., "content": ...}, ...]}'
            raise ValueError(f"{file}, line {number}: expected {expected}, got {reprlib.repr(row)}")
        conversations.append(messages)
    return conversations


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with a padding token (the end-of-text token if it has none of its own)."""
    with foreign(f"the tokenizer of {folder}"):
        tokenizer = read_tokenizer(folder)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {folder} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def with_valid_text(prompt: Prompt) -> Prompt:
    """A prompt whose lone surrogates, which no tokenizer takes, are replacement characters (U+FFFD).

    They come from JSON and from bytes of a command line that are no UTF-8.
    """
    if isinstance(prompt, str):
        return prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return [{**message, "content": with_valid_text(message["content"])} for message in prompt]


def uses_chat_template(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], chat: bool | None) -> bool:
    """Whether prompts are put into a chat template: as asked for, or if there is one."""
    if chat and not tokenizer.chat_template:
        raise ValueError("the tokenizer of this checkpoint has no chat template: leave out --chat")
    chat = bool(tokenizer.chat_template) if chat is None else chat
    if not chat and not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("messages need a chat template, and none is used: give texts instead")
    return chat


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template: str | None = None, *, generation: bool = True
) -> str:
    """The text of a prompt in a tokenizer's default chat template, or the one with the name `template`.

    Args:
        generation: end where an answer begins.

    Raises:
        ValueError: the template does not take these messages.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=generation, tokenize=False
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        name = "default chat template" if template is None else f"chat template {template!r}"
        raise ValueError(f"the {name} does not take messages of the roles {roles}: {error}") from error


def router_queries(prompts: list[Prompt], config: ChannelMergedConfig) -> list[Prompt]:
    """What the router reads of each prompt: a text as it stands, of a conversation what the config says."""
    queries = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            queries.append(prompt if isinstance(prompt, str) else router_messages(prompt, config.router["context"]))
        except ValueError as error:
            raise ValueError(f"prompt {number} of {len(prompts)}: {error}") from None
    return queries


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], chat: bool) -> BatchEncoding:
    """Left-padded `input_ids` and `attention_mask`, both (B, T) int64, as the router reads them."""
    # A chat template writes the special tokens itself.
    return tokenizer(
        [render(tokenizer, prompt) for prompt in prompts] if chat else prompts,
        padding=True,
        padding_side="left",
        add_special_tokens=not chat,
        return_token_type_ids=False,
        return_tensors="pt",
    )
