"""`generate`, `route` and `forward` read of a chat what the router is to read, wherever it stands in a batch."""

import pytest
import torch

from modeling_channel_merged import ChannelMergedConfig
from modeling_channel_merged.chat_turns import ChatMarkers, ChatTurns

from .conftest import CONFIGS, GREEDY, random_model

BOS, USER, END, ANSWER, SYSTEM, PAD = 1, 90, 91, 92, 93, 0
MARKERS = ChatMarkers(first=[USER], openings=[[END, USER]], end=[END, ANSWER], tools=[[USER, USER]], lead=[], tail=[])
TURNS = ChatTurns(
    before=[BOS, USER], after=[END, ANSWER], lead=[], tail=[], separator=[80], bos=[BOS], templates=[MARKERS]
)


def single(*words: int) -> list[int]:
    return [BOS, USER, *words, END, ANSWER]


MATH, CHINESE = (11, 12, 13), (31, 32, 33, 34, 35)
CHAT = [*single(*MATH), 21, 22, END, USER, *CHINESE, END, ANSWER]
WITH_SYSTEM = [BOS, SYSTEM, 50, 51, END, USER, *MATH, END, ANSWER]
PLAIN = [41, 42, 43, 44]


@pytest.fixture
def model():
    model = random_model(CONFIGS["llama"](), 5)
    model.config.router["turns"] = TURNS.to_dict()
    return model


def batch(*rows: list[int], side: str = "left") -> dict[str, torch.Tensor]:
    length = max(map(len, rows)) + 2
    pads = [[PAD] * (length - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for pad, row in zip(pads, rows)]
    mask = [[number != PAD for number in row] for row in ids]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask).long()}


def logits_of(model, *ids: list[int]) -> torch.Tensor:
    """Each row's alone, read whole."""
    return torch.cat([model.route(torch.tensor([row]), whole=True).logits for row in ids])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_chats_and_plain_prompts(model, side):
    inputs = batch(CHAT, PLAIN, WITH_SYSTEM, side=side)
    expected = logits_of(model, single(*CHINESE), PLAIN, single(*MATH))
    routing = model.route(**inputs)
    torch.testing.assert_close(routing.logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits_of(model, CHAT) - expected[:1]).abs().max() > 1  # the whole prompt is another query
    torch.testing.assert_close(model(**inputs).router_logits, expected, rtol=1e-4, atol=1e-4)
    labels = torch.tensor([0, 1, 2])
    torch.testing.assert_close(model(**inputs, expert_labels=labels).router_logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model.route(**inputs, whole=True).logits, logits_of(model, CHAT, PLAIN, WITH_SYSTEM), rtol=1e-4, atol=1e-4
    )


def test_generate_routes_by_the_last_turn_and_answers_the_whole_prompt(model):
    inputs = batch(CHAT, PLAIN, WITH_SYSTEM)
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    torch.testing.assert_close(out.router_logits, model.route(**inputs).logits)
    given = model.generate(**inputs, **GREEDY, expert_index=out.expert_index)
    assert torch.equal(out.sequences, given) and len({*out.expert_index.tolist()}) > 1


def test_no_answer_takes_part_in_the_choice(model):
    """As harnesses score them: behind the prompt, padded on the right, and without a mask."""
    answers = ([70], [71, 72, 73], [74, 75])
    rows = [[*CHAT, *answer, *[PAD] * (4 - len(answer))] for answer in answers]
    logits = model(torch.tensor(rows)).router_logits
    torch.testing.assert_close(logits, logits_of(model, *[single(*CHINESE)] * 3), rtol=1e-4, atol=1e-4)


def test_router_inputs_are_read_as_they_stand(model):
    """They hold what the router is to read, with whatever markers the user typed."""
    inputs, router = batch(CHAT), batch([*single(*MATH, END, USER, *CHINESE)], side="right")
    out = model.generate(
        **inputs,
        **GREEDY,
        **{f"router_{name}": value for name, value in router.items()},
        return_dict_in_generate=True,
    )
    torch.testing.assert_close(
        out.router_logits, logits_of(model, single(*MATH, END, USER, *CHINESE)), rtol=1e-4, atol=1e-4
    )


def test_all_turns_of_the_user_by_context(model):
    model.config.router["context"] = "conversation"
    expected = logits_of(model, single(*MATH, 80, *CHINESE))
    torch.testing.assert_close(model.route(**batch(CHAT)).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_turn_of_a_tool_is_none_of_the_users(model):
    called = [*CHAT, 60, END, USER, USER, USER, 70, 71, END, ANSWER]
    expected = logits_of(model, single(*CHINESE))
    torch.testing.assert_close(model.route(**batch(called)).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_long_chat_is_shortened_to_the_ends_of_its_last_turn(model):
    model.config.router["max_tokens"] = 6
    expected = logits_of(model, single(*CHINESE))
    torch.testing.assert_close(model.route(**batch(CHAT)).logits, expected, rtol=1e-4, atol=1e-4)


def test_without_markers_all_is_read(model):
    """Of a checkpoint made before there were any, and of embeddings."""
    model.config.router["turns"] = None
    inputs = batch(CHAT, PLAIN)
    assert torch.equal(model.route(**inputs).logits, model.route(**inputs, whole=True).logits)
    model.config.router["turns"] = TURNS.to_dict()
    embeds = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.route(inputs_embeds=embeds).logits, model.route(inputs_embeds=embeds, whole=True).logits)
    del (values := model.config.to_dict())["router"]["turns"]
    assert ChannelMergedConfig.from_dict(values).router["turns"] is None


def test_a_row_of_padding_and_a_mask_that_routing_cannot_read(model):
    inputs = batch(CHAT, PLAIN)
    inputs["attention_mask"][1] = 0
    routing = model.route(**inputs)
    assert routing.logits[1].tolist() == [0.0] * 5 and routing.expert_index[1] == 0
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 1, 3, 3\), but routing reads"):
        model.route(inputs["input_ids"], torch.ones(2, 1, 3, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"templates": [{}]}, "missing 6 required"),
        ({"before": [1.5]}, "no list of token ids"),
        ({"bos": 1}, "no list of token ids"),
        ({"colour": []}, "colour"),
        ({"templates": [{**TURNS.to_dict()["templates"][0], "end": []}]}, "a marker is empty"),
    ],
)
def test_a_config_with_other_markers_is_refused(change, message):
    turns = {**TURNS.to_dict(), **change}
    with pytest.raises(ValueError, match=f"router.turns are no markers of chat templates: .*{message}"):
        ChannelMergedConfig(text_config=CONFIGS["llama"](), num_experts=2, router={"turns": turns})
