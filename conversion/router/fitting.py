"""A model's router in closed form: counted n-grams, a discriminant on trunk features, and how sure it may be."""

import logging
from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conversion.router.data import Query
from conversion.router.data_checks import check_separation
from conversion.router.doubt import Trunk, measure_doubt, trunk_scale
from conversion.router.metrics import fit_temperature
from conversion.router.naive_bayes import count_queries, likely_mislabelled
from conversion.router.plain_tokens import plain_tokens
from modeling_channel_merged.expert_router import make_router

logger = logging.getLogger(__name__)

ROUTER_FORM = {"features": "trunk_and_words", "ngram_buckets": 1 << 17, "fallback": "likely", "min_known": 0.0}
UNSEEN_TEMPERATURE = 1.5  # what routers needed on sources that they had not seen
TRUNK_QUERIES = 500  # most of a source that the trunk's head is made of
UNMEASURED_SHARE = 0.3  # of the trunk, where no source can be left out


def fit_router(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: list[Query],
    trunk_features: Callable[[list[Query]], np.ndarray],
) -> str:
    """Give the model a router of the newest form, its table and its head in closed form from encoded queries.

    Args:
        trunk_features: (B, H) features of the model's first blocks, of some of the queries.

    Returns:
        What its temperature was fitted to.
    """
    names, router, vocabulary = model.config.expert_names, model.config.router, plain_tokens(tokenizer)
    router |= {**ROUTER_FORM, "vocabulary": len(vocabulary)}
    new_router(model, vocabulary)
    data = count_queries(queries, model.router)
    held_out = data.cross_validated()
    mislabelled = likely_mislabelled(data, held_out)
    check_separation(queries, data, held_out, mislabelled, names)
    weights = data.weights(~mislabelled)
    chosen = data.some_of_each_source(TRUNK_QUERIES)
    features = trunk_features([queries[number] for number in np.flatnonzero(chosen)])
    mean, scale = features.mean(0), np.maximum(features.std(0), 1e-3 * features.std())
    trunk = Trunk((features - mean) / scale, np.flatnonzero(chosen))
    doubt = measure_doubt(data, ~mislabelled, trunk, [query["source"] for query in queries])
    share = UNMEASURED_SHARE if doubt is None else doubt.trunk_share
    if share == 0:
        router["features"] = "words"
        new_router(model, vocabulary)
    logger.info("trunk features have %g times the say of the n-grams", share)
    head, bias = trunk.head(data, ~mislabelled)
    factor = trunk_scale(share, data.logits(weights, chosen), trunk.logits((head, bias), chosen))
    with torch.no_grad():
        model.router.ngrams.weight.copy_(torch.from_numpy(weights))
        model.router.head.weight.copy_(torch.from_numpy(factor * head / scale))
        model.router.head.bias.copy_(torch.from_numpy(factor * (bias - head @ (mean / scale))))
    model.router.to(model.device).requires_grad_(True)
    if doubt is None:
        router["temperature"] = max(UNSEEN_TEMPERATURE, fit_temperature(held_out, data.labels))
        return "what other routers needed on sources that they had not seen, for too few experts here have two sources"
    router |= {"temperature": doubt.temperature, "min_known": doubt.min_known}
    return f"training queries of {len(set(doubt.sources))} sources, each left out in turn"


def new_router(model: PreTrainedModel, vocabulary: torch.Tensor):
    """Give the model the router that its config describes, with the plain tokens of its vocabulary."""
    model.router = make_router(model.config)
    model.router.plain_tokens.copy_(vocabulary)
