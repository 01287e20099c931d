"""Exact-match accuracy of a causal language model on questions with one right answer."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_experts.example import Example


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The text a model is given for a user's question, up to where its answer begins."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def chat_answer(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The text that follows `chat_prompt` where a model gives the right answer, with the token that ends it."""
    messages = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}]
    conversation = tokenizer.apply_chat_template(messages, tokenize=False)
    # A line break after the end stands before the next turn: no model generates it.
    return conversation.removeprefix(chat_prompt(tokenizer, example.prompt)).rstrip("\n")


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    batch_size: int = 50,
    **generate_kwargs,
) -> list[str]:
    """Greedy answers without special tokens; `tokenizer` must pad on the left."""
    generate_kwargs = {"max_new_tokens": 40, "do_sample": False} | generate_kwargs
    decoded: list[str] = []
    for start in range(0, len(questions), batch_size):
        prompts = [chat_prompt(tokenizer, question) for question in questions[start : start + batch_size]]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
        output_ids = model.generate(**inputs, **generate_kwargs)  # (B, prompt tokens + new tokens)
        new_ids = output_ids[:, inputs["input_ids"].shape[1] :]
        decoded.extend(tokenizer.batch_decode(new_ids, skip_special_tokens=True))
    return decoded


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int = 50,
    **generate_kwargs,
) -> float:
    """Share of `examples` answered with exactly their completion, surrounding white space aside.

    `generate_kwargs` go to `model.generate` for every batch, for instance `expert_index="math"`.
    """
    model.eval()
    given = answers(model, tokenizer, [example.prompt for example in examples], batch_size, **generate_kwargs)
    right = sum(answer.strip() == example.completion.strip() for answer, example in zip(given, examples, strict=True))
    return right / len(examples)
