"""How much of its experts a contender keeps: exact match on their questions, divergence on text elsewhere."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tiny_experts.evaluate import exact_match
from tiny_experts.example import Example

from quality.problem import Problem, State, set_weights
from quality.questions import question_text

BATCH = 32


@dataclass(frozen=True)
class Quality:
    """Of N views: shares of right answers, and nats a token between each expert and its view."""

    exact_match: list[float]  # of each draw of test questions, mean over experts
    divergence: dict[str, float]  # mean over experts, on each kind of text
    left_out_match: float | None  # on families that no calibration shows

    @property
    def elsewhere(self) -> float:
        """Divergence on the other experts' questions, on plain lines and on unrelated instructions."""
        return statistics.fmean(value for kind, value in self.divergence.items() if kind != "left out")


class Measures:
    """The measures of one problem; what the experts say on text elsewhere is computed once."""

    def __init__(self, problem: Problem):
        self.problem = problem
        tokenizer, questions = problem.tokenizer, problem.questions
        self._texts: list[dict[str, list[str]]] = [
            {
                "others": [question_text(tokenizer, question) for question in questions.elsewhere(name)],
                "lines": questions.lines,
                "instructions": [question_text(tokenizer, question) for question in questions.instructions],
                "left out": [question_text(tokenizer, question) for question in questions.left_out[name]],
            }
            for name in problem.names
        ]
        self._expected = [
            {kind: self._log_probabilities(expert, texts) for kind, texts in kinds.items() if texts}
            for expert, kinds in zip(problem.experts, self._texts, strict=True)
        ]

    def quality(self, views: Sequence[State]) -> Quality:
        left_out = self._match(views, self.problem.questions.left_out)
        return Quality(
            [statistics.fmean(self._match(views, draw)) for draw in self.problem.questions.tests],
            self._divergence(views),
            statistics.fmean(left_out) if left_out else None,
        )

    def _match(self, views: Sequence[State], questions: dict[str, list[Example]]) -> list[float]:
        """Exact match of each view on its expert's questions; none where there are no questions."""
        problem = self.problem
        return [
            exact_match(set_weights(problem.model, view), problem.tokenizer, questions[name], batch_size=128)
            for name, view in zip(problem.names, views, strict=True)
            if questions[name]
        ]

    def _divergence(self, views: Sequence[State]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for view, kinds, expected in zip(views, self._texts, self._expected, strict=True):
            for kind, target in expected.items():
                given = self._log_probabilities(view, kinds[kind])
                divergence = F.kl_div(given, target, reduction="batchmean", log_target=True)
                found.setdefault(kind, []).append(divergence.item())
        return {kind: statistics.fmean(values) for kind, values in found.items()}

    @torch.inference_mode()
    def _log_probabilities(self, weights: State, texts: Sequence[str]) -> torch.Tensor:
        """Of every next token of every text: (tokens, V)."""
        model, tokenizer = set_weights(self.problem.model, weights), self.problem.tokenizer
        parts = []
        for start in range(0, len(texts), BATCH):
            inputs = tokenizer(list(texts[start : start + BATCH]), padding=True, return_tensors="pt")
            logits = model(**inputs).logits
            predicts = inputs["attention_mask"][:, :-1].bool()  # padding is on the left
            parts.append(logits[:, :-1][predicts].log_softmax(-1))
        return torch.cat(parts)
