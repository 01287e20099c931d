"""Which expert answers a query, how sure the router is of it, and why the default expert answers where it does."""

from typing import Any

import torch
from transformers import BatchEncoding


def choose_experts(
    model: Any, inputs: BatchEncoding, *, whole: bool
) -> tuple[list[str], list[float], list[str | None]]:
    """Of each query the expert that answers it, the router's probability for that one, and why it is the default.

    Args:
        whole: the inputs hold nothing but what the router is to read.
    """
    routing = model.route(**inputs, top_k=1, whole=whole)
    experts = [model.config.expert_names[number] for number in routing.expert_index.tolist()]
    probabilities = routing.probabilities.gather(1, routing.expert_index[:, None]).flatten().tolist()
    return experts, probabilities, fallback_reasons(model, routing, inputs["attention_mask"])


def fallback_reasons(model: Any, routing: Any, attention_mask: torch.Tensor) -> list[str | None]:
    """Why the default or a pinned expert answers each query, or None; `routing` is of `route(top_k=1)`."""
    threshold, names = model.config.router["threshold"], model.config.expert_names
    any_doubt = model.config.router["fallback"] == "doubt"
    trained, reasons, known = model.router.is_trained, [], routing.known.tolist()
    none_of_these, experts = routing.none_of_these.tolist(), routing.expert_index.tolist()
    for number, (best, probability) in enumerate(
        zip(routing.top_experts[:, 0].tolist(), routing.top_probabilities[:, 0].tolist(), strict=True)
    ):
        if model.pinned_expert is not None:
            reasons.append(f"{model.pinned_expert} is pinned")
        elif not trained:
            reasons.append("the router is untrained")
        elif not attention_mask[number].any():
            reasons.append("the router has nothing to read")
        elif none_of_these[number]:
            reasons.append(f"the router knows {known[number]:.0%} of its words")
        elif any_doubt and probability < threshold:
            reasons.append(f"{names[best]} has {probability:.3f}, below the threshold {threshold:.3f}")
        elif experts[number] != best:
            reasons.append(f"{names[best]} has {probability:.3f}, and the default more than {1 - threshold:.3f}")
        else:
            reasons.append(None)
    return reasons
