"""What the router reads of a query: which messages of a conversation, and which tokens of a long prompt."""

from typing import Any

import torch

from .chat_turns import ChatTurns
from .configuration_channel_merged import CONTEXTS


def router_messages(messages: list[dict[str, Any]], context: str) -> list[dict[str, str]]:
    """The chat messages that the router reads: one message of the user, to be put into the chat template.

    System prompts, answers and tool messages never decide the expert.

    Args:
        messages: a conversation, `{"role": ..., "content": ...}` each.
        context: "last_user_turn", or "conversation" for all turns of the user, as paragraphs of one message (many chat
            templates refuse two messages of the user in a row).

    Raises:
        ValueError: an unknown context, no message of the user, or one whose content is not text.
    """
    if context not in CONTEXTS:
        raise ValueError(f"router.context is {context!r}, expected one of {CONTEXTS}")
    turns = [message.get("content") for message in messages if message.get("role") == "user"]
    if not turns:
        raise ValueError("messages hold no query: none has the role 'user'")
    if context == "last_user_turn":
        turns = turns[-1:]
    for turn in turns:
        if not isinstance(turn, str):
            raise ValueError(f"a message's content is {turn!r}, expected text")
    return [{"role": "user", "content": "\n\n".join(turns)}]


def check_router_mask(attention_mask: Any, inputs: torch.Tensor):
    """Raise ValueError if a mask does not say which of the (B, T, ...) `inputs` are tokens and which are padding."""
    if isinstance(attention_mask, torch.Tensor) and attention_mask.shape == inputs.shape[:2]:
        return
    shape = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
    raise ValueError(
        f"attention_mask is {shape}, but routing reads one of shape {tuple(inputs.shape[:2])}, 1 for tokens and 0 for "
        "padding: give such a mask, or the experts as expert_index"
    )


def check_one_query_a_row(position_ids: torch.LongTensor | None, attention_mask: torch.Tensor | None):
    """Raise ValueError if the positions of a row's tokens begin anew: several queries, which one expert cannot answer.

    Args:
        position_ids: (B or 1, T) int64; attention_mask: (B, T), 0 for padding, whose positions say nothing.
    """
    if position_ids is None or position_ids.dim() != 2:
        return
    restarts = position_ids[:, 1:] < position_ids[:, :-1]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.shape[-1:] == position_ids.shape[-1:]:
        if attention_mask.dim() == 2:
            tokens = attention_mask.to(position_ids.device) != 0
            restarts = restarts & tokens[:, 1:] & tokens[:, :-1]
    if restarts.any():
        raise ValueError(
            "position_ids begin anew within a row: several queries are packed into it, which are not routed one by "
            "one; give the experts as expert_index"
        )


def last_turns(
    input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, turns: ChatTurns, context: str
) -> tuple[torch.LongTensor, torch.Tensor | None]:
    """Leave of every prompt that is a chat what the router reads of it, in the frame that the router knows.

    A prompt without a turn of the user stays whole.

    Args:
        input_ids: (B, T) int64; attention_mask: (B, T), padding on any side, or None.
        context: "last_user_turn" or "conversation".

    Returns:
        Both, unchanged where no prompt is a chat, otherwise (B, S), padded on the right.
    """
    masks = [None] * len(input_ids) if attention_mask is None else attention_mask.tolist()
    prompts = [
        ids if mask is None else [number for number, is_token in zip(ids, mask) if is_token]
        for ids, mask in zip(input_ids.tolist(), masks)
    ]
    queries = [turns.router_query(ids, context) for ids in prompts]
    if all(query is None for query in queries):
        return input_ids, attention_mask
    rows = [ids if query is None else query for ids, query in zip(prompts, queries)]
    length = max(map(len, rows))
    ids = [[*row, *[0] * (length - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return input_ids.new_tensor(ids), torch.tensor(mask, device=input_ids.device)


def shorten(
    input_ids: torch.LongTensor | None,
    attention_mask: torch.Tensor,
    inputs_embeds: torch.FloatTensor | None,
    max_tokens: int,
) -> tuple[torch.LongTensor | None, torch.Tensor, torch.FloatTensor | None]:
    """Keep the first and the last half of `max_tokens` tokens of every longer query; the middle is left out.

    Padding on either side changes nothing. Where max_tokens is odd, the first half has one more.

    Args:
        input_ids: (B, T) int64, or None with inputs_embeds (B, T, H).
        attention_mask: (B, T), 1 for tokens and 0 for padding.

    Returns:
        The same three, unchanged for T <= max_tokens, otherwise of max_tokens columns, padded on the right.
    """
    if attention_mask.shape[1] <= max_tokens:
        return input_ids, attention_mask, inputs_embeds
    tokens = attention_mask != 0
    number = tokens.cumsum(-1)  # from 1
    last = number[:, -1:] - max_tokens // 2
    kept = tokens & ((number <= max_tokens - max_tokens // 2) | (number > last))
    columns = kept.int().argsort(dim=-1, descending=True, stable=True)[:, :max_tokens]
    attention_mask = kept.gather(1, columns).to(attention_mask.dtype)
    if input_ids is not None:
        input_ids = input_ids.gather(1, columns)
    if inputs_embeds is not None:
        inputs_embeds = inputs_embeds.gather(1, columns[..., None].expand(-1, -1, inputs_embeds.shape[-1]))
    return input_ids, attention_mask, inputs_embeds
