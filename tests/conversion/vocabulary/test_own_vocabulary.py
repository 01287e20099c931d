"""The vocabulary that an expert brings: its tokenizer's class, its rows, or none."""

import logging

import pytest
from transformers import AutoTokenizer

from conversion.checkpoints.merged_checkpoint import read_merged_config
from conversion.convert import convert
from conversion.merging.plan import make_plan
from conversion.merging.recipe import parse_recipe
from conversion.vocabulary.expert_tokenizer import ExpertTokenizer
from conversion.vocabulary.own_vocabulary import find_tokenizer
from conversion.vocabulary.union_tokenizer import SAMPLES

from .conftest import BASE_SIZE, NUM_BASE_TOKENS, Experts, extended, model_of_size, save


def test_a_tokenizer_stays_of_its_class_in_another_folder(make_experts, write_recipe, tmp_path):
    """Transformers takes the class that belongs to the model type, which is another one for the merged model."""
    base, folders = make_experts("qwen2", 2)
    convert(parse_recipe(write_recipe(base, folders)), tmp_path / "out", progress=False)
    original = AutoTokenizer.from_pretrained(base)
    for folder in ("", "experts/e0", "experts/e1"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / folder)
        assert type(tokenizer) is type(original)
        assert tokenizer.get_vocab() == original.get_vocab()
        assert all(tokenizer.encode(text) == original.encode(text) for text in SAMPLES)


def test_tokens_without_rows_are_named(llama, tmp_path, caplog):
    """A tokenizer that was given a token for which the embedding never got a row."""
    folder = save(model_of_size("llama", NUM_BASE_TOKENS, 7), extended("<lost>"), tmp_path / "lost")
    experts = Experts(llama.base, {**llama.folders, "lost": folder})
    with caplog.at_level(logging.WARNING):
        out = experts.convert(tmp_path / "out", "math", "lost")
    assert "more tokens than its embedding has rows (259), left out are: '<lost>'" in caplog.text
    speaker = ExpertTokenizer.of_checkpoint(out, read_merged_config(out), AutoTokenizer.from_pretrained(out), "lost")
    with pytest.raises(ValueError, match="expert 'lost' has no row for the token '<lost>'"):
        speaker.encode("a<lost>", chat=False)


def test_an_expert_without_a_tokenizer_uses_the_bases(llama, tmp_path, caplog):
    folder = save(model_of_size("llama", BASE_SIZE, 7), None, tmp_path / "bare")
    experts = Experts(llama.base, {**llama.folders, "bare": folder})
    with caplog.at_level(logging.WARNING):
        vocabulary = make_plan(experts.recipe("chat", "bare", tokenizer_source="union")).vocabulary
    assert "'bare' has no tokenizer: it is taken to use the base's" in caplog.text
    assert vocabulary.channels[1].tolist() == [*range(259), 261, 262, 263, 264, 265]


def test_a_tokenizer_file_that_is_none_is_said(make_experts, caplog):
    """Transformers makes an empty tokenizer of it, which would read every text as nothing."""
    base, _ = make_experts("llama", 1)
    (base / "tokenizer.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert find_tokenizer("base_model", base) is None
    assert "the tokenizer of base_model cannot be loaded" in caplog.text
