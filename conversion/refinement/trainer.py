"""The Trainer of a refinement: the loss is the divergence from each text's own expert.

Shapes: B texts of a batch, T tokens, P positions of all of them, V tokens of the vocabulary.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, Trainer

from conversion.refinement.divergence import TopTokens, divergence

logger = logging.getLogger(__name__)


class RefinementTrainer(Trainer):
    """Trains on batches of `texts.collate`, in which each text runs as its own expert.

    A loss that is not finite ends the training, before it reaches the rows.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The divergence a token, a mean over the experts' means in expectation.

        Args:
            num_items_in_batch: the positions of all accumulated batches, on all processes.
        """
        weighted = batch_divergence(model, inputs) * inputs["weights"][inputs["row"]]
        if num_items_in_batch is None:
            return weighted.mean()
        # Gradients of several processes are averaged, and the positions counted over all of them.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return weighted.sum() * processes / torch.as_tensor(num_items_in_batch).flatten()[0]

    def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args)
        if not self.accelerator.gather(loss.isfinite()).all():
            if not self.control.should_training_stop:
                logger.warning("the loss of step %d is not finite: training ends here", self.state.global_step + 1)
            model.zero_grad(set_to_none=False)  # which a gradient scaler would miss
            self.control.should_training_stop = True
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """The divergence and the positions of each text (B, 2), and its expert (B,)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            terms = batch_divergence(model, inputs)
        sums = torch.zeros(len(inputs["input_ids"]), 2, device=terms.device)
        sums.index_add_(0, inputs["row"], torch.stack([terms, torch.ones_like(terms)], dim=1))
        return None, sums, inputs["expert_index"]


def batch_divergence(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The divergence of every position of a batch: (P,) float32."""
    names = ("input_ids", "attention_mask", "expert_index")
    logits = model(**{name: inputs[name] for name in names}, use_cache=False).logits  # (B, T, V)
    predicting = inputs["attention_mask"][:, 1:].bool()
    teacher = TopTokens(*(inputs[name] for name in TopTokens._fields))
    return divergence(logits[:, :-1][predicting], teacher)


def expert_divergences(prediction: EvalPrediction, names: Sequence[str]) -> dict[str, float]:
    """The divergence a token of every expert, `kl_<name>`, and the mean over the experts, `kl`."""
    sums, experts = prediction.predictions.astype(np.float64), prediction.label_ids
    means = {}
    for expert, name in enumerate(names):
        total, count = sums[experts == expert].sum(0)
        means[f"kl_{name}"] = float(total / count)
    return {"kl": float(np.mean(list(means.values()))), **means}
