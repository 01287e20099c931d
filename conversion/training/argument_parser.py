"""A command line that mixes a command's own options with those of `transformers.TrainingArguments`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from conversion.io.foreign_files import read_yaml
from conversion.io.wording import one_line


class TrainingArgumentParser(HfArgumentParser):
    """Raises ValueError where argparse would print its usage and exit."""

    def error(self, message: str):
        raise ValueError(message)


def parse_dataclasses(
    arguments: Sequence[str], *classes: type, defaults: Mapping[str, Any] | None = None, source: str = "the options"
) -> tuple[Any, ...]:
    """Parse the command line; `--config FILE.yaml` gives values that the rest of the command line overrides.

    Args:
        classes: dataclasses of options; one of them is a `transformers.TrainingArguments`.
        defaults: values by option name, which both override.
        source: what an error calls these.

    Raises:
        ValueError: an unknown option, a missing one, or a value that cannot be read.
    """
    parser = TrainingArgumentParser(classes, allow_abbrev=False)
    config_parser = TrainingArgumentParser((), add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    known, arguments = config_parser.parse_known_args(arguments)
    set_defaults(parser, defaults or {}, source)
    if known.config is not None:
        set_defaults(parser, read_yaml(Path(known.config)), known.config)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except ImportError as error:  # an option of what is not installed
        raise ValueError(one_line(error)) from error
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(unknown)}")
    for options in parsed:
        if str(getattr(options, "resume_from_checkpoint", None)).lower() == "true":
            options.resume_from_checkpoint = True  # the last one of the output folder
    return tuple(parsed)


def set_defaults(parser: TrainingArgumentParser, values: Any, source: str) -> None:
    """Make the values of a mapping the parser's defaults; ValueError for a key that it does not know."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{source} must hold a mapping of option names to values")
    actions = {action.dest: action for action in parser._actions}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise ValueError(f"{source}: unknown option {key!r}")
        actions[name].required = False
        if actions[name].nargs == "+" and isinstance(value, str):
            value = [value]
        # Numbers such as 1e-3 are strings in YAML; argparse converts, and so checks, defaults that are strings.
        if isinstance(value, bool | int | float):
            value = str(value)
        parser.set_defaults(**{name: value})
