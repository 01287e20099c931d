"""Fine-tuning data as router data: a YAML file says which column of which dataset holds an expert's queries.

    datasets:
      - {path: meta-math/MetaMathQA, column: query, expert: math, max: 5000}
      - {path: alpaca.jsonl, column: [instruction, input], expert: instruct}
      - {path: some/chats, column: conversations, expert: instruct, split: train_sft, streaming: true, max: 2000}
    experts:
      medicine:
        description: Diseases, symptoms, drugs, anatomy, and what to ask a doctor.
        examples: [What are the side effects of metformin?]

A column holds texts, or conversations: messages of `role` and `content`, or of `from` and `value`. Relative paths
start at the file's folder.
"""

import logging
import reprlib
from pathlib import Path
from typing import Any

from conversion.io.data_rows import find_data, read_data, read_stream
from conversion.io.foreign_files import read_yaml

logger = logging.getLogger(__name__)

SUFFIXES = (".yaml", ".yml")
DATASET_KEYS = ("path", "column", "expert", "max", "split", "name", "streaming")
EXPERT_KEYS = ("description", "examples")
ROLES = {"human": "user", "gpt": "assistant"}  # of messages with `from` and `value`
DESCRIPTIONS = "descriptions"  # source of what a file says itself of its experts


def read_recipe(file: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of each dataset, with `text` or `messages`, `expert` and `source`, and where they are from.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key or value is not what is expected, or a dataset has no such column.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    recipe = read_yaml(file)
    if not isinstance(recipe, dict) or not recipe or not set(recipe) <= {"datasets", "experts"}:
        raise ValueError(f"{file} is {reprlib.repr(recipe)}, expected the keys 'datasets' and maybe 'experts'")
    entries, experts = recipe.get("datasets", []), recipe.get("experts", {})
    if not isinstance(entries, list) or not isinstance(experts, dict):
        raise ValueError(f"{file}: datasets must be a list, and experts names with descriptions and examples")
    parts = [_read_dataset(entry, f"{file}, dataset {number}", file.parent) for number, entry in enumerate(entries, 1)]
    if experts:
        parts.append((str(file), [row for name, entry in experts.items() for row in _described(name, entry, file)]))
    return parts


def _read_dataset(entry: Any, place: str, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    if not isinstance(entry, dict) or set(entry) - set(DATASET_KEYS) or not {"path", "expert"} <= set(entry):
        raise ValueError(f"{place} is {reprlib.repr(entry)}, expected path, expert and maybe {DATASET_KEYS[1:]}")
    count = entry.get("max")
    if count is not None and (type(count) is not int or count < 1):
        raise ValueError(f"{place}: max is {count!r}, expected a number of rows")
    if (streaming := entry.get("streaming", False)) and count is None:
        raise ValueError(f"{place}: streaming needs max, the number of rows to read")
    path, split, name = str(entry["path"]), entry.get("split"), entry.get("name")
    source = f"{path}:{split}" if split else path
    table = read_stream(path, split, name, count) if streaming else read_data(find_data(source, folder), name)
    columns = entry.get("column", "text")
    columns = columns if isinstance(columns, list) else [columns]
    if missing := [column for column in columns if column not in table.columns]:
        raise ValueError(f"{place}: {path} has the columns {table.columns}, expected {missing[0]!r}")
    rows = table.rows
    if count is not None and len(rows) > count:  # spread over all of them
        rows = [rows[number * len(rows) // count] for number in range(count)]
    queries = [query for row in rows if (query := _query([row.get(column) for column in columns], place))]
    if len(queries) < len(rows):
        logger.info("%s: %d of %d rows of %s have no query", place, len(rows) - len(queries), len(rows), path)
    return place, [{**query, "expert": entry["expert"], "source": table.name} for query in queries]


def _query(values: list[Any], place: str) -> dict[str, Any] | None:
    """One row's `text` or `messages`; None where there is nothing."""
    values = [value for value in values if value is not None and value != "" and value != []]
    if not values:
        return None
    if all(isinstance(value, str) for value in values):
        text = "\n\n".join(values)
        return {"text": text} if text.strip() else None
    (conversation, *more) = values
    if more or not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        raise ValueError(f"{place}: a row holds {reprlib.repr(values)}, expected texts or one list of messages")
    messages = [
        turn
        if "role" in turn
        else {"role": ROLES.get(turn.get("from"), turn.get("from")), "content": turn.get("value")}
        for turn in conversation
    ]
    return {"messages": messages} if any(message["role"] == "user" for message in messages) else None


def _described(name: str, entry: Any, file: Path) -> list[dict[str, Any]]:
    """The description and the examples of an expert, each a query."""
    place = f"{file}, expert {name}"
    if not isinstance(entry, dict) or not entry or set(entry) - set(EXPERT_KEYS):
        raise ValueError(f"{place} is {reprlib.repr(entry)}, expected description and examples")
    examples = entry.get("examples") or []
    texts = [entry["description"]] if entry.get("description") else []
    texts += examples if isinstance(examples, list) else [examples]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}: {reprlib.repr(text)} is no text")
    return [{"text": text, "expert": name, "source": DESCRIPTIONS} for text in texts]
