"""The evaluation harness runs a merged checkpoint by its model arguments alone, with the expert that they name."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_channel_merged.expert_router import NGRAM_BUCKETS

# The harness and what it imports warn of their own use of other libraries.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
lm_eval = pytest.importorskip("lm_eval")
CHOICES = [("one two plus", answer) for answer in (" print def", " hello please", " three", " 你 好 吗")]


@pytest.fixture
def routed(stored):
    """A checkpoint whose router chooses by the words of what it reads."""
    file = stored.folder / "model.safetensors"
    tensors = load_file(file)
    torch.manual_seed(0)
    tensors["router.ngrams.weight"] = 5 * torch.randn(NGRAM_BUCKETS, 3)
    save_file(tensors, file, metadata={"format": "pt"})
    return stored.folder


def harness(folder, **arguments):
    from lm_eval.api.registry import get_model

    text = ",".join(f"{key}={value}" for key, value in {"pretrained": folder, "device": "cpu", **arguments}.items())
    return get_model("hf").create_from_arg_string(text, {"batch_size": 2})


def loglikelihoods(model, pairs=CHOICES):
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    return [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]


def test_one_expert_scores_all_answers_to_a_question(routed):
    """And it is the expert itself: the harness' numbers are those of its own log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(routed)
    scores = {}
    for expert in ("math", "code"):
        lm = harness(routed, expert=expert)
        assert lm.model.pinned_expert == expert
        scores[expert] = loglikelihoods(lm)
        for (context, answer), score in zip(CHOICES, scores[expert]):
            start, whole = lm.tok_encode(context), lm.tok_encode(context + answer)
            with torch.no_grad():
                logits = model(torch.tensor([whole]), expert_index=expert).logits.log_softmax(-1)
            expected = sum(float(logits[0, place - 1, whole[place]]) for place in range(len(start), len(whole)))
            assert score == pytest.approx(expected, abs=1e-3)
    assert scores["math"] != pytest.approx(scores["code"], abs=1e-2)


def test_without_an_expert_answers_choose_and_it_is_said(routed, monkeypatch):
    lm, experts = harness(routed), []
    forward = lm.model.forward
    monkeypatch.setattr(
        lm.model, "forward", lambda *args, **kwargs: experts.append(out := forward(*args, **kwargs)) or out
    )
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("modeling_channel_merged.routing_channel_merged")
    logger.addHandler(handler)
    loglikelihoods(lm)
    logger.removeHandler(handler)
    chosen = {
        number for output in experts if output.expert_index is not None for number in output.expert_index.tolist()
    }
    assert len(chosen) > 1
    assert any("an answer in it, too" in message for message in messages)


def test_a_wrong_name(routed):
    with pytest.raises(ValueError, match=r"unknown expert 'maths': this model has \['instruct', 'math', 'code'\]"):
        harness(routed, expert="maths")
