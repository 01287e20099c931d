"""Texts to calibrate on: each as its expert will be served after the merge, in ids of the merged vocabulary.

The rows have an `expert` (or "*": every expert reads it), and a `prompt` and its `completion`, or `messages` with a
turn of the assistant last. A
prompt stands in the expert's chat template where there is one; the loss is on the answer alone, which ends with the
token that ends the expert's answers.
"""

import logging
import reprlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

from conversion.io.data_rows import read_data
from conversion.vocabulary.expert_tokenizer import ExpertTokenizer
from conversion.vocabulary.merged_vocabulary import MergedVocabulary
from conversion.vocabulary.prompts import Prompt, with_valid_text

logger = logging.getLogger(__name__)

EVERY_EXPERT = "*"
FEW_TEXTS = 16
MAX_LENGTH = 1024
KEPT_OF_PROMPT = 4  # of a text that is too long the prompt keeps a quarter, and the answer the rest


@dataclass(frozen=True)
class CalibrationText:
    """One text of one expert."""

    expert: int
    input_ids: list[int]  # of the merged vocabulary: the prompt, the answer, its end
    answer_start: int  # the first token of the answer


def read_calibration_texts(
    data: str, vocabulary: MergedVocabulary, *, max_length: int = MAX_LENGTH
) -> list[CalibrationText]:
    """The calibration texts of a data file or Hub dataset, in its order.

    Args:
        data: JSONL, JSON, Parquet or CSV, or a Hub dataset (`id` or `id:split`).
        max_length: the most tokens of a text. Of a longer one the prompt's beginning is left out, and where a quarter
            of these tokens is left of that, the answer's end.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, a row has an unknown expert, no prompt, no answer or an answer without tokens,
            or a token that its expert does not have (with its number, from 1), or an expert has no texts.
    """
    table = read_data(data)
    names, columns = [own.name for own in vocabulary.experts], set(table.columns)
    if "expert" not in columns or not (columns >= {"prompt", "completion"} or "messages" in columns):
        raise ValueError(
            f"{data} has the columns {table.columns}, expected 'expert', and 'prompt' and 'completion' or 'messages'"
        )
    speakers = [ExpertTokenizer.of_vocabulary(vocabulary, expert) for expert in range(len(names))]
    chat = bool(vocabulary.chat_templates)
    texts, num_cut = [], 0
    for number, row in enumerate(table.rows, start=1):
        place = f"{data}, row {number}"
        if (name := row.get("expert")) not in (*names, EVERY_EXPERT):
            raise ValueError(f"{place}: unknown expert {reprlib.repr(name)}, the recipe has {names}")
        prompt, answer = _prompt_and_answer(row, place)
        if not chat and not isinstance(prompt, str):
            raise ValueError(f"{place} has messages, but no model has a chat template: give prompt and completion")
        for expert in range(len(names)) if name == EVERY_EXPERT else [names.index(name)]:
            try:
                start, end = _encoded(speakers[expert], vocabulary, expert, prompt, answer, chat)
            except ValueError as error:
                if name == EVERY_EXPERT:  # one expert lacks a token of it: the text is for the others
                    continue
                raise ValueError(f"{place}: {error}") from None
            num_cut += len(start) + len(end) > max_length
            start, end = _shortened(start, end, max_length)
            texts.append(CalibrationText(expert, [*start, *end], len(start)))
    if num_cut:
        logger.warning(
            "%s: %d of %d texts have more than %d tokens, their prompts lost their beginning",
            data,
            num_cut,
            len(texts),
            max_length,
        )
    _check_counts(texts, names, data)
    return texts


def _encoded(
    speaker: ExpertTokenizer, vocabulary: MergedVocabulary, expert: int, prompt: Prompt, answer: str, chat: bool
) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and of its answer, which has some and ends; all of them are the expert's."""
    start, end = speaker.encode_answer(prompt, answer, chat)
    if not end:
        raise ValueError(f"the tokenizer of {speaker.name} makes no token of the answer {reprlib.repr(answer)}")
    end = _ended(end, vocabulary, expert)
    for token in (*start, *end):
        if not vocabulary.present[expert, token]:
            token_name = vocabulary.tokenizer.convert_ids_to_tokens(token)
            raise ValueError(f"expert {speaker.name!r} does not have the token {token_name!r} of this text")
    return start, end


def _prompt_and_answer(row: dict[str, Any], place: str) -> tuple[Prompt, str]:
    """The two parts of a row, neither of them empty."""
    if row.get("messages"):
        return _of_messages(row["messages"], place)
    for key in ("prompt", "completion"):
        if not isinstance(value := row.get(key), str | None):
            raise ValueError(f"{place}: the {key} is {reprlib.repr(value)}, expected text")
        if not (value or "").strip():
            raise ValueError(f"{place}: the {key} is empty")
    return with_valid_text(row["prompt"]), with_valid_text(row["completion"])


def _of_messages(messages: Any, place: str) -> tuple[Prompt, str]:
    whole = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not whole:
        raise ValueError(f"{place}: messages is {reprlib.repr(messages)}, expected a list of role and content")
    *prompt, last = messages
    if last["role"] != "assistant" or not prompt:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"{place}: the messages are of {roles}, expected a question and then a turn of the assistant")
    if not last["content"].strip():
        raise ValueError(f"{place}: the assistant's turn is empty")
    return with_valid_text(prompt), with_valid_text(last["content"])


def _ended(answer: list[int], vocabulary: MergedVocabulary, expert: int) -> list[int]:
    """An answer with the token that ends those of its expert: its tokenizer's own, if that is one of several."""
    ends = vocabulary.eos_token_ids(expert)
    if not ends or answer[-1] in ends:
        return answer
    own, channels = vocabulary.experts[expert], vocabulary.channels[expert]
    usual = getattr(own.tokenizer, "eos_token_id", None)
    usual = int(channels[usual]) if usual is not None and usual < len(channels) else None
    return [*answer, usual if usual in ends else ends[0]]


def _shortened(prompt: list[int], answer: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """The end of a prompt and the beginning of its answer, together at most `max_length` tokens."""
    if len(prompt) + len(answer) <= max_length:
        return prompt, answer
    kept = min(len(prompt), max_length // KEPT_OF_PROMPT)
    answer = answer[: max_length - kept]
    return prompt[len(prompt) + len(answer) - max_length :], answer


def _check_counts(texts: list[CalibrationText], names: list[str], data: str) -> None:
    counts = Counter(text.expert for text in texts)
    for expert, name in enumerate(names):
        if not counts[expert]:
            raise ValueError(f"{data} has no text of expert {name!r}: give some of each")
    few = {name: counts[expert] for expert, name in enumerate(names) if counts[expert] < FEW_TEXTS}
    if few:
        logger.warning(
            "%s has few texts of %s: give at least %d, better a few hundred",
            data,
            ", ".join(f"{name} ({count})" for name, count in few.items()),
            FEW_TEXTS,
        )
