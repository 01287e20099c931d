"""The experts that a cache remembers, compared with those of the prompts that go on from it."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_channel_merged.active_experts import ActiveExperts
from modeling_channel_merged.expert_caches import CacheExperts, empty_cache, experts_of_cache, remember_experts

from .conftest import CONFIGS


def filled_by(experts: list[int]) -> CacheExperts:
    index = torch.tensor(experts)
    return CacheExperts(index, ActiveExperts.from_index(index))


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
    assert filled_by(filled).are(torch.tensor(prompts), expand_size) is same


def test_experts_of_prompts():
    assert filled_by([0, 0, 1, 1]).of_prompts(2, 2).tolist() == [0, 1]
    assert filled_by([2]).of_prompts(3, 1).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="filled by 2 rows of different experts, but the batch has 3 prompts with 1"):
        filled_by([0, 1]).of_prompts(3, 1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_memory_goes_with_the_cache_and_ends_with_its_content(kind):
    config = CONFIGS["llama"]()
    cache = StaticCache(config=config, max_cache_len=9) if kind == "static" else DynamicCache(config=config)
    index = torch.tensor([1, 0])
    remember_experts(cache, index, ActiveExperts.from_index(index))
    assert experts_of_cache(cache) is None  # nothing in it yet
    fill(cache, 2)
    copied = copy.deepcopy(cache)
    assert experts_of_cache(copied).expert_index.tolist() == [1, 0]
    empty_cache(cache)
    assert cache.get_seq_length() == 0 and experts_of_cache(fill(cache, 2)) is None
    assert experts_of_cache(copied).expert_index.tolist() == [1, 0]
    assert experts_of_cache(None) is None
