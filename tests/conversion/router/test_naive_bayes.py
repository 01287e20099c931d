"""The counted table against plain loops, what it does on unseen sources, and its discriminant beside it."""

import logging

import numpy as np
import pytest
import torch

from conversion.router.data_checks import check_amounts, check_separation
from conversion.router.discriminant import SHRINKAGE, discriminant
from conversion.router.doubt import Trunk, measure_doubt
from conversion.router.naive_bayes import PRIOR, SMOOTHING, count_queries, likely_mislabelled
from conversion.router.plain_tokens import plain_tokens
from conversion.vocabulary.prompts import load_tokenizer
from modeling_channel_merged.expert_router import ExpertRouter

EXPERTS = ["instruct", "math", "code"]
BUCKETS = 1 << 12


@pytest.fixture
def router():
    router = ExpertRouter(4, 3, "mean", "words", 8, BUCKETS, 1000)
    router.plain_tokens.copy_(-torch.arange(1, 1001))  # each token is a word
    return router


def queries_of(router_tokens, sources=("a",), count=30, seed=0):
    """`count` queries an expert and source: tokens of the expert's own, and of all experts."""
    generator = np.random.default_rng(seed)
    return [
        {
            "labels": expert,
            "source": f"{source}{expert}",
            "generated": False,
            "text": str(number),
            "input_ids": [*generator.choice(router_tokens[expert], 3), *generator.integers(100, 110, 3)],
        }
        for expert in range(len(router_tokens))
        for source in sources
        for number in range(count)
    ]


TOKENS = [np.arange(10 * expert, 10 * expert + 10) for expert in range(3)]


def all_of(data):
    return np.ones(len(data.labels), dtype=bool)


def test_weights_against_their_definition(router):
    queries = queries_of(TOKENS, count=8) + queries_of(TOKENS[:1], sources=("b",), count=3, seed=1)
    data = count_queries(queries, router)
    weights = data.weights(all_of(data))
    counts = np.zeros((BUCKETS, 3))
    sizes = {"a0": 8, "a1": 8, "a2": 8, "b0": 3}
    influence = np.array([sizes[query["source"]] ** -0.5 for query in queries])
    for query, share in zip(queries, influence / influence.mean()):
        ids = torch.tensor([query["input_ids"]])
        for bucket in router.buckets(ids, torch.ones_like(ids))[0].tolist():
            if bucket != BUCKETS:
                counts[bucket, query["labels"]] += share
    sums = counts.sum(0)
    for bucket in range(BUCKETS):
        if not counts[bucket].any():
            assert not weights[bucket].any()
            continue
        rates = (counts[bucket] + PRIOR * (counts[bucket] / sums).mean()) / (sums + PRIOR)
        expected = np.log(rates * np.prod(sums) ** (1 / 3) + SMOOTHING)
        assert weights[bucket] == pytest.approx(expected - expected.mean(), rel=1e-4, abs=1e-5)


def test_logits_are_those_of_the_router(router):
    queries = queries_of(TOKENS, count=5)
    data = count_queries(queries, router)
    weights = data.weights(all_of(data))
    router.ngrams.weight.data.copy_(torch.from_numpy(weights))
    for number, logits in enumerate(data.logits(weights, all_of(data))):
        ids = torch.tensor([queries[number]["input_ids"]])
        features = router.features(None, torch.ones_like(ids), ids)
        assert router(features)[0].tolist() == pytest.approx(logits.tolist(), abs=1e-4)
        assert router.known_share(features).item() == 1.0
    unknown = torch.tensor([[990, 991]])
    assert router.known_share(router.features(None, torch.ones_like(unknown), unknown)).item() < 0.5


def test_class_sizes_decide_nothing(router):
    """An expert with twenty times the queries does not attract others' words, nor those that nobody has seen."""
    queries = queries_of(TOKENS[:1], count=400) + queries_of(TOKENS, count=20, seed=1)
    data = count_queries(queries, router)
    weights = data.weights(all_of(data))
    test = count_queries(queries_of(TOKENS, count=50, seed=2), router)
    assert (test.logits(weights, all_of(test)).argmax(-1) == test.labels).mean() > 0.95


def test_mislabelled_queries_are_found_and_left_out(router, caplog):
    queries = queries_of(TOKENS, count=300)
    for query in queries[:4]:
        query["labels"] = 1
    data = count_queries(queries, router)
    mislabelled = likely_mislabelled(data, data.cross_validated())
    assert np.flatnonzero(mislabelled).tolist() == [0, 1, 2, 3]
    with caplog.at_level(logging.INFO, logger="conversion"):
        check_separation(queries, data, data.cross_validated(), mislabelled, EXPERTS)
    assert "4 queries look like another expert's and are not learned from: math 4" in caplog.text
    assert "hardly be told apart" not in caplog.text


def test_experts_that_cannot_be_told_apart_are_named(router, caplog):
    queries = queries_of([TOKENS[0], TOKENS[0], TOKENS[2]], count=40)
    data = count_queries(queries, router)
    held_out = data.cross_validated()
    check_separation(queries, data, held_out, likely_mislabelled(data, held_out), EXPERTS)
    (record,) = [record for record in caplog.records if "hardly be told apart" in record.message]
    assert "queries of instruct and math can" in record.message
    assert len(record.message.splitlines()) == 11 and "  math: '" in record.message


def test_few_queries_and_single_sources_are_named(router, caplog):
    check_amounts(queries_of(TOKENS[:2], count=20) + queries_of(TOKENS, sources=("b", "c"), count=60), EXPERTS)
    assert "few queries" not in caplog.text and "from one source" not in caplog.text
    check_amounts(queries_of(TOKENS[:2], count=20) + queries_of(TOKENS, sources=("b",), count=20), EXPERTS)
    assert "are wanted of every expert: instruct 40, math 40, code 20" in caplog.text
    assert "all queries of code are from one source" in caplog.text


def test_left_out_sources_are_not_learned_from(router):
    queries = queries_of(TOKENS, sources=("a", "b"), count=10) + queries_of(TOKENS[:1], sources=("c",), count=5)
    for query in queries[-5:]:
        query["generated"] = True
    data = count_queries(queries, router)
    left = data.left_out(all_of(data))
    names = np.array([query["source"] for query in queries])
    assert [set(names[inside]) for inside, _ in left] == [{"a0"}, {"b0"}, {"a1"}, {"b1"}, {"a2"}, {"b2"}]
    for inside, others in left:
        assert (inside ^ others).all()


@pytest.mark.parametrize("telling", [True, False])
def test_the_trunk_has_the_say_that_it_earns(router, telling):
    """Features that tell experts apart in every source have some; noise has little or none."""
    queries = queries_of([np.arange(30)] * 3 if telling else TOKENS, sources=("a", "b"), count=60)
    data = count_queries(queries, router)
    features = np.random.default_rng(0).normal(size=(len(queries), 6))
    if telling:
        features[np.arange(len(queries)), data.labels] += 4
    trunk = Trunk(features, np.arange(len(queries)))
    doubt = measure_doubt(data, all_of(data), trunk, [query["source"] for query in queries])
    assert doubt.trunk_share >= 3 if telling else doubt.trunk_share <= 0.3
    assert len(doubt.sources) == 6 and 0 <= doubt.min_known <= 1
    assert measure_doubt(data, all_of(data), None, [query["source"] for query in queries]).trunk_share == 0


def test_one_source_each_tells_nothing_of_others(router):
    queries = queries_of(TOKENS)
    data = count_queries(queries, router)
    assert measure_doubt(data, all_of(data), None, [query["source"] for query in queries]) is None


def test_discriminant_against_its_definition():
    generator = np.random.default_rng(0)
    labels, influence = generator.integers(0, 2, 40), generator.random(40) + 0.5
    features = generator.normal(size=(40, 3)) + labels[:, None]
    weights, biases = discriminant(features, labels, influence, 3)
    means, covariance = [], np.zeros((3, 3))
    for expert in (0, 1):
        rows = labels == expert
        shares = influence[rows] / influence[rows].sum()
        means.append((shares[:, None] * features[rows]).sum(0))
        for share, row in zip(shares, features[rows] - means[-1]):
            covariance += share * np.outer(row, row) / 2
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / 3 * np.eye(3)
    inverse = np.linalg.inv(covariance)
    expected = [inverse @ mean for mean in means]
    offsets = [-mean @ inverse @ mean / 2 for mean in means]
    assert weights[0] - weights[1] == pytest.approx(expected[0] - expected[1])
    assert biases[0] - biases[1] == pytest.approx(offsets[0] - offsets[1])
    assert not weights[2].any() and biases[2] == 0


def test_plain_tokens_know_no_case_and_no_space(stored):
    tokenizer = load_tokenizer(stored.folder)
    plain = plain_tokens(tokenizer)
    assert plain.shape == (len(tokenizer),) and plain.dtype == torch.int32 and (plain != 0).all()
