"""Variants of training queries, so that the router does not learn how one source happens to write them.

What a variant adds is the same for every expert: the frames that chat front ends and evaluation harnesses put around
a question, a polite word before or after it. What it takes away is the end of the query, its capitals or line breaks.
"""

import random
from collections.abc import Callable

FRAMES = (
    "### Instruction:\n{}\n\n### Response:",
    "Question: {}\nAnswer:",
    "Q: {}\nA:",
    "User: {}\nAssistant:",
    "[INST] {} [/INST]",
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "Below is a task.\n\n{}\n\nYour reply:",
    "问题：{}\n回答：",
)
OPENINGS = (
    *("Please help me with this. ", "Hi! ", "Hello, I have a question: ", "Can you help? ", "I need this today: "),
    *("Read carefully. ", "Here is my request:\n\n", "你好，", "请帮我看一下：", "Next one: ", "Task 3.\n"),
)
CLOSINGS = (
    " Thanks!",
    " Thank you in advance.",
    "\nBe brief.",
    "\nThink step by step.",
    " 谢谢！",
    "\n\nGive reasons.",
)


def _truncated(text: str, rng: random.Random) -> str:
    """The first half to nine tenths, as of a prompt that is still being typed."""
    kept = text[: max(1, int(len(text) * rng.uniform(0.5, 0.9)))]
    return kept if kept.strip() else text


CHANGES: tuple[Callable[[str, random.Random], str], ...] = (
    lambda text, rng: rng.choice(FRAMES).replace("{}", text),
    lambda text, rng: rng.choice(OPENINGS) + text,
    lambda text, rng: text + rng.choice(CLOSINGS),
    lambda text, rng: rng.choice(OPENINGS) + text + rng.choice(CLOSINGS),
    _truncated,
    lambda text, rng: text.lower(),
    lambda text, rng: " ".join(text.split()),
)


def augment(text: str, seed: int) -> str:
    """One variant of a query; the same text and seed give the same one, whatever other queries there are.

    Args:
        text: must hold more than white space.
        seed: another one gives another variant.
    """
    rng = random.Random(f"{seed}\n{text}")
    return rng.choice(CHANGES)(text, rng)
