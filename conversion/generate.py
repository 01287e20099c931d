"""Answers of a channel-merged checkpoint to a few prompts, all in one mixed batch.

The router reads every prompt as it was trained to: in the checkpoint's default chat template and tokenizer, and of a
conversation only what `router_messages` leaves. The expert that it picks then gets the prompt in its own chat
template, segmented by its own tokenizer where the checkpoint keeps it, and its answer ends at its own end of sequence.

The installed classes run the checkpoint; code files beside the weights are not executed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BatchEncoding

from conversion.checkpoints.merged_checkpoint import whole_checkpoint
from conversion.io.foreign_files import foreign
from conversion.io.options import find_device
from conversion.vocabulary.expert_tokenizer import ExpertTokenizer, end_of_answer, until_end
from conversion.vocabulary.prompts import (
    Prompt,
    encode_prompts,
    load_tokenizer,
    router_queries,
    uses_chat_template,
    with_valid_text,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Answer:
    """One prompt, and who answered it.

    Attributes:
        probability: the router's, of the expert that answered; None where the expert was given.
        fallback: why the default expert answered, where the router did not choose; None where it did.
    """

    prompt: Prompt
    expert: str
    probability: float | None
    fallback: str | None
    text: str

    @property
    def question(self) -> str:
        """The prompt, or the last message of a conversation."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]

    @property
    def choice(self) -> str:
        """How the expert was chosen: "given", the router's probability, or why the default expert answered."""
        if self.probability is None:
            return "given"
        return f"{self.probability:.3f}" + (f", default: {self.fallback}" if self.fallback else "")


def answer_prompts(
    checkpoint: str | Path,
    prompts: list[Prompt],
    *,
    expert: str | None = None,
    max_new_tokens: int = 128,
    device: str | None = None,
    dtype: str = "auto",
    chat: bool | None = None,
) -> list[Answer]:
    """Answer `prompts` as one batch, each by the expert that the router picks, or all by `expert`.

    Args:
        prompts: texts, or lists of chat messages (`{"role": ..., "content": ...}`). What is no Unicode text in them,
            such as half a surrogate pair, is replaced.
        chat: put each prompt into a chat template, a text as the user's message; None: if the checkpoint has one.

    Raises:
        ValueError: no channel-merged checkpoint, no such expert, an empty prompt, an unknown dtype or device, messages
            without a chat template or without one of the user.
    """
    if not prompts:
        raise ValueError("there is no prompt to answer")
    prompts = [with_valid_text(prompt) for prompt in prompts]
    for number, prompt in enumerate(prompts, start=1):
        if not (prompt.strip() if isinstance(prompt, str) else prompt):
            raise ValueError(f"prompt {number} of {len(prompts)} is empty")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    device = find_device(device)
    source, config = whole_checkpoint(checkpoint)
    folder = source.folder
    if expert is not None:
        config.expert_id(expert)
    tokenizer = load_tokenizer(folder)
    chat = uses_chat_template(tokenizer, prompts, chat)
    queries = prompts if expert is not None else router_queries(prompts, config)
    with foreign(str(folder)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    experts, probabilities, fallbacks = ([value] * len(prompts) for value in (expert, None, None))
    if expert is None:
        experts, probabilities, fallbacks = choose_experts(model, encode_prompts(tokenizer, queries, chat).to(device))
    speakers = {
        name: ExpertTokenizer.of_checkpoint(folder, config, tokenizer, name) for name in dict.fromkeys(experts)
    }
    rows = [speakers[name].encode(prompt, chat) for name, prompt in zip(experts, prompts, strict=True)]
    for number, row in enumerate(rows, start=1):
        if not row:
            raise ValueError(f"prompt {number} of {len(prompts)} has no tokens: its tokenizer drops all of it")
    inputs = tokenizer.pad({"input_ids": rows}, padding=True, padding_side="left", return_tensors="pt").to(device)
    sequences = model.generate(
        **inputs, expert_index=experts, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
    )
    answers = sequences[:, inputs["input_ids"].shape[1] :].tolist()
    texts = [
        speakers[name].decode(until_end(answer, end_of_answer(model, name)))
        for name, answer in zip(experts, answers, strict=True)
    ]
    return [Answer(*fields) for fields in zip(prompts, experts, probabilities, fallbacks, texts, strict=True)]


def choose_experts(model: Any, inputs: BatchEncoding) -> tuple[list[str], list[float], list[str | None]]:
    """Of each query the expert that answers it, the router's probability for that one, and why it is the default."""
    routing = model.route(**inputs, top_k=1)
    experts = [model.config.expert_names[number] for number in routing.expert_index.tolist()]
    probabilities = routing.probabilities.gather(1, routing.expert_index[:, None]).flatten().tolist()
    return experts, probabilities, fallback_reasons(model, routing, inputs["attention_mask"])


def fallback_reasons(model: Any, routing: Any, attention_mask: torch.Tensor) -> list[str | None]:
    """Why the default expert answers each query, or None where the router chose; `routing` is of `route(top_k=1)`."""
    threshold, names = model.config.router["threshold"], model.config.expert_names
    any_doubt = model.config.router["fallback"] == "doubt"
    trained, reasons, known = model.router.is_trained, [], routing.known.tolist()
    none_of_these, experts = routing.none_of_these.tolist(), routing.expert_index.tolist()
    for number, (best, probability) in enumerate(
        zip(routing.top_experts[:, 0].tolist(), routing.top_probabilities[:, 0].tolist(), strict=True)
    ):
        if not trained:
            reasons.append("the router is untrained")
        elif not attention_mask[number].any():
            reasons.append("the router has nothing to read")
        elif none_of_these[number]:
            reasons.append(f"the router knows {known[number]:.0%} of its words")
        elif any_doubt and probability < threshold:
            reasons.append(f"{names[best]} has {probability:.3f}, below the threshold {threshold:.3f}")
        elif experts[number] != best:
            reasons.append(f"{names[best]} has {probability:.3f}, and the default more than {1 - threshold:.3f}")
        else:
            reasons.append(None)
    return reasons
