"""An expert is pinned where only model arguments can be given; no saved model stays pinned that nobody asked for."""

import json
import logging

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

from modeling_channel_merged import ChannelMergedForCausalLM

from .conftest import CONFIGS, GREEDY, random_model


@pytest.fixture
def folder(tmp_path):
    random_model(CONFIGS["llama"](), 3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, ChannelMergedForCausalLM, AutoModel])
def test_by_an_argument_of_from_pretrained(folder, prompts, auto):
    model = auto.from_pretrained(folder, expert="code").eval()
    assert model.pinned_expert == "code"
    free = auto.from_pretrained(folder).eval()
    assert free.pinned_expert is None
    with torch.no_grad():
        output = model(prompts)
        assert output.expert_index.tolist() == [2, 2, 2] and output.router_logits is None
        assert torch.equal(output[0], free(prompts, expert_index="code")[0])
        assert model(prompts, expert_index=["math", 0, "code"]).expert_index.tolist() == [1, 0, 2]
        # What the router would say is still to be had.
        routing, unpinned = model.route(prompts), free.route(prompts)
    assert routing.expert_index.tolist() == [2, 2, 2] != unpinned.expert_index.tolist()
    assert torch.equal(routing.probabilities, unpinned.probabilities)


def test_generate(folder, prompts):
    model = AutoModelForCausalLM.from_pretrained(folder, expert="math")
    free = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(prompts, **GREEDY, return_dict_in_generate=True)
    assert out.expert_index.tolist() == [1, 1, 1] and out.router_logits is None
    assert torch.equal(out.sequences, free.generate(prompts, expert_index="math", **GREEDY))
    routed = {"router_input_ids": prompts, "router_attention_mask": torch.ones_like(prompts)}
    assert torch.equal(out.sequences, model.generate(prompts, **routed, **GREEDY))
    given = model.generate(prompts, expert_index="code", **GREEDY)
    assert torch.equal(given, free.generate(prompts, expert_index="code", **GREEDY))


def test_a_cache_goes_on_with_those_that_filled_it(folder, prompts):
    model, cache = AutoModelForCausalLM.from_pretrained(folder, expert="math").eval(), DynamicCache()
    with torch.no_grad():
        model(prompts[:, :-1], expert_index="code", past_key_values=cache)
        assert model(prompts[:, -1:], past_key_values=cache).expert_index.tolist() == [2, 2, 2]


def test_a_wrong_name_is_told_with_those_that_there_are(folder, monkeypatch):
    read = []
    monkeypatch.setattr(
        "modeling_channel_merged.modeling_channel_merged.check_stored_tensors", lambda *args: read.append(1)
    )
    with pytest.raises(ValueError, match=r"unknown expert 'maths': this model has \['instruct', 'math', 'code'\]"):
        AutoModelForCausalLM.from_pretrained(folder, expert="maths")
    assert not read  # before the weights
    model = random_model(CONFIGS["llama"](), 3)
    with pytest.raises(ValueError, match="unknown expert 'law'"):
        model.pinned_expert = "law"
    model.pinned_expert = 1
    assert model.pinned_expert == "math"
    model.pinned_expert = None
    assert model.route(torch.ones(1, 3).long()).logits is not None
    with pytest.raises(ValueError, match=r"pinned_expert is 'law', expected one of \['instruct', 'math', 'code'\]"):
        AutoConfig.from_pretrained(folder).from_dict(
            {**json.loads((folder / "config.json").read_text()), "pinned_expert": "law"}
        )


def test_saving_pins_only_where_the_config_does(folder, tmp_path, prompts):
    model = AutoModelForCausalLM.from_pretrained(folder, expert="math")
    model.save_pretrained(tmp_path / "free")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "free").pinned_expert is None
    model.config.pinned_expert = "code"
    model.save_pretrained(tmp_path / "pinned")
    pinned = AutoModelForCausalLM.from_pretrained(tmp_path / "pinned")
    assert pinned.pinned_expert == "code" and pinned(prompts).expert_index.tolist() == [2, 2, 2]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pinned", expert="math").pinned_expert == "math"


def test_an_answer_never_chooses_the_expert_in_silence(folder, prompts, caplog, monkeypatch):
    """Where all of the input is read, one line says so; not where the expert is pinned, given or of no moment."""
    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(transformers_logging.get_logger("modeling_channel_merged"), "propagate", True)
    model = AutoModelForCausalLM.from_pretrained(folder, expert="math")
    answers = torch.cat([prompts[:1].expand(3, -1), torch.arange(40, 52).view(3, 4)], dim=1)
    model(answers)
    model.pinned_expert = None
    model(answers, expert_index="math")
    assert "an answer in it" not in caplog.text
    model(answers)
    assert "an answer in it" in caplog.text and "expert=NAME" in caplog.text
    caplog.clear()
    transformers_logging.warning_once.cache_clear()
    random_model(CONFIGS["llama"](), 3, trained_router=False)(answers)
    assert "an answer in it" not in caplog.text
