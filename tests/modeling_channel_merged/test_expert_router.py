"""The router reads tokens and nothing but tokens, with or without their ids, and starts untrained."""

import pytest
import torch
from torch import nn

from modeling_channel_merged.expert_router import NGRAM_BUCKETS, ExpertRouter, ngram_buckets, pool, word_buckets

NO_BUCKET = NGRAM_BUCKETS


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pooling, side):
    torch.manual_seed(0)
    tokens, padding = torch.randn(2, 5, 16), torch.full((2, 3, 16), float("nan"))
    ones, zeros = torch.ones(2, 5), torch.zeros(2, 3)
    parts = [(padding, zeros), (tokens, ones)] if side == "left" else [(tokens, ones), (padding, zeros)]
    padded, mask = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    # Padding moves the terms of the sum, so its rounding may differ.
    torch.testing.assert_close(pool(padded, mask, pooling), pool(tokens, ones, pooling), rtol=1e-6, atol=1e-6)


def test_values():
    hidden_states = torch.tensor([[[1.0], [2.0], [6.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden_states, mask, "mean").tolist() == [[1.5]]
    assert pool(hidden_states, mask, "last").tolist() == [[2.0]]


def test_query_without_tokens_gives_zeros():
    assert pool(torch.randn(1, 3, 4), torch.zeros(1, 3), "mean").tolist() == [[0.0] * 4]
    assert pool(torch.randn(1, 3, 4), torch.zeros(1, 3), "last").tolist() == [[0.0] * 4]


def test_half_precision_features_are_pooled_in_float32():
    hidden_states = torch.full((1, 3000, 1), 1.001, dtype=torch.bfloat16)
    assert pool(hidden_states, torch.ones(1, 3000), "mean").dtype == torch.float32
    assert pool(hidden_states, torch.ones(1, 3000), "mean").item() == pytest.approx(hidden_states[0, 0, 0].item())


def new_router(features: str = "trunk_and_ngrams", max_tokens: int = 8) -> ExpertRouter:
    return ExpertRouter(16, 3, "mean", features, max_tokens).eval()


def random_router(features: str = "trunk_and_ngrams") -> ExpertRouter:
    router = new_router(features)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


@pytest.mark.parametrize("features", ["trunk_and_ngrams", "trunk"])
def test_untrained_until_a_weight_is_not_zero(features):
    torch.manual_seed(0)
    router = new_router(features)
    query = router.features(torch.randn(2, 4, 16), torch.ones(2, 4), torch.randint(50, (2, 4)))
    assert not router.is_trained
    assert router(query).abs().max() == 0
    router.head.bias.data[0] = 1.0
    assert not router.is_trained
    (router.head if features == "trunk" else router.ngrams).weight.data[0, 0] = 1e-3
    assert router.is_trained


def test_ngrams_are_tokens_and_pairs_each_once():
    ids = torch.tensor([[5, 7, 5, 7, 5]])
    buckets = ngram_buckets(ids, torch.ones_like(ids))[0]
    present = buckets[buckets != NO_BUCKET].tolist()
    assert len(present) == len(set(present)) == 4  # 5, 7, (5, 7) and (7, 5)
    alone = ngram_buckets(torch.tensor([[5]]), torch.ones(1, 1))[0].tolist()
    assert alone[0] in present and alone[1] == NO_BUCKET
    assert present == sorted(present) and 0 <= present[0] and present[-1] < NGRAM_BUCKETS


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_adds_no_ngram(side):
    ids, padding = torch.tensor([[3, 1, 4, 1]]), torch.tensor([[9, 9]])
    ones, zeros = torch.ones_like(ids), torch.zeros_like(padding)
    parts = [(padding, zeros), (ids, ones)] if side == "left" else [(ids, ones), (padding, zeros)]
    padded, mask = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    assert torch.equal(ngram_buckets(padded, mask)[:, :8], ngram_buckets(ids, ones))
    assert (ngram_buckets(padded, mask)[:, 8:] == NO_BUCKET).all()


def test_buckets_of_large_vocabularies_are_spread():
    """As many n-grams as buckets collide no more often than at random, which leaves 1 / e of the buckets empty."""
    ids = torch.arange(200_000, 200_000 + NGRAM_BUCKETS // 2)[None]
    buckets = ngram_buckets(ids, torch.ones_like(ids))
    assert (buckets != NO_BUCKET).sum().item() / NGRAM_BUCKETS > 0.63


def test_logits_equal_a_direct_sum():
    torch.manual_seed(1)
    router = random_router()
    hidden_states, ids, mask = torch.randn(1, 3, 16), torch.tensor([[4, 4, 9]]), torch.ones(1, 3)
    pooled = hidden_states[0].mean(0)
    trunk = (pooled - pooled.mean()) / (pooled.var(correction=0) + 1e-5).sqrt() / 4
    buckets = [bucket for bucket in ngram_buckets(ids, mask)[0].tolist() if bucket != NO_BUCKET]
    expected = router.head(trunk) + router.ngrams.weight[buckets].sum(0) / len(buckets) ** 0.5
    torch.testing.assert_close(router(router.features(hidden_states, mask, ids))[0], expected)


def test_without_token_ids_the_trunk_decides():
    torch.manual_seed(2)
    router = random_router()
    hidden_states, mask = torch.randn(2, 3, 16), torch.ones(2, 3)
    features = router.features(hidden_states, mask)
    assert features.shape == router.features(hidden_states, mask, torch.zeros(2, 3, dtype=torch.int64)).shape
    torch.testing.assert_close(router(features), router.head(features[:, :16]))


def test_features_have_one_width_whatever_the_query_length():
    router = new_router()
    widths = {
        router.features(torch.randn(1, t, 16), torch.ones(1, t), torch.ones(1, t).long()).shape for t in (0, 1, 8)
    }
    assert widths == {(1, 16 + 3 * 16)}


def test_autocast_does_not_round_bucket_numbers():
    router = random_router()
    arguments = (torch.randn(1, 4, 16), torch.ones(1, 4), torch.tensor([[1, 2, 3, 4]]))
    expected = router(router.features(*arguments))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(router.features(*arguments)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casts_do_not_round_weights_or_bucket_numbers(dtype):
    """A cast of the model leaves the router's weights, one of the features (FSDP, DeepSpeed) leaves every bucket."""
    torch.manual_seed(4)
    router = random_router()
    hidden_states, mask, ids = torch.randn(2, 8, 16), torch.ones(2, 8), torch.randint(90_000, (2, 8))
    features = router.features(hidden_states, mask, ids)
    expected = router(features)
    weights = {name: value.clone() for name, value in router.state_dict().items()}
    nn.ModuleList([router]).to(dtype)
    assert all(torch.equal(value, weights[name]) for name, value in router.state_dict().items())
    assert torch.equal(router(features), expected)
    nn.init.zeros_(router.head.weight)
    assert torch.equal(router(features.to(dtype)), router(features))


def test_weights_that_were_cast_all_the_same_route():
    router = random_router()
    features = router.features(torch.randn(2, 4, 16), torch.ones(2, 4), torch.randint(50, (2, 4)))
    expected = router(features)
    for parameter in router.parameters():
        parameter.data = parameter.data.bfloat16()
    logits = router(features)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)


def test_ngrams_alone_learn_and_generalise():
    """Queries of two experts that share tokens 1 and 2 with all others and differ in one; trunk features are noise."""
    torch.manual_seed(3)
    router = new_router().train()
    labels = torch.arange(40) % 2
    ids = torch.stack([torch.tensor([1, 10 + label, 2, 100 + n]) for n, label in enumerate(labels.tolist())])
    features = router.features(torch.randn(40, 4, 16), torch.ones(40, 4), ids)
    optimizer = torch.optim.AdamW(router.parameters(), lr=1e-2)
    for _ in range(40):
        torch.nn.functional.cross_entropy(router(features), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    unseen = torch.tensor([[1, 10, 2, 999], [1, 11, 2, 998]])
    router.eval()
    assert router(router.features(torch.zeros(2, 4, 16), torch.ones(2, 4), unseen)).argmax(-1).tolist() == [0, 1]


PLAIN = torch.tensor([-1, 2, 3, -2, -4])  # "a", "b" inside a word, "c" inside a word, "B" after a space, "d"


def words_of(ids, mask=None):
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids) if mask is None else torch.tensor([mask])
    return {bucket for bucket in word_buckets(ids, mask, PLAIN, 1 << 16)[0].tolist() if bucket != 1 << 16}


def test_words_are_their_tokens_in_order():
    """Whatever stands around them: a word is found again, its tokens in another order are another word."""
    alone = words_of([0, 1, 2])
    assert len(alone) == 3 + 2 + 1  # tokens, pairs, the word
    assert alone <= words_of([4, 0, 1, 2, 4])
    (word,) = alone - words_of([0, 1]) - words_of([1, 2]) - words_of([4, 1, 4, 2])
    assert word not in words_of([0, 2, 1]) and word not in words_of([0, 1, 2, 2])


def test_words_know_no_case():
    """Token 3 is token 1 in capitals and after a space: the same plain token, but another word begins."""
    assert len(words_of([3]) ^ words_of([1])) == 0
    assert words_of([0, 3]) - words_of([0, 1]) and words_of([0, 1]) - words_of([0, 3])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_adds_no_word(side):
    ids, mask = [0, 1, 2, 4, 0], [1] * 5
    padded = ([2, 2] + ids, [0, 0] + mask) if side == "left" else (ids + [2, 2], mask + [0, 0])
    assert words_of(*padded) == words_of(ids)


def test_ids_beyond_the_known_vocabulary_are_words():
    assert len(words_of([7])) == 2 and words_of([7]).isdisjoint(words_of([8]))


def test_words_of_nothing():
    assert word_buckets(torch.zeros(2, 0, dtype=torch.int64), torch.ones(2, 0), PLAIN, 8).shape == (2, 0)
