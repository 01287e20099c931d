"""What the router reads: messages of the user only, and the two ends of a long query."""

import pytest
import torch

from modeling_channel_merged.router_inputs import router_messages, shorten

CONVERSATION = [
    {"role": "system", "content": "You write code."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And twice that?"},
    {"role": "tool", "content": "10"},
    {"role": "assistant", "content": "10"},
]


@pytest.mark.parametrize(
    ("context", "expected"),
    [("last_user_turn", "And twice that?"), ("conversation", "What is 2 + 3?\n\nAnd twice that?")],
)
def test_only_the_user_decides(context, expected):
    """Whatever system prompts, answers and tools say; and one message, as templates want turns to alternate."""
    assert router_messages(CONVERSATION, context) == [{"role": "user", "content": expected}]
    silent = [message for message in CONVERSATION if message["role"] == "user"]
    assert router_messages(silent, context) == router_messages(CONVERSATION, context)


@pytest.mark.parametrize(
    ("messages", "context", "message"),
    [
        ([], "conversation", "messages hold no query: none has the role 'user'"),
        (CONVERSATION[:1], "last_user_turn", "messages hold no query"),
        (CONVERSATION, "everything", "router.context is 'everything', expected one of"),
        ([{"role": "user", "content": None}], "last_user_turn", "content is None, expected text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "conversation", "expected text"),
        ([{"role": "user"}], "last_user_turn", "content is None"),
    ],
)
def test_messages_without_a_query(messages, context, message):
    with pytest.raises(ValueError, match=message):
        router_messages(messages, context)


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 8, 11])
def test_the_ends_of_a_query_are_kept(max_tokens):
    """Against plain lists: any number of tokens, padding on both sides and inside."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, 99, (40, 12), generator=generator)
    mask = (torch.rand(40, 12, generator=generator) < torch.rand(40, 1, generator=generator)).long()
    mask[0], mask[1] = 0, 1
    embeds = torch.randn(40, 12, 3, generator=generator)
    short_ids, short_mask, short_embeds = shorten(input_ids, mask, embeds, max_tokens)
    assert short_ids.shape == short_mask.shape == (40, max_tokens) and short_mask.dtype == mask.dtype
    for row in range(40):
        tokens = [place for place in range(12) if mask[row, place]]
        if len(tokens) > max_tokens:
            tail = max_tokens // 2
            tokens = tokens[: max_tokens - tail] + tokens[len(tokens) - tail :]
        kept = short_mask[row].bool()
        assert kept.tolist() == [place < len(tokens) for place in range(max_tokens)]
        assert torch.equal(short_ids[row, kept], input_ids[row, tokens])
        assert torch.equal(short_embeds[row, kept], embeds[row, tokens])


def test_a_short_query_is_left_alone():
    input_ids, mask = torch.ones(2, 6).long(), torch.ones(2, 6)
    assert shorten(input_ids, mask, None, 6) == (input_ids, mask, None)
    assert shorten(None, mask, None, 5)[0] is None
