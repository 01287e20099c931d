"""Logits and labels of a router, and what an evaluation makes of them."""

import numpy as np

from conversion.router.metrics import evaluate_router, probabilities

EXPERTS = ["instruct", "math", "code"]


def calibrated(count: int, scale: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from the softmax of random logits, and those logits times `scale`: the temperature is `scale`."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(count, 3)) * 2
    chances = probabilities(logits)
    labels = (generator.random((count, 1)) > chances.cumsum(-1)).sum(-1)
    return (logits * scale).astype(np.float32), labels


def metrics_of(logits, labels, sources=None, temperature=1.0, threshold=0.0):
    sources = ["all"] * len(labels) if sources is None else sources
    router = {"temperature": temperature, "threshold": threshold, "default_expert": "instruct", "fallback": "doubt"}
    metrics = evaluate_router(logits, labels, sources, EXPERTS, router)
    return {**metrics, "training": {"queries": 9, "temperature_from": "nine queries"}}
