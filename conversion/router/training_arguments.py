"""The command line of train-router parsed: the router's own options, and those of `transformers.TrainingArguments`."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from conversion.router.arguments import OUTPUT_HELP, RouterArguments
from conversion.training.argument_parser import parse_dataclasses


@dataclass
class RouterTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with defaults for a small head on frozen features."""

    output_dir: str = field(metadata={"help": OUTPUT_HELP})
    num_train_epochs: float = field(
        default=0, metadata={"help": "Epochs of training after the table is counted; 0: none."}
    )
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


def parse_arguments(arguments: list[str]) -> tuple[RouterArguments, RouterTrainingArguments]:
    """Parse the command line; `--config FILE.yaml` gives values that the rest of the command line overrides."""
    router_arguments, training_arguments = parse_dataclasses(arguments, RouterArguments, RouterTrainingArguments)
    if (length := router_arguments.max_length) is not None and length < 1:
        raise ValueError(f"max_length is {length}, expected at least 1")
    if training_arguments.fsdp:
        raise ValueError("fsdp shards what trains, which is the router alone, small and saved whole: leave fsdp out")
    if (threshold := router_arguments.threshold) is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected a probability in [0, 1]")
    return router_arguments, training_arguments
