"""More texts than there are: the prompts of calibration texts with other words in them, answered by their own experts.

A few hundred texts show few of the ways in which an expert is asked; the more of them a student sees, the less it
learns by heart. A variant takes a prompt and exchanges some of its tokens for tokens of the same expert's other
prompts. What it then asks may be nonsense: what the expert says to it is right by definition, for it is the teacher.
"""

import random
from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel

from conversion.refinement.padding import batches, pad
from conversion.vocabulary.calibration_texts import CalibrationText


def vary_prompts(
    texts: Sequence[CalibrationText], count: int, share: float, kept: frozenset[int], seed: int
) -> list[list[int]]:
    """`count` variants of the prompt of each text of one expert, one round of all texts after the other.

    Args:
        share: of a prompt's tokens that are exchanged, each by itself.
        kept: tokens that stay and that none is exchanged for: special ones.
    """
    generator = random.Random(f"variants {seed} {texts[0].expert}")
    prompts = [text.input_ids[: text.answer_start] for text in texts]
    pool = [token for prompt in prompts for token in prompt if token not in kept]
    return [
        [generator.choice(pool) if token not in kept and generator.random() < share else token for token in prompt]
        for _ in range(count)
        for prompt in prompts
    ]


@torch.inference_mode()
def answer_prompts(
    model: PreTrainedModel,
    expert: int,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
) -> list[CalibrationText]:
    """Prompts with what the expert's model answers, greedily, with the first of the tokens that end its answers."""
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(ends) or None, pad_token_id=0
    )
    texts: dict[int, CalibrationText] = {}
    for numbers in batches(prompts, batch_size):
        input_ids, mask = (side.to(model.device) for side in pad([prompts[number] for number in numbers], left=True))
        outputs = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
        for number, output in zip(numbers, outputs[:, input_ids.shape[1] :].tolist()):
            stop = next((place for place, token in enumerate(output, start=1) if token in ends), len(output))
            prompt = list(prompts[number])
            texts[number] = CalibrationText(expert, [*prompt, *output[:stop]], len(prompt))
    return [texts[number] for number in range(len(prompts))]
