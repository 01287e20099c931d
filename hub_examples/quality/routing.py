"""A merged checkpoint with a router of its own: trained on the calibration questions, asked in mixed batches."""

import json
import random
from pathlib import Path

import torch
from tiny_experts.evaluate import answers
from tiny_experts.example import Example
from transformers import AutoModelForCausalLM

from conversion.train_router import main as train_router
from quality.problem import Problem


def routed_match(problem: Problem, checkpoint: Path) -> float:
    """Exact match on the first draw of test questions, the router deciding which expert answers."""
    questions, routed = problem.questions, problem.scratch / "routed"
    train, test = problem.scratch / "router_train.jsonl", problem.scratch / "router_test.jsonl"
    write_queries(train, questions.calibration)
    write_queries(test, questions.tests[0])
    train_router(
        [
            *("--checkpoint", str(checkpoint), "--output-dir", str(routed), "--overwrite"),
            *("--train-data", str(train), "--eval-data", str(test)),
            *("--seed", str(problem.seed), "--logging-strategy", "no"),
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(routed, trust_remote_code=True, dtype=torch.float32).eval()
    asked = [question for group in questions.tests[0].values() for question in group]
    random.Random(problem.seed).shuffle(asked)
    given = answers(model, problem.tokenizer, [question.prompt for question in asked])
    right = sum(answer.strip() == question.completion.strip() for answer, question in zip(given, asked, strict=True))
    return right / len(asked)


def write_queries(file: Path, questions: dict[str, list[Example]]) -> None:
    """Questions of every expert with its name, as router data."""
    rows = [
        {"messages": [{"role": "user", "content": question.prompt}], "expert": name}
        for name, group in questions.items()
        for question in group
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
