"""The options of train-router that are not those of `transformers.TrainingArguments`. Importing it is quick."""

from dataclasses import dataclass, field, fields

from conversion.training.option_help import describe_options

OUTPUT_HELP = "Folder of the trained checkpoint."


@dataclass
class RouterArguments:
    """Which checkpoint and which data."""

    checkpoint: str = field(metadata={"help": "Channel-merged checkpoint: folder or Hub id."})
    train_data: list[str] = field(
        metadata={
            "metavar": "DATA",
            "help": "JSONL, JSON, Parquet or CSV files, or Hub datasets, with the columns `text` (or chat "
            "`messages`), `expert` (a name) and maybe `source`; or a YAML file that names datasets and their columns.",
        }
    )
    eval_data: list[str] | None = field(
        default=None,
        metadata={
            "metavar": "DATA",
            "help": "The same; default: a tenth of the training data, of every expert alike.",
        },
    )
    augment: bool = field(
        default=True, metadata={"help": "Also train on a variant of each `text`, as another source might write it."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "metavar": "L",
            "help": "The router reads the first and last half of so many tokens of a longer query "
            "(router.max_tokens).",
        },
    )
    threshold: float | None = field(
        default=None,
        metadata={
            "metavar": "P",
            "help": "Probability below which the default expert answers (router.threshold).",
        },
    )
    cache_features: bool = field(
        default=True,
        metadata={
            "help": "Compute what the router reads once, and keep it in memory; else in every epoch again: slow, but "
            "in little memory."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a model in the output folder."})


def option_help() -> list[tuple[str, str]]:
    """All options of train-router with what they do, for a reader of the command line's help."""
    options = (option for option in fields(RouterArguments) if option.name != "checkpoint")
    resuming = "Go on where a stopped run was that had saved checkpoints (--save-strategy steps)."
    return [
        *describe_options(options, OUTPUT_HELP, "--learning-rate 1e-2, --num-train-epochs 3, ..."),
        ("--resume-from-checkpoint true", resuming),
    ]
