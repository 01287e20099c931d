"""The base and, for each expert, a difference made small: low rank, one-bit signs, masks on a shared difference.

Written for comparison at equal bytes: each takes the most that the budget allows, and gives None where that is too
little. The base is stored in bfloat16, and every expert keeps its norms.
"""

import torch
import torch.nn.functional as F
from tiny_experts.make_tiny_experts import collate, label_loss, question_sequence
from torch.func import functional_call

from quality.problem import BYTES, Problem, State, Stored, rounded, set_weights

MASK_THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)  # those that the paper of TALL-masks tries
MASK_TEXTS = 64  # of calibration that a threshold is chosen on

DISTILLATION_STEPS = 40
DISTILLATION_BATCH = 16
DISTILLATION_RATE = 0.01  # of the logarithm of a scale


def low_rank_from_base(problem: Problem, budget: float) -> Stored | None:
    """Base plus truncated SVD of each expert's difference: SMILE (arXiv 2408.10174), the right expert given."""
    return _low_rank(problem, budget, problem.base)


def low_rank_from_mean(problem: Problem, budget: float) -> Stored | None:
    """Merged model plus truncated SVD of each expert's difference to it: Twin-Merging (arXiv 2406.15479)."""
    mean = {name: rounded(problem.stacked(name).mean(0)) for name in problem.matrices}
    return _low_rank(problem, budget, mean)


def _low_rank(problem: Problem, budget: float, shared: State) -> Stored | None:
    """Singular values of all experts and matrices compete: those that keep most for their bytes are stored."""
    spare = problem.allowance(budget) - _shared_bytes(problem) - problem.vector_bytes
    if spare < 0:
        return None
    parts = {
        (expert, name): torch.linalg.svd(weights[name] - shared[name], full_matrices=False)
        for expert, weights in enumerate(problem.experts)
        for name in problem.matrices
    }
    worth = torch.cat([s.square() / sum(problem.base[name].shape) for (_, name), (_, s, _) in parts.items()])
    price = torch.cat(
        [torch.full(s.shape, BYTES * sum(problem.base[name].shape)) for (_, name), (_, s, _) in parts.items()]
    )
    order = worth.argsort(descending=True)
    kept = torch.zeros_like(price, dtype=torch.bool)
    kept[order] = price[order].cumsum(0) <= spare
    ranks = {
        key: int(chosen.sum())
        for key, chosen in zip(parts, kept.split([len(s) for _, s, _ in parts.values()]), strict=True)
    }

    def matrix(expert: int, name: str) -> torch.Tensor:
        (left, values, right), rank = parts[expert, name], ranks[expert, name]
        scale = values[:rank].sqrt()
        return shared[name] + rounded(left[:, :rank] * scale) @ rounded(scale[:, None] * right[:rank])

    num_bytes = _shared_bytes(problem) + problem.vector_bytes + int(price[kept].sum())
    return Stored(problem.views(matrix), num_bytes)


def bitdelta(problem: Problem, budget: float) -> Stored | None:
    """BitDelta (arXiv 2402.10193): signs of the difference and one scale a matrix, trained by distillation.

    Where the budget has room for more, the rest of the difference gets signs and a scale again, as the paper does.
    Unlike there, embeddings are taken as other matrices are, for whole ones would not fit.
    """
    numel = sum(problem.base[name].numel() for name in problem.matrices)
    spare = problem.allowance(budget) - _shared_bytes(problem) - problem.vector_bytes
    layer_bytes = len(problem.experts) * (numel // 8 + BYTES * len(problem.matrices))
    layers = int(spare // layer_bytes)
    if layers < 1:
        return None
    weights = [SignLayers(problem.base, expert, problem.matrices, layers) for expert in problem.experts]
    for expert, delta in enumerate(weights):
        _distil(problem, expert, delta)
    num_bytes = _shared_bytes(problem) + problem.vector_bytes + layers * layer_bytes
    return Stored(problem.views(lambda expert, name: weights[expert].matrix(name).detach()), num_bytes)


class SignLayers:
    """One expert as base + sum of scale_k * sign_k: each layer takes the signs of what those before leave."""

    def __init__(self, base: State, expert: State, matrices: list[str], layers: int):
        self.base = base
        self.signs: dict[str, torch.Tensor] = {}  # (layers, O, I) of -1 and 1
        self.log_scales: dict[str, torch.Tensor] = {}  # (layers,)
        for name in matrices:
            rest = expert[name] - base[name]
            signs, scales = [], []
            for _ in range(layers):
                signs.append(torch.where(rest < 0, -1.0, 1.0))
                scales.append(rest.abs().mean().clamp(min=1e-8))
                rest = rest - scales[-1] * signs[-1]
            self.signs[name] = torch.stack(signs)
            self.log_scales[name] = torch.stack(scales).log().requires_grad_()

    def matrix(self, name: str) -> torch.Tensor:
        return self.base[name] + torch.einsum("k,koi->oi", self.log_scales[name].exp(), self.signs[name])


def _distil(problem: Problem, expert: int, delta: SignLayers) -> None:
    """Train the scales so that the logits on the expert's calibration texts are the expert's own."""
    teacher, model = problem.experts[expert], problem.model
    texts = problem.questions.calibration[problem.names[expert]]
    sequences = [question_sequence(problem.tokenizer, text) for text in texts]
    optimizer = torch.optim.Adam(delta.log_scales.values(), lr=DISTILLATION_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, DISTILLATION_STEPS)
    generator = torch.Generator().manual_seed(problem.seed)
    model.requires_grad_(False)
    for _ in range(DISTILLATION_STEPS):
        chosen = torch.randint(len(sequences), (DISTILLATION_BATCH,), generator=generator).tolist()
        batch = collate([sequences[number] for number in chosen], problem.tokenizer.pad_token_id)
        used = batch.pop("attention_mask")
        weights = teacher | {name: delta.matrix(name) for name in delta.signs}
        with torch.no_grad():
            target = _logits(model, teacher, batch["input_ids"], used)
        loss = F.mse_loss(_logits(model, weights, batch["input_ids"], used), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.requires_grad_(True)


def _logits(model, weights: State, input_ids: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Logits of the used tokens, with these weights and the head tied to their embedding."""
    tied = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    inputs = {"input_ids": input_ids, "attention_mask": used}
    return functional_call(model, tied, kwargs=inputs, args=(), tie_weights=False).logits[used.bool()]


def tall_masks(problem: Problem) -> Stored:
    """TALL-masks (arXiv 2405.07813): base, sum of all differences, and for each expert a mask of one bit an entry.

    The threshold of each expert is the one with the least loss on some of its calibration texts.
    """
    shared = {
        name: rounded((problem.stacked(name) - problem.base[name]).sum(0)) for name in problem.matrices
    }  # (O, I)

    def view(expert: int, threshold: float) -> State:
        weights = dict(problem.experts[expert])
        for name in problem.matrices:
            own = weights[name] - problem.base[name]
            mask = own.abs() >= threshold * (shared[name] - own).abs()
            weights[name] = problem.base[name] + mask * shared[name]
        return weights

    views = []
    for expert, name in enumerate(problem.names):
        texts = problem.questions.calibration[name][:MASK_TEXTS]
        batch = collate([question_sequence(problem.tokenizer, text) for text in texts], problem.tokenizer.pad_token_id)

        def loss(weights: State, batch: dict[str, torch.Tensor] = batch) -> float:
            with torch.no_grad():
                return label_loss(set_weights(problem.model, weights), **batch).item()

        views.append(min((view(expert, threshold) for threshold in MASK_THRESHOLDS), key=loss))
    numel = sum(problem.base[name].numel() for name in problem.matrices)
    mask_bytes = len(problem.experts) * numel // 8
    return Stored(views, 2 * _shared_bytes(problem) + mask_bytes + problem.vector_bytes)


def _shared_bytes(problem: Problem) -> int:
    """Bytes of one set of matrices."""
    return BYTES * sum(problem.base[name].numel() for name in problem.matrices)
