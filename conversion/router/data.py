"""Labelled queries for the router: read, split into training and evaluation queries, tokenized and put into batches.

A query is a dict: `text`, `chat` (whether it goes into the chat template), `labels` (index of the expert that should
answer it), `source` (where it is from, for the evaluation), `generated` (whether a program wrote it: such queries are
evaluated only where the user gives them to evaluate) and, later, `input_ids` (list of int).
"""

import logging
import random
import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from conversion.io.data_rows import read_data
from conversion.router.augmentation import augment
from conversion.router.data_recipe import SUFFIXES as RECIPE_SUFFIXES
from conversion.router.data_recipe import read_recipe
from conversion.vocabulary.prompts import render, with_valid_text
from modeling_channel_merged.chat_turns import ChatTurns
from modeling_channel_merged.configuration_channel_merged import ChannelMergedConfig
from modeling_channel_merged.router_inputs import router_messages, shorten

logger = logging.getLogger(__name__)

COLUMNS = ("text", "messages", "expert", "source", "generated")

Query = dict[str, Any]


def load_rows(data: str) -> list[dict[str, Any]]:
    """All rows of a data file or Hub dataset, checked for nothing yet; each with its `source`.

    The source is the column of that name, else the file's name without its suffix, or the dataset's id.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing.
    """
    table = read_data(data)
    if "expert" not in table.columns or not {"text", "messages"} & set(table.columns):
        raise ValueError(f"{data} has the columns {table.columns}, expected 'expert', and 'text' or 'messages'")
    return [
        {
            **{column: row[column] for column in COLUMNS if column in row},
            "source": str(row.get("source") or table.name),
        }
        for row in table.rows
    ]


def load_queries(data: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: ChannelMergedConfig) -> list[Query]:
    """The queries of several files, Hub datasets or YAML files of datasets, one after the other; errors as there."""
    parts = []
    for name in data:
        recipe = Path(name).suffix in RECIPE_SUFFIXES
        parts += read_recipe(Path(name)) if recipe else [(name, load_rows(name))]
    return [query for place, rows in parts for query in read_rows(rows, place, tokenizer, config)]


def read_rows(
    rows: list[dict[str, Any]], data: str, tokenizer: PreTrainedTokenizerBase, config: ChannelMergedConfig
) -> list[Query]:
    """One query a row, not yet tokenized.

    Args:
        data: where the rows are from, for errors, and for the source of rows that do not name one.

    Raises:
        ValueError: an unknown expert or an empty query, with its row.
    """
    queries = []
    for number, row in enumerate(rows, start=1):
        place = f"{data}, row {number}"
        if (expert := row.get("expert")) not in config.expert_names:
            raise ValueError(
                f"{place}: unknown expert {reprlib.repr(expert)}, the checkpoint has {config.expert_names}"
            )
        text, chat = query_text(row, place, config.router["context"])
        if chat and not tokenizer.chat_template:
            raise ValueError(f"{place} has messages, but the tokenizer has no chat template: give `text` instead")
        label = config.expert_names.index(expert)
        generated = row.get("generated") or False
        if not isinstance(generated, bool):
            raise ValueError(f"{place}: generated is {reprlib.repr(generated)}, expected true or false")
        source = row.get("source", data)
        queries.append({"text": text, "chat": chat, "labels": label, "source": source, "generated": generated})
    return queries


def query_text(row: dict[str, Any], place: str, context: str) -> tuple[str, bool]:
    """The query of a row, and whether it goes into the chat template, as a message of the user."""
    if isinstance(text := row.get("text"), str) and text.strip():
        return with_valid_text(text), False
    if not isinstance(text, str | None):
        raise ValueError(f"{place}: text is {reprlib.repr(text)}, expected text")
    if not row.get("messages") and "text" in row:
        raise ValueError(f"{place}: the text is empty")
    conversation = row.get("messages") or []
    if not isinstance(conversation, list) or not all(isinstance(message, dict) for message in conversation):
        raise ValueError(f"{place}: messages is {reprlib.repr(conversation)}, expected a list of role and content")
    try:
        messages = router_messages(conversation, context)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if not messages[0]["content"].strip():
        raise ValueError(f"{place}: a message has no content")
    return with_valid_text(messages[0]["content"]), True


def with_variants(queries: list[Query], seed: int) -> list[Query]:
    """The queries, and one variant of each that does not stand in a chat template, the right frame already.

    A variant has the number of its `original`.
    """
    return [
        *queries,
        *(
            {**query, "text": augment(query["text"], seed), "original": number}
            for number, query in enumerate(queries)
            if not query["chat"]
        ),
    ]


def encode_queries(
    queries: list[Query], tokenizer: PreTrainedTokenizerBase, config: ChannelMergedConfig
) -> list[Query]:
    """The queries with the token ids that the router reads of them.

    Raises:
        ValueError: a text without tokens.
    """
    encoded = [dict(query) for query in queries]
    turns = ChatTurns.from_dict(config.router["turns"]) if config.router["turns"] else None
    for chat in (False, True):
        numbers = [number for number, query in enumerate(queries) if query["chat"] is chat]
        texts = [render(tokenizer, queries[number]["text"]) if chat else queries[number]["text"] for number in numbers]
        # A chat template writes the special tokens itself.
        ids = tokenizer(texts, add_special_tokens=not chat, verbose=False)["input_ids"] if texts else []
        for number, text, input_ids in zip(numbers, texts, ids):
            if not input_ids:
                raise ValueError(f"the tokenizer makes no token of the text {text[:80]!r}")
            if turns is not None and not chat:  # a text may be a whole conversation, in a template already
                input_ids = turns.router_query(input_ids, config.router["context"]) or input_ids
            encoded[number]["input_ids"] = shorten_ids(input_ids, config.router["max_tokens"])
    return encoded


def shorten_ids(input_ids: list[int], max_tokens: int) -> list[int]:
    """The first and the last half of a longer query, as the model shortens it."""
    ids = torch.tensor([input_ids])
    return shorten(ids, torch.ones_like(ids), None, max_tokens)[0][0].tolist()


def hold_out(
    queries: list[Query], share: float, seed: int, expert_names: list[str]
) -> tuple[list[Query], list[Query]]:
    """Split off `share` of every expert's queries, at least one where it has two, over its sources alike.

    Generated queries are for training; they are held out only of an expert that has no others.

    Returns:
        (train, eval); what was held out is logged.
    """
    chosen: set[int] = set()
    counts = []
    for expert, name in enumerate(expert_names):
        own = [number for number, query in enumerate(queries) if query["labels"] == expert]
        numbers = [number for number in own if not queries[number]["generated"]] or own
        count = max(1, round(share * len(numbers))) if len(numbers) > 1 else 0
        # In the order of the sources, and at random within each, every so many-th one is taken.
        generator = random.Random(f"{seed} {expert}")  # and not its name, which decides nothing
        generator.shuffle(numbers)
        numbers.sort(key=lambda number: queries[number]["source"])
        start = generator.random()
        chosen.update(numbers[int((start + step) * len(numbers) / count)] for step in range(count))
        counts.append(f"{name} {count} of {len(numbers)}")
    logger.info(
        "there are no evaluation data, so %d of %d training queries are held out to evaluate and not trained on: %s",
        len(chosen),
        len(queries),
        ", ".join(counts),
    )
    train = [query for number, query in enumerate(queries) if number not in chosen]
    return train, [queries[number] for number in sorted(chosen)]


def check_splits(train: list[Query], evaluation: list[Query], expert_names: list[str]) -> None:
    """Raise on an empty split; warn of experts without training queries and of queries in both splits."""
    for name, queries in (("training", train), ("evaluation", evaluation)):
        if not queries:
            raise ValueError(f"there are no {name} queries: {len(train)} for training, {len(evaluation)} to evaluate")
    counts = Counter(query["labels"] for query in train)
    for expert, name in enumerate(expert_names):
        if not counts[expert]:
            logger.warning("no training query names expert %s: the router will not learn to pick it", name)
    seen = {query["text"] for query in train}
    if shared := sum(query["text"] in seen for query in evaluation):
        logger.warning("%d of %d evaluation queries are training queries too", shared, len(evaluation))


class RouterCollator:
    """Pads queries, on the tokenizer's side, and stacks their experts and what else is known of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, queries: list[Query]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (B, T), both int64, or `features` (B, F) float32; `labels` (B,) int64."""
        if "features" in queries[0]:
            batch = {"features": torch.from_numpy(np.stack([query["features"] for query in queries]))}
        else:
            batch = dict(self.pad([{"input_ids": query["input_ids"]} for query in queries]))
        if "labels" in queries[0]:
            batch["labels"] = torch.tensor([query["labels"] for query in queries])
        return batch
