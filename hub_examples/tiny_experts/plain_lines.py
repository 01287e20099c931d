"""The worlds of the four skills in sentences without questions, to pretrain the base on."""

import random

from tiny_experts.chinese_skill import chinese_line
from tiny_experts.code_skill import code_line
from tiny_experts.english_skill import english_line
from tiny_experts.math_skill import math_line

PLAIN_LINES = {"instruct": english_line, "math": math_line, "code": code_line, "chinese": chinese_line}


def plain_lines(skill: str, count: int, seed: int) -> list[str]:
    """`count` sentences of the kind the skill is about; the same arguments give the same list."""
    rng = random.Random(f"{skill}/plain/{seed}")
    return [PLAIN_LINES[skill](rng) for _ in range(count)]
