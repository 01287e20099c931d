"""The command line of train-router parsed: the router's own options, and those of `transformers.TrainingArguments`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from conversion.io.foreign_files import read_yaml
from conversion.router.arguments import OUTPUT_HELP, RouterArguments


@dataclass
class RouterTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with defaults for a small head on frozen features."""

    output_dir: str = field(metadata={"help": OUTPUT_HELP})
    learning_rate: float = field(default=1e-2, metadata={"help": "Initial learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Batch size per device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Batch size per device."})
    eval_accumulation_steps: int = field(default=16, metadata={"help": "Batches until results leave the device."})
    logging_steps: float = field(default=0.1, metadata={"help": "Log every so many steps, below 1: a share of all."})
    save_strategy: str = field(
        default="no", metadata={"help": "Intermediate checkpoints; the result is always saved."}
    )
    report_to: str = field(default="none", metadata={"help": "Integrations to report to."})
    dataloader_pin_memory: bool = field(default=torch.accelerator.is_available(), metadata={"help": "Pin memory."})


class RouterArgumentParser(HfArgumentParser):
    """Raises ValueError where argparse would print its usage and exit."""

    def error(self, message: str):
        raise ValueError(message)


def parse_arguments(arguments: list[str]) -> tuple[RouterArguments, RouterTrainingArguments]:
    """Parse the command line; `--config FILE.yaml` gives values that the rest of the command line overrides."""
    parser = RouterArgumentParser((RouterArguments, RouterTrainingArguments), allow_abbrev=False)
    config_parser = RouterArgumentParser((), add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    known, arguments = config_parser.parse_known_args(arguments)
    if known.config is not None:
        values = read_yaml(Path(known.config))
        set_defaults(parser, values, known.config)
    router_arguments, training_arguments, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(unknown)}")
    if (training_arguments.resume_from_checkpoint or "").lower() == "true":
        training_arguments.resume_from_checkpoint = True  # the last one of the output folder
    if (length := router_arguments.max_length) is not None and length < 1:
        raise ValueError(f"max_length is {length}, expected at least 1")
    if (count := router_arguments.style_queries) < 0:
        raise ValueError(f"style_queries is {count}, expected at least 0")
    if (threshold := router_arguments.threshold) is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected a probability in [0, 1]")
    return router_arguments, training_arguments


def set_defaults(parser: RouterArgumentParser, values: Any, file: str) -> None:
    """Make the values of a YAML mapping the parser's defaults; ValueError for a key that it does not know."""
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a mapping of option names to values")
    actions = {action.dest: action for action in parser._actions}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise ValueError(f"{file}: unknown option {key!r}")
        actions[name].required = False
        if actions[name].nargs == "+" and isinstance(value, str):
            value = [value]
        # Numbers such as 1e-3 are strings in YAML; argparse converts defaults that are strings.
        parser.set_defaults(**{name: value})
