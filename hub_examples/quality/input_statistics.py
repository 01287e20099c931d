"""What the channels of one expert do on its calibration texts: covariances of inputs, gradients of outputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tiny_experts.example import Example
from tiny_experts.make_tiny_experts import collate, question_sequence
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BATCH = 16
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class InputStatistics:
    """By name of the matrix. The embedding, which is looked up and not multiplied, has no covariance."""

    covariance: dict[str, torch.Tensor]  # (I, I) float64, mean of x x^T over all tokens
    gradient: dict[str, torch.Tensor]  # (O,) float64, root mean square over texts of the answer loss's gradient


def input_statistics(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[Example]
) -> InputStatistics:
    """Statistics of one expert over its own question-answer texts, the loss on the answers.

    Of a linear layer the gradient is that of its outputs, of the embedding that of its weights.
    """
    sequences = [question_sequence(tokenizer, text) for text in texts]
    covariance: dict[str, torch.Tensor] = {}
    gradient: dict[str, torch.Tensor] = {}
    used = torch.zeros(0)  # (B, T) bool of the running batch
    tokens = 0

    def record(name: str, inputs: torch.Tensor, output: torch.Tensor):
        rows = inputs.detach()[used].double()
        covariance[name] = covariance.get(name, 0) + rows.T @ rows
        output.register_hook(lambda grad: add_square(name, grad[used]))

    def add_square(name: str, grad: torch.Tensor):
        gradient[name] = gradient.get(name, 0) + grad.double().square().sum(0)

    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, name=f"{path}.weight": record(name, inputs[0], output)
        )
        for path, module in model.model.named_modules(prefix="model")
        if isinstance(module, nn.Linear)
    ]
    for start in range(0, len(sequences), BATCH):
        batch = collate(sequences[start : start + BATCH], tokenizer.pad_token_id)
        used = batch["attention_mask"].bool()
        tokens += int(used.sum())
        model.zero_grad()
        labelled = (batch["labels"] >= 0).sum()
        (model(**batch).loss * labelled).backward()
        embedding_grad = model.model.embed_tokens.weight.grad.double()
        gradient[EMBEDDING] = gradient.get(EMBEDDING, 0) + embedding_grad.square().mean(1)
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return InputStatistics(
        {name: total / tokens for name, total in covariance.items()},
        {name: (total / len(sequences)).sqrt() for name, total in gradient.items()},
    )


def damped(covariance: torch.Tensor, damping: float) -> torch.Tensor:
    """Scaled to a mean diagonal of 1, and so much of the identity mixed in."""
    scaled = covariance / covariance.diagonal().mean()
    return (1 - damping) * scaled + damping * torch.eye(len(scaled), dtype=scaled.dtype)
