"""What others wrote, read within limits: JSON and YAML, and what a library makes of a file.

Whatever such a file can cause is a ValueError of one line: the file, the field, its value, and what was expected.
Sizes are checked before anything is made of them.
"""

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import yaml

from conversion.io.wording import one_line

MAX_TEXT_BYTES = 64 << 20
MAX_DEPTH = 50
# Config fields by their names, and the most they may be: far beyond any model, far below what would take for ever.
MAX_COUNTS = (
    (re.compile("(layer|block|depth)(?!.*(size|dim))"), 1024),
    (re.compile("expert(?!.*(size|dim|rank))"), 4096),
    (re.compile("label"), 1 << 16),
    (re.compile("vocab"), 1 << 22),
)
SURROGATES = re.compile("[\ud800-\udfff]")


@contextmanager
def foreign(place: str) -> Iterator[None]:
    """Make one ValueError that begins with `place` of whatever a library raises because of what stands there."""
    try:
        yield
    except Exception as error:
        kind = type(error)
        message = one_line(error) or kind.__name__
        if kind.__module__ == "builtins" and not isinstance(error, ValueError | OSError):
            message = f"it cannot be used ({kind.__name__}: {message})"
        raise ValueError(f"{place}: {message}") from error


def read_text(file: Path) -> str:
    """The UTF-8 text of a file; ValueError where it is none, or too long."""
    with file.open("rb") as stream:
        data = stream.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"{file} is longer than {MAX_TEXT_BYTES:,} bytes, the most that is read")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object of a file."""
    check_ordinary(file)
    return parse_json(read_text(file), str(file))


def parse_json(text: str | bytes, place: str) -> dict[str, Any]:
    """A JSON object whose keys are unique; ValueError with `place` where it is something else."""
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{place} is {reprlib.repr(values)}, expected a JSON object")
    check_values(values, place)
    return values


def read_json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file and the numbers of their lines, or those of one JSON array, all in line 1.

    Only a line feed ends a line: U+2028 and its like may stand in a text.
    """
    with file.open(encoding="utf-8", newline="\n") as stream:
        for number, line in _lines(stream, file):
            place = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place} is not JSON: {one_line(error)}") from None
            for item in row if isinstance(row, list) and number == 1 else [row]:
                if not isinstance(item, dict):
                    raise ValueError(f"{place} has {reprlib.repr(item)}, expected a JSON object")
                yield number, item


def _lines(stream: TextIO, file: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank; an array that is written over several lines is one."""
    try:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                whole_array = number == 1 and line.strip() == "["
                yield number, line + stream.read() if whole_array else line
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None


def read_yaml(file: Path) -> Any:
    """The YAML document of a file; a key that stands twice in a mapping is refused with its lines."""
    text = read_text(file)
    try:
        _refuse_duplicates(yaml.compose(text, yaml.SafeLoader), file)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, TypeError) as error:  # TypeError: a key that is no scalar
        raise ValueError(f"{file} is not YAML: {one_line(error)}") from None
    except ValueError as error:  # also a number or a date that is none
        raise ValueError(one_line(error) if str(file) in str(error) else f"{file}: {one_line(error)}") from None
    check_values(values, str(file))
    return values


def check_ordinary(file: Path) -> None:
    """ValueError for a pipe or a device, which would be waited for."""
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is no ordinary file")


def check_values(values: Any, place: str) -> None:
    """ValueError for plain values that are nested too deeply, or hold text that no file can hold."""
    levels, seen = [values], set()
    for _ in range(MAX_DEPTH):
        below = []
        for value in levels:
            if isinstance(value, str) and SURROGATES.search(value):
                raise ValueError(f"{place} holds {reprlib.repr(value)}, which is no Unicode text (half a pair)")
            if isinstance(value, dict | list) and id(value) not in seen:  # YAML's aliases are one object
                seen.add(id(value))
                below += value if isinstance(value, list) else [*value.keys(), *value.values()]
        if not below:
            return
        levels = below
    raise ValueError(f"{place} is nested more than {MAX_DEPTH} levels deep")


def check_counts(values: Mapping[str, Any], place: str) -> None:
    """ValueError for a number in a config that would make more layers, experts or tokens than any model has."""
    for key, value in values.items():
        if isinstance(value, Mapping) and str(key).endswith("_config"):
            check_counts(value, place)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        for name, most in MAX_COUNTS:
            if name.search(str(key)) and abs(value) > most:
                raise ValueError(f"{place}: {key} is {reprlib.repr(value)}, expected at most {most:,}")


def check_token_ids(values: Mapping[str, Any], place: str) -> None:
    """ValueError for a special token that is no id, nor several."""
    for key, value in values.items():
        several = value if isinstance(value, list) else [value]
        if value is not None and not all(type(number) is int for number in several):
            raise ValueError(f"{place}: {key} is {reprlib.repr(value)}, expected a token's number, or a list of them")


def read_model_config(file: Path) -> dict[str, Any]:
    """The plain values of a model's config.json, before Transformers makes anything of them."""
    values = read_json(file)
    family = values.get("model_type")
    if not isinstance(family, str):
        raise ValueError(f"{file}: model_type is {reprlib.repr(family)}, expected the name of an architecture")
    check_counts(values, str(file))
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = set()
        twice = next(key for key, _ in pairs if key in names or names.add(key))
        raise ValueError(f"the key {reprlib.repr(twice)} stands there twice")
    return values


def _refuse_duplicates(root: yaml.Node | None, file: Path) -> None:
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            nodes.append(value)
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(
                    f"{file}, line {line}: the key {reprlib.repr(key.value)} stands there again, "
                    f"first in line {lines[key.value]}"
                )
            lines[key.value] = line
