"""The experts that a cache remembers: they follow its rows, and are compared with those of what goes on from it."""

import copy
import pickle

import pytest
import torch
from transformers import Cache, DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import QuantizedLayer

from modeling_channel_merged.active_experts import ActiveExperts
from modeling_channel_merged.expert_caches import BatchExperts, empty_cache, experts_of_cache, remember_experts

from .conftest import CONFIGS, dense_expert


@pytest.mark.parametrize("rows", [[2, 2, 2], [3, 0, 3, 1, 0]], ids=str)
def test_experts_of_rows_are_the_form_of_their_index(rows):
    experts = BatchExperts.of_rows(rows)
    expected = ActiveExperts.from_index(torch.tensor(rows))
    assert experts.expert_index.tolist() == [*experts.rows] == rows
    assert (experts.active.expert, experts.active.counts) == (expected.expert, expected.counts)
    if expected.expert is None:
        assert torch.equal(experts.active.order, expected.order)


def fill(cache, rows: int):
    for layer in range(3):
        cache.update(torch.ones(rows, 2, 4, 12), torch.ones(rows, 2, 4, 12), layer)
    return cache


@pytest.mark.parametrize(
    ("filled", "prompts", "expand_size", "same"),
    [
        ([0, 1], [0, 1], 1, True),
        ([0, 1], [1, 0], 1, False),
        ([0, 0, 1, 1], [0, 1], 2, True),
        ([0, 1, 0, 1], [0, 1], 2, False),
        ([2], [2, 2, 2], 1, True),
        ([2], [2, 2, 1], 1, False),
        ([1, 2], [1, 2, 1], 1, False),
    ],
)
def test_same_experts(filled, prompts, expand_size, same):
    """Row by row; a single expert is the same however many rows it has."""
    assert BatchExperts.of_rows(filled).are(prompts, expand_size) is same


def test_experts_of_prompts():
    assert BatchExperts.of_rows([0, 0, 1, 1]).of_prompts(2, 2).tolist() == [0, 1]
    assert BatchExperts.of_rows([2]).of_prompts(3, 1).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="filled by 2 rows of different experts, but the batch has 3 prompts with 1"):
        BatchExperts.of_rows([0, 1]).of_prompts(3, 1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_memory_goes_with_the_cache_and_ends_with_its_content(kind):
    config = CONFIGS["llama"]()
    cache = StaticCache(config=config, max_cache_len=9) if kind == "static" else DynamicCache(config=config)
    remember_experts(cache, BatchExperts.of_rows([1, 0]))
    assert experts_of_cache(cache) is None  # nothing in it yet
    fill(cache, 2)
    copied = copy.deepcopy(cache)
    assert experts_of_cache(copied).rows == (1, 0)
    empty_cache(cache)
    assert cache.get_seq_length() == 0 and experts_of_cache(fill(cache, 2)) is None
    assert experts_of_cache(copied).rows == (1, 0)
    assert experts_of_cache(None) is None


class PlainLayer(QuantizedLayer):
    """Keeps the numbers as they are: real quantizers are packages of their own."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


class PlainQuantizedCache(QuantizedCache):
    def __init__(self, config):
        Cache.__init__(self, layers=[PlainLayer() for _ in range(config.num_hidden_layers)])


class OwnCache(DynamicCache):
    """A user's own class."""


KINDS = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=30),
    "quantized": PlainQuantizedCache,
    "own": lambda config: OwnCache(config=config),
}
# What moves the rows of a cache, and the rows that are there then; all but a dynamic cache can only be reordered.
MOVES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, -2])), [2, 1]),
    "mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "crop": (lambda cache: cache.crop(-1), [0, 1, 2]),
}


@pytest.mark.parametrize(
    ("kind", "move"),
    [*(("dynamic", move) for move in MOVES), *((kind, "reorder") for kind in KINDS if kind != "dynamic")],
)
@pytest.mark.parametrize("filled", [[2, 0, 1], [1, 1, 1]], ids=["mixed", "one"])
@pytest.mark.parametrize("copied", ["same", "deepcopy", "copy", "pickle"])
@torch.no_grad()
def test_experts_follow_the_rows(llama_model, prompts, kind, move, filled, copied):
    """After every move each row goes on as the dense model of its expert, and in no other way."""
    cache = KINDS[kind](llama_model.config.text_config)
    llama_model(prompts, past_key_values=cache, expert_index=filled)
    cache = {
        "same": lambda cache: cache,
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    }[copied](cache)
    assert isinstance(cache, type(KINDS[kind](llama_model.config.text_config)))
    change, rows = MOVES[move]
    change(cache)
    experts, length = [filled[row] for row in rows], prompts.shape[1] - (move == "crop")
    if len(set(experts)) > 1:
        with pytest.raises(ValueError, match="row . asks for expert"):
            llama_model(
                prompts[rows, :1], past_key_values=copy.deepcopy(cache), expert_index=experts[1:] + experts[:1]
            )
    output = llama_model(prompts[rows, :1], past_key_values=cache)
    assert output.expert_index.tolist() == experts
    for row, expert in enumerate(experts):
        text = torch.cat([prompts[rows[row], :length], prompts[rows[row], :1]])[None]
        expected = dense_expert(llama_model, expert)(text).logits[0, -1]
        torch.testing.assert_close(output.logits[row, -1], expected, rtol=1e-4, atol=1e-4)


def test_a_batch_of_another_size_is_refused(llama_model, prompts):
    cache = llama_model(prompts, expert_index=[2, 0, 1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled by 3 rows of different experts, but the batch has 2 rows"):
        llama_model(prompts[:2, :1], past_key_values=cache)


def test_one_expert_changed_after_a_prefix_was_repeated_is_refused(llama_model, prompts):
    cache = llama_model(prompts[:1], expert_index=1, use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    with pytest.raises(ValueError, match="row 2 asks for expert 'instruct', but past_key_values was filled by 'math'"):
        llama_model(prompts[:, :1], past_key_values=cache, expert_index=[1, 1, 0])


def test_an_index_that_was_written_to_is_read_again(llama_model, prompts):
    index = torch.tensor([2, 0, 1])
    cache = llama_model(prompts, expert_index=index, use_cache=True).past_key_values
    index[0] = 1
    with pytest.raises(ValueError, match="row 0 asks for expert 'math'"):
        llama_model(prompts[:, :1], past_key_values=cache, expert_index=index)
    assert llama_model(prompts[:, :1], past_key_values=cache).expert_index.tolist() == [2, 0, 1]


@torch.no_grad()
def test_a_cache_that_a_compiled_call_filled_is_not_routed(llama_model, prompts):
    """The router would choose by the new tokens alone, and read another expert's keys."""
    cache = DynamicCache()
    compiled = torch.compile(llama_model, backend="eager", fullgraph=True)
    logits = compiled(prompts, expert_index=1, past_key_values=cache).logits
    token = logits[:, -1:].argmax(-1)
    for call in (llama_model, llama_model.generate):
        with pytest.raises(ValueError, match="does not know by which experts.*give them as expert_index"):
            call(token, past_key_values=cache)
    expected = llama_model(torch.cat([prompts, token], dim=1), expert_index=1).logits[:, -1:]
    output = llama_model(token, past_key_values=cache, expert_index=1)
    torch.testing.assert_close(output.logits, expected)


def test_experts_of_inference_mode_are_looked_at(llama_model, prompts):
    """Such tensors count no versions: what names the experts may have changed in place."""
    with torch.inference_mode():
        cache, experts = DynamicCache(), torch.tensor([0, 1, 2])
        token = llama_model(prompts, expert_index=experts, past_key_values=cache).logits[:, -1:].argmax(-1)
        llama_model(token, expert_index=experts, past_key_values=cache)
        experts.copy_(torch.tensor([2, 1, 0]))
        with pytest.raises(ValueError, match="past_key_values was filled by"):
            llama_model(token, expert_index=experts, past_key_values=cache)
