"""Answers of a channel-merged checkpoint to a few prompts, all in one mixed batch.

The installed classes run the checkpoint; code files beside the weights are not executed.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from conversion.merged_checkpoint import read_config, resolve_folder

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Answer:
    """One prompt, the expert that answered it and the router's probability for it (None: the expert was given)."""

    prompt: str
    expert: str
    probability: float | None
    text: str


def answer_prompts(
    checkpoint: str | Path,
    prompts: list[str],
    *,
    expert: str | None = None,
    max_new_tokens: int = 128,
    device: str | None = None,
    dtype: str = "auto",
    chat: bool | None = None,
) -> list[Answer]:
    """Answer `prompts` as one batch, each by the expert that the router picks, or all by `expert`.

    Args:
        chat: put each prompt into the tokenizer's chat template; None: if it has one.

    Raises:
        ValueError: no channel-merged checkpoint, no such expert, an empty prompt, an unknown dtype or device.
    """
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} of {len(prompts)} is empty")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    device = find_device(device)
    folder = resolve_folder(checkpoint)
    config = read_config(folder)
    if expert is not None:
        config.expert_id(expert)
    tokenizer = load_tokenizer(folder)
    inputs = encode_prompts(tokenizer, prompts, chat).to(device)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    outputs = model.generate(
        **inputs,
        expert_index=expert,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
    )
    texts = tokenizer.batch_decode(outputs.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    experts = outputs.expert_index.tolist()
    probabilities = [None] * len(prompts)
    if outputs.router_logits is not None:
        probabilities = outputs.router_logits.softmax(-1)[torch.arange(len(prompts)), outputs.expert_index].tolist()
    return [
        Answer(prompt, config.expert_names[index], probability, text)
        for prompt, index, probability, text in zip(prompts, experts, probabilities, texts)
    ]


def find_device(device: str | None) -> torch.device:
    """The named device, or the accelerator if there is one; ValueError where this machine does not have it."""
    if device is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with a padding token (the end-of-text token if it has none of its own)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {folder} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str], chat: bool | None) -> BatchEncoding:
    """Left-padded `input_ids` and `attention_mask`, both (B, T) int64."""
    if chat and not tokenizer.chat_template:
        raise ValueError("the tokenizer of this checkpoint has no chat template: leave out --chat")
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if chat:
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            for prompt in prompts
        ]
    # A chat template writes the special tokens itself.
    return tokenizer(
        prompts,
        padding=True,
        padding_side="left",
        add_special_tokens=not chat,
        return_token_type_ids=False,
        return_tensors="pt",
    )
