"""Questions with one right answer each, for the four skills of the tiny experts.

A skill is a list of question families; a family turns random numbers into one `Example`. Whether a question
belongs to the train or to the test split is decided by a hash of its text, so no question is ever in both,
whatever the seeds and counts; the facts behind a test question (3 + 4 is 7) may be trained in other words.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import Literal

from tiny_experts.chinese_skill import CHINESE_FAMILIES
from tiny_experts.code_skill import CODE_FAMILIES
from tiny_experts.english_skill import ENGLISH_FAMILIES
from tiny_experts.example import Example, Family
from tiny_experts.math_skill import MATH_FAMILIES

FAMILIES: dict[str, tuple[Family, ...]] = {
    "instruct": ENGLISH_FAMILIES,
    "math": MATH_FAMILIES,
    "code": CODE_FAMILIES,
    "chinese": CHINESE_FAMILIES,
}
SKILLS = tuple(FAMILIES)

TEST_SHARE = 8  # one question in eight is a test question
MAX_TRIES_PER_EXAMPLE = 200

LEAD_INS = (
    "",
    "",
    "Quick question: ",
    "Please help me. ",
    "I need this now: ",
    "Hi! ",
    "For my homework: ",
    "Next one. ",
)
CHINESE_LEAD_INS = ("", "", "请问，", "你好！", "帮帮我：", "考考你：", "作业题：", "再来一个：")


def asked_somehow(skill: str, example: Example, rng: random.Random) -> Example:
    """The question as one of many users would begin it."""
    lead_in = rng.choice(CHINESE_LEAD_INS if skill == "chinese" else LEAD_INS)
    return Example(lead_in + example.prompt, example.completion)


def split_of(prompt: str) -> Literal["train", "test"]:
    """The split a question belongs to, decided by its text alone."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return "test" if digest[0] % TEST_SHARE == 0 else "train"


def draw_examples(draw: Family, split: Literal["train", "test"], count: int, seed: str) -> list[Example]:
    """`count` different questions of one split that `draw` gives; the same arguments give the same list."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}, expected 'train' or 'test'")
    rng = random.Random(seed)
    chosen: dict[str, Example] = {}
    for _ in range(MAX_TRIES_PER_EXAMPLE * count):
        if len(chosen) == count:
            break
        example = draw(rng)
        if split_of(example.prompt) == split:
            chosen.setdefault(example.prompt, example)
    if len(chosen) < count:
        raise ValueError(f"{seed}: too few {split} questions: found {len(chosen)}, asked for {count}")
    return list(chosen.values())


def examples(
    skill: str, split: Literal["train", "test"], count: int, seed: int, families: Sequence[Family] | None = None
) -> list[Example]:
    """`count` different questions of one skill and split, of all its families or of those given.

    The same arguments give the same list.
    """
    if skill not in FAMILIES:
        raise ValueError(f"unknown skill {skill!r}, expected one of {', '.join(SKILLS)}")

    def draw(rng: random.Random) -> Example:
        return asked_somehow(skill, rng.choice(families or FAMILIES[skill])(rng), rng)

    return draw_examples(draw, split, count, f"{skill}/{split}/{seed}")
