"""The options of a command that trains, for a reader of its help. Importing it is quick."""

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field
from typing import get_args

REQUIRED = " [required]"


def describe_options(options: Iterable[Field], output_help: str, example: str) -> list[tuple[str, str]]:
    """A command's own options with what they do, then what it shares with every training.

    Args:
        options: the command's own.
        output_help: what becomes of --output-dir.
        example: options of `transformers.TrainingArguments` with values.
    """
    return [
        *map(_describe, options),
        ("--output-dir OUT", f"{output_help}{REQUIRED}"),
        ("--config F.yaml", "Values of any of these options."),
        (example, "Every option of transformers.TrainingArguments works, too."),
    ]


def check_required(arguments: Sequence[str], described: Iterable[tuple[str, str]]) -> None:
    """ValueError where a command line leaves out what its description requires; a file of options may have it."""
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    required = [option.split()[0] for option, text in described if text.endswith(REQUIRED)]
    missing = [option for option in required if option not in given]
    if missing and "--config" not in given:
        raise ValueError(f"the following options are required: {', '.join(missing)}")


def _describe(option: Field) -> tuple[str, str]:
    name, notes = f"--{option.name.replace('_', '-')}", ""
    if "metavar" in option.metadata:
        name += f" {option.metadata['metavar']}"
    if list[str] in (option.type, *get_args(option.type)):
        name += "..."
    if option.default is True:
        name += " true|false"
    if option.default is MISSING:
        notes = REQUIRED
    elif option.default not in (None, False):
        notes = f" [default: {str(option.default).lower()}]"
    return name, option.metadata["help"] + notes
