"""The small files of a model's folder: which they are, how they are copied, and which names may become files.

Nothing that could run is copied from another model: no code, and no `auto_map`, by which Transformers finds some.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conversion.io.foreign_files import read_json

EXPERT_FOLDER = "experts"  # of every expert: its generation config and its own tokenizer
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
REPORT_FILE = "conversion_report.json"
CARD_FILE = "README.md"

# Files of a tokenizer and its chat templates; tiktoken vocabularies have names of their own.
TOKENIZER_PATTERNS = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    CHAT_TEMPLATE,
    "chat_template.json",
    f"{TEMPLATE_FOLDER}/*.jinja",
)
TOKENIZER_FILES = (*TOKENIZER_PATTERNS, "*.tiktoken")
COMPANION_FILES = (*TOKENIZER_FILES, GENERATION_CONFIG)
EXPERT_FILES = tuple(f"{EXPERT_FOLDER}/*/{pattern}" for pattern in COMPANION_FILES)

# What makes Transformers look for code beside a config, or in a repository that the config names.
CODE_KEYS = ("auto_map", "custom_pipelines")

MAX_NAME_BYTES = 100  # a template's file name may join two names, and file systems take 255 bytes
UNSAFE_CHARACTERS = frozenset('/\\:*?"<>|')
WINDOWS_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}


def check_file_name(name: Any, what: str) -> None:
    """ValueError unless `name`, which comes from a file of somebody else, can be the name of a file on any system.

    Args:
        what: whose name it is, for the error.
    """
    if (
        not isinstance(name, str)
        or not name.isprintable()
        or not 0 < len(name.encode()) <= MAX_NAME_BYTES
        or UNSAFE_CHARACTERS.intersection(name)
        or name.startswith(".")
        or name.endswith((".", " "))
        or name.partition(".")[0].lower() in WINDOWS_DEVICES
    ):
        shown = repr(name) if len(repr(name)) <= MAX_NAME_BYTES else f"{repr(name)[:MAX_NAME_BYTES]}..."
        raise ValueError(
            f"{what} {shown} cannot name a file: expected at most {MAX_NAME_BYTES} bytes of text without control "
            f"characters and {' '.join(sorted(UNSAFE_CHARACTERS))}, without a '.' at an end, and no device of Windows"
        )


def same_file(name: str, names: Iterable[str]) -> str | None:
    """The first of the names whose files would be those of `name` on a file system that does not know case."""
    return next((other for other in names if other.casefold() == name.casefold()), None)


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> list[Path]:
    """Copy the files of a folder that match any of the patterns, under the same relative names, as `copy_file` does.

    Returns:
        The copies.
    """
    copies = []
    for file in sorted({file for pattern in patterns for file in source.glob(pattern) if file.is_file()}):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy_file(file, copy)
        copies.append(copy)
    return copies


def copy_file(file: Path, copy: Path) -> None:
    """Copy one file byte for byte; a config that names code loses that."""
    values = read_config_file(file) if file.name.endswith("config.json") else {}
    if values.keys().isdisjoint(CODE_KEYS):
        shutil.copyfile(file, copy)
    else:
        write_json(copy, {key: value for key, value in values.items() if key not in CODE_KEYS})


def read_config_file(file: Path) -> dict[str, Any]:
    """The values of a JSON file, empty where there is none; ValueError where it holds no JSON object."""
    return read_json(file) if file.exists() else {}


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def drop_code_references(config: Any) -> None:
    """Take from a config, in place, what names code to run beside it or in another repository."""
    for key in CODE_KEYS:
        vars(config).pop(key, None)
