"""More texts than there are: variants of the prompts of calibration texts, answered by their own experts.

A few hundred texts show few of the ways in which an expert is asked; the more of them a student sees, the less it
learns by heart. A variant is made of nothing but the token ids of one expert's prompts, in one of three ways in turn:

- some tokens are exchanged for any others,
- more of them, for tokens that stand between the same neighbours elsewhere, or else behind the same one,
- the prompt goes on as another one does behind a token that both have, and a few tokens are exchanged.

What it then asks may be nonsense: what the expert says to it is right by definition, for it is the teacher.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel

from conversion.refinement.padding import batches, pad
from conversion.vocabulary.calibration_texts import CalibrationText

# Shares of tokens that are exchanged: for any, for those of the same places, and in a crossed prompt.
ANY_SHARE, LIKELY_SHARE, CROSSED_SHARE = 0.15, 0.3, 0.1


class Way(Protocol):
    """One way to make a variant of a prompt."""

    def __call__(self, prompt: list[int], generator: random.Random) -> list[int]:
        """The variant."""


def vary_prompts(texts: Sequence[CalibrationText], count: int, kept: frozenset[int], seed: int) -> list[list[int]]:
    """`count` variants of the prompt of each text of one expert, one round of all texts after the other.

    Args:
        kept: tokens that stay and that none is exchanged for: special ones.
    """
    generator = random.Random(f"variants {seed} {texts[0].expert}")
    prompts = [text.input_ids[: text.answer_start] for text in texts]
    pool = PromptTokens(prompts, kept)
    ways: tuple[Way, ...] = (pool.exchange, pool.exchange_likely, pool.cross)
    return [ways[number % len(ways)](prompt, generator) for number in range(count) for prompt in prompts]


class PromptTokens:
    """The tokens of some prompts, and where they stand."""

    def __init__(self, prompts: Sequence[Sequence[int]], kept: frozenset[int]):
        self._prompts, self._kept = prompts, kept
        self._longest = max(map(len, prompts))
        self._any: list[int] = []
        self._behind: dict[int, list[int]] = defaultdict(list)
        self._between: dict[tuple[int, int], list[int]] = defaultdict(list)
        self._places: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, prompt in enumerate(prompts):
            for place, token in enumerate(prompt):
                self._places[token].append((number, place))
                if token in kept:
                    continue
                self._any.append(token)
                if place:
                    self._behind[prompt[place - 1]].append(token)
                if 0 < place < len(prompt) - 1:
                    self._between[prompt[place - 1], prompt[place + 1]].append(token)

    def exchange(self, prompt: list[int], generator: random.Random, share: float = ANY_SHARE) -> list[int]:
        """The prompt with `share` of its tokens exchanged for any others."""
        return [
            generator.choice(self._any) if token not in self._kept and generator.random() < share else token
            for token in prompt
        ]

    def exchange_likely(self, prompt: list[int], generator: random.Random) -> list[int]:
        """The prompt with some tokens exchanged for those that stand at such a place elsewhere."""
        variant = list(prompt)
        for place, token in enumerate(prompt):
            if place and token not in self._kept and generator.random() < LIKELY_SHARE:
                likely = self._between[prompt[place - 1], prompt[place + 1]] if place < len(prompt) - 1 else []
                several = len(set(likely)) > 1
                variant[place] = generator.choice(likely if several else self._behind[prompt[place - 1]])
        return variant

    def cross(self, prompt: list[int], generator: random.Random) -> list[int]:
        """The prompt up to a token, then another one behind the same token; a few tokens exchanged."""
        place = generator.randrange(len(prompt))
        number, other = generator.choice(self._places[prompt[place]])
        crossed = [*prompt[: place + 1], *self._prompts[number][other + 1 :]]
        return self.exchange(crossed if len(crossed) <= self._longest else prompt, generator, CROSSED_SHARE)


@torch.inference_mode()
def answer_prompts(
    model: PreTrainedModel,
    expert: int,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    max_new_tokens: int,
    max_length: int,
    batch_size: int,
) -> list[CalibrationText]:
    """Prompts with what the expert's model answers, greedily, with the first of the tokens that end its answers.

    Args:
        max_new_tokens: the most tokens of an answer.
        max_length: the most tokens of a prompt and its answer; more than any prompt has.
    """
    settings = GenerationConfig(do_sample=False, eos_token_id=list(ends) or None, pad_token_id=0)
    texts: dict[int, CalibrationText] = {}
    for numbers in batches(prompts, batch_size):
        input_ids, mask = (side.to(model.device) for side in pad([prompts[number] for number in numbers], left=True))
        settings.max_new_tokens = min(max_new_tokens, max_length - input_ids.shape[1])
        outputs = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
        for number, output in zip(numbers, outputs[:, input_ids.shape[1] :].tolist()):
            stop = next((place for place, token in enumerate(output, start=1) if token in ends), len(output))
            prompt = list(prompts[number])
            texts[number] = CalibrationText(expert, [*prompt, *output[:stop]], len(prompt))
    return [texts[number] for number in range(len(prompts))]
