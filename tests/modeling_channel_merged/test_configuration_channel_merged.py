"""The configuration says what is wrong with it, and survives a round trip."""

import pytest
from transformers import LlamaConfig

from modeling_channel_merged import ChannelMergedConfig


def make(**kwargs):
    return ChannelMergedConfig(text_config=LlamaConfig(num_hidden_layers=4, pad_token_id=0), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"expert_names": ["a", "a"]}, r"expert_names must differ.*\['a', 'a'\]"),
        ({"expert_names": ["a", "b"], "num_experts": 3}, "num_experts is 3, but expert_names has 2"),
        ({"expert_names": ["a", "b"], "router": {"layers": 5}}, "router.layers is 5, expected 1 to 4"),
        ({"expert_names": ["a", "b"], "router": {"trunk_expert": "c"}}, "router.trunk_expert is 'c'"),
        ({"expert_names": ["a", "b"], "router": {"default_expert": "c"}}, "router.default_expert is 'c'"),
        ({"expert_names": ["a", "b"], "router": {"pooling": "max"}}, "router.pooling is 'max'"),
        ({"expert_names": ["a", "b"], "router": {"threshold": 1.5}}, "router.threshold is 1.5"),
        ({"expert_names": ["a", "b"], "router": {"max_tokens": 0}}, "router.max_tokens is 0, expected a number of"),
        ({"expert_names": ["a", "b"], "router": {"max_tokens": None}}, "router.max_tokens is None"),
        ({"expert_names": ["a", "b"], "router": {"context": "all"}}, "router.context is 'all', expected one of"),
        ({"expert_names": ["a", "b"], "router": {"features": "tokens"}}, "router.features is 'tokens', expected"),
        ({"expert_names": ["a", "b"], "router": {"temperature": 0}}, "router.temperature is 0, expected"),
        ({"expert_names": ["a", "b"], "format_version": 99}, "format_version is 99"),
        ({"expert_names": ["a", "b"], "format_version": "1"}, "format_version is '1'"),
        ({"expert_names": ["a", "b"], "router": ["x"]}, r"router is \['x'\], expected names and values"),
        ({"expert_names": ["a", "b"], "router": {"layers": "1"}}, "router.layers is '1', expected 1 to 4"),
        ({"expert_names": ["a", "b"], "router": {"threshold": "a"}}, "router.threshold is 'a', expected a prob"),
        (
            {"expert_names": ["a", "b"], "rows": {"lm_head": "x"}},
            r"rows\['lm_head'\] is 'x', expected a number of rows",
        ),
        (
            {"expert_names": ["a", "b"], "expert_eos_token_ids": {"a": "x", "b": [2]}},
            "expert_eos_token_ids is {'a': 'x'",
        ),
        ({"expert_names": ["a", "b"], "format_version": 0}, "format_version is 0, .* reads versions 1 to 2"),
        (
            {"expert_names": ["a", "b"], "expert_vocabularies": {"c": {"size": 2, "runs": [[0, 2]]}}},
            r"expert_vocabularies\['c'\] .* expected an expert of \['a', 'b'\]",
        ),
        (
            {"expert_names": ["a", "b"], "expert_vocabularies": {"a": {"size": 3, "runs": [[0, 2]]}}},
            r"expert_vocabularies\['a'\] has 2 of 3 ids",
        ),
        (
            {"expert_names": ["a", "b"], "expert_vocabularies": {"a": {"size": 2, "runs": [[31999, 2]]}}},
            "ids below 32001, .* the merged vocabulary of 32000",
        ),
        ({"expert_names": ["a", "b"], "expert_eos_token_ids": {"a": [2]}}, r"expert_eos_token_ids is of \['a'\]"),
    ],
)
def test_wrong_values_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_round_trip(tmp_path):
    config = make(expert_names=["a", "b"], rows={"lm_head": 40000}, router={"layers": 2}, merge={"seed": 3})
    config.save_pretrained(tmp_path)
    loaded = ChannelMergedConfig.from_pretrained(tmp_path)
    assert isinstance(loaded.text_config, LlamaConfig)
    for field in ("expert_names", "num_experts", "rows", "router", "merge", "format_version", "auto_map"):
        assert getattr(loaded, field) == getattr(config, field)
    assert set(loaded.auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def test_a_router_of_an_older_checkpoint_gets_what_came_later():
    old = {"layers": 2, "pooling": "last", "trunk_expert": "b", "default_expert": "b", "threshold": 0.3}
    config = make(expert_names=["a", "b"], router=old, format_version=1)
    router = config.router
    assert {key: router[key] for key in old} == old
    assert (router["max_tokens"], router["context"]) == (256, "last_user_turn")
    assert (router["features"], router["temperature"]) == ("trunk", 1.0)
    assert make(**{key: getattr(config, key) for key in ("expert_names", "router", "format_version")}).router == router


@pytest.mark.parametrize("version", [1, 2])
def test_the_version_alone_says_what_is_left_out(version):
    """Whichever other fields a router names; one that names its features is as it says."""
    names = {"expert_names": ["a", "b"], "format_version": version}
    complete = {key: value for key, value in make(**names).router.items() if key != "features"}
    for router in ({"layers": 2}, complete):
        expected = "trunk" if version == 1 else "trunk_and_ngrams"
        assert make(**names, router=router).router["features"] == expected
        for features in ("trunk", "trunk_and_ngrams"):
            config = make(**names, router={**router, "features": features})
            assert config.router["features"] == features and config.format_version == 2


def test_vocabularies_survive_a_round_trip(tmp_path):
    vocabularies = {"b": {"size": 4, "runs": [[0, 3], [7, 1]], "eos_token_id": 3}}
    config = make(expert_names=["a", "b"], expert_vocabularies=vocabularies, expert_eos_token_ids={"a": [2], "b": [7]})
    config.save_pretrained(tmp_path)
    loaded = ChannelMergedConfig.from_pretrained(tmp_path)
    assert loaded.expert_vocabularies == vocabularies
    assert loaded.expert_eos_token_ids == {"a": [2], "b": [7]}
    assert loaded.vocabulary_channels("b") == loaded.vocabulary_channels(1) == [0, 1, 2, 7]
    assert loaded.vocabulary_channels("a") is None


def test_answers_for_the_base():
    config = make(expert_names=["a", "b"])
    assert (config.hidden_size, config.num_hidden_layers, config.pad_token_id) == (4096, 4, 0)
    assert config.get_text_config() is config.text_config


@pytest.mark.parametrize("expert", ["c", 2, -1, True, 1.0, None, [0]], ids=str)
def test_unknown_expert(expert):
    with pytest.raises(ValueError, match="this model has"):
        make(expert_names=["a", "b"]).expert_id(expert)


@pytest.mark.parametrize("runs", [[[0, 5], [4, 5]], [[-1, 10]], [[0, 12], [20, -2]], [[0, 1]] * 10])
def test_an_own_vocabulary_has_every_id_once(runs):
    """Many runs of the same ids would be more ids than any vocabulary has."""
    vocabularies = {"expert_0": {"size": 10, "runs": runs}}
    with pytest.raises(ValueError, match=r"expert_vocabularies\['expert_0'\] has .* each in one run"):
        ChannelMergedConfig(text_config=LlamaConfig(), expert_vocabularies=vocabularies)


def test_a_number_of_experts_that_no_model_has():
    with pytest.raises(ValueError, match="num_experts is 1000000000, expected at most 62"):
        ChannelMergedConfig(text_config=LlamaConfig(), num_experts=10**9)
