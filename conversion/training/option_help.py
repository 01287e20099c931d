"""The options of a command that trains, for a reader of its help. Importing it is quick."""

from collections.abc import Iterable
from dataclasses import MISSING, Field
from typing import get_args


def describe_options(options: Iterable[Field], output_help: str, example: str) -> list[tuple[str, str]]:
    """A command's own options with what they do, then what it shares with every training.

    Args:
        options: the command's own.
        output_help: what becomes of --output-dir.
        example: options of `transformers.TrainingArguments` with values.
    """
    return [
        *map(_describe, options),
        ("--output-dir OUT", f"{output_help} [required]"),
        ("--config F.yaml", "Values of any of these options."),
        (example, "Every option of transformers.TrainingArguments works, too."),
    ]


def _describe(option: Field) -> tuple[str, str]:
    name, notes = f"--{option.name.replace('_', '-')}", ""
    if "metavar" in option.metadata:
        name += f" {option.metadata['metavar']}"
    if list[str] in (option.type, *get_args(option.type)):
        name += "..."
    if option.default is True:
        name += " true|false"
    if option.default is MISSING:
        notes = " [required]"
    elif option.default not in (None, False):
        notes = f" [default: {str(option.default).lower()}]"
    return name, option.metadata["help"] + notes
