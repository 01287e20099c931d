"""What came of a refinement, as plain values for report and card, and as a table for the terminal."""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from rich.markup import escape
from rich.table import Table
from transformers import TrainerState

from conversion.hub.refinement_section import divergence_rows, outcome
from conversion.refinement.arguments import RefineArguments
from conversion.refinement.training_arguments import RefineTrainingArguments
from conversion.vocabulary.calibration_texts import CalibrationText

# Options of both kinds, by which a reader of the report could do the same.
SHOWN = (
    "eval_share",
    "max_length",
    "top_k",
    "variants",
    "train_per_expert",
    "freeze_single_owner_rows",
    "patience",
    "dtype",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "bf16",
    "fp16",
    "seed",
)


def refinement_record(
    state: TrainerState,
    train: Sequence[CalibrationText],
    held_out: Sequence[CalibrationText],
    names: Sequence[str],
) -> dict[str, Any]:
    """Divergences before and after, and how it was trained.

    Args:
        state: of a Trainer whose first evaluation was of the input, and whose last of what would be stored.
        train, held_out: the texts.
        names: of the experts.
    """
    evaluations = [entry for entry in state.log_history if "eval_kl" in entry]
    before, after = evaluations[0], evaluations[-1]
    improved = after["eval_kl"] < before["eval_kl"]  # not where it is NaN
    kept = after if improved else before
    return {
        "improved": improved,
        "kl_before": before["eval_kl"],
        "kl_after": kept["eval_kl"],
        "experts": {
            name: {
                "texts": sum(text.expert == expert for text in train),
                "held_out": sum(text.expert == expert for text in held_out),
                "kl_before": before[f"eval_kl_{name}"],
                "kl_after": kept[f"eval_kl_{name}"],
            }
            for expert, name in enumerate(names)
        },
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "evaluations": {entry["step"]: entry["eval_kl"] for entry in evaluations[:-1]},
    }


def shown_options(args: RefineArguments, training_args: RefineTrainingArguments) -> dict[str, Any]:
    """The options that a reader of the report wants to know."""
    values = {name: getattr(part, name) for part in (args, training_args) for name in SHOWN if hasattr(part, name)}
    return {name: str(value) if isinstance(value, Enum) else value for name, value in values.items()}


def refinement_table(record: Mapping[str, Any]) -> list[Table | str]:
    """The divergences for a terminal, as rich renderables."""
    head, rows = divergence_rows(record)
    table = Table(head[0])
    for name in head[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*map(escape, row))
    return [table, outcome(record)]
