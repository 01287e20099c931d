"""The options of refine parsed: its own, and those of `transformers.TrainingArguments`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from conversion.merging.recipe import Recipe
from conversion.refinement.arguments import OUTPUT_HELP, RefineArguments
from conversion.training.argument_parser import parse_dataclasses

MAX_STEPS = 200
NOT_IN_RECIPES = ("checkpoint", "output_dir", "overwrite", "max_shard_size", "resume_from_checkpoint")


@dataclass
class RefineTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with defaults for a short training of rows that are nearly right."""

    output_dir: str = field(metadata={"help": OUTPUT_HELP})
    learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of a rising rate, below 1: a share of all."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Beta2 of AdamW."})
    num_train_epochs: float = field(
        default=0.0, metadata={"help": f"Passes over the texts; 0: max_steps, {MAX_STEPS} unless given."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts of a step and device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Texts that an expert or the model reads."})
    logging_steps: float = field(default=0.1, metadata={"help": "Log every so many steps, below 1: a share of all."})
    eval_strategy: str = field(default="steps", metadata={"help": "When held-out texts are evaluated."})
    eval_steps: float = field(default=0.1, metadata={"help": "Evaluate every so many steps, below 1: a share of all."})
    save_strategy: str = field(default="steps", metadata={"help": "When a stopped run could go on from."})
    save_steps: float = field(default=0.1, metadata={"help": "Save every so many steps, below 1: a share of all."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Intermediate checkpoints that are kept."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best rows, not the last."})
    metric_for_best_model: str = field(default="kl", metadata={"help": "What the best rows have least of."})
    greater_is_better: bool = field(default=False, metadata={"help": "Of that metric."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The loss reads all columns."})
    report_to: str = field(default="none", metadata={"help": "Integrations to report to."})
    dataloader_pin_memory: bool = field(default=torch.accelerator.is_available(), metadata={"help": "Pin memory."})

    def __post_init__(self):
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            self.max_steps = MAX_STEPS
        super().__post_init__()


def parse_options(
    recipe: Recipe, arguments: Sequence[str] = (), **options: Any
) -> tuple[RefineArguments, RefineTrainingArguments]:
    """Parse a command line over the options of a caller, and these over those of a recipe.

    Raises:
        ValueError: an unknown option, a missing one, or a value that cannot be.
    """
    own = dict(recipe.refine or {})
    for name in NOT_IN_RECIPES:
        if name in own:
            raise ValueError(f"refine.{name} of the recipe is given where the recipe is used: leave it out there")
    if isinstance(data := own.get("train_data"), str):
        # Here, for its library of data sets is slow to load and of no use to conversions that do not refine.
        from conversion.io.data_rows import find_data

        own["train_data"] = find_data(data, recipe.folder)
    args, training_args = parse_dataclasses(
        arguments, RefineArguments, RefineTrainingArguments, defaults={**own, **options}, source="refine"
    )
    if args.freeze_single_owner_rows:
        if training_args.weight_decay:
            raise ValueError(
                f"weight_decay is {training_args.weight_decay}, expected 0 with freeze_single_owner_rows: frozen rows "
                "would decay"
            )
        if training_args.fsdp:
            raise ValueError("freeze_single_owner_rows does not work with fsdp, which shards the rows: leave one out")
    return args, training_args


def check_recipe_options(recipe: Recipe, use_cpu: bool = False) -> None:
    """ValueError where `refine:` of a recipe has an option that there is not, or a value that cannot be."""
    if recipe.refine is not None:
        parse_options(recipe, checkpoint="checkpoint", output_dir="out", use_cpu=use_cpu)
