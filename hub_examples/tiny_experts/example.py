"""What a skill's questions are made of: an example, and a family of them."""

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A bare user query and its one right answer."""

    prompt: str
    completion: str


Family = Callable[[random.Random], Example]
