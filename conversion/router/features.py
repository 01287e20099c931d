"""What a router reads, computed once for every query, and the router alone trained on that."""

import logging

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from conversion.io.options import format_bytes
from conversion.router.data import Query, RouterCollator
from conversion.router.training_arguments import RouterTrainingArguments

logger = logging.getLogger(__name__)


class RouterFeatures(nn.Module):
    """The frozen part of a model on the way to its router: queries in, the router's inputs out."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": self.model.router_features(input_ids, attention_mask)}


class RouterOnFeatures(nn.Module):
    """A model's router alone, on inputs computed beforehand; what it learns, the model has learned."""

    accepts_loss_kwargs = True  # the Trainer then counts the queries of accumulated batches

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.router = model.router
        self.router_loss = model.router_loss

    def forward(
        self,
        features: torch.Tensor,
        labels: torch.LongTensor,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Loss and (B, N) logits, from features (B, F) and labels (B,)."""
        logits = self.router(features)
        return {"loss": self.router_loss(logits, labels, num_items_in_batch), "logits": logits}


def cache_features(
    model: PreTrainedModel, queries: list[Query], collator: RouterCollator, args: RouterTrainingArguments
) -> list[Query]:
    """The queries with the router's inputs in the place of their tokens; one pass over all of them, on all devices."""
    if model.router.reads_trunk:
        blocks, all_blocks = model.config.router["layers"], model.config.num_hidden_layers
        logger.info("running the first %d of %d blocks on %d queries, once", blocks, all_blocks, len(queries))
    order = sorted(range(len(queries)), key=lambda number: -len(queries[number]["input_ids"]))  # little padding
    texts = [{"input_ids": queries[number]["input_ids"]} for number in order]
    features = Trainer(RouterFeatures(model), args, collator, eval_dataset=texts).predict(texts).predictions
    cached = [{key: value for key, value in query.items() if key != "input_ids"} for query in queries]
    for number, row in zip(order, features):
        cached[number]["features"] = row
    logger.info("%d features of each are kept, %s", features.shape[1], format_bytes(features.nbytes))
    return cached


def trunk_features(
    model: PreTrainedModel, queries: list[Query], collator: RouterCollator, args: RouterTrainingArguments
) -> np.ndarray:
    """(B, H) float64 features of the first blocks alone."""
    columns = slice(model.config.hidden_size)
    return np.stack([query["features"][columns] for query in cache_features(model, queries, collator, args)]).astype(
        np.float64
    )
