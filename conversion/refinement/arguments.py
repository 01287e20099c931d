"""The options of refine that are not those of `transformers.TrainingArguments`. Importing it is quick."""

from dataclasses import dataclass, field, fields

from conversion.training.option_help import describe_options

OUTPUT_HELP = "Folder of the refined checkpoint."
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class RefineArguments:
    """Which checkpoint, which texts, and what trains."""

    checkpoint: str = field(metadata={"help": "Channel-merged checkpoint: folder or Hub id."})
    train_data: str | None = field(
        default=None,
        metadata={
            "metavar": "DATA",
            "help": "JSONL, JSON, Parquet or CSV file, or Hub dataset, with the columns `prompt` and `completion` (or "
            "`messages`) and `expert` (a name); default: the recipe's calibration data.",
        },
    )
    eval_share: float = field(
        default=0.1,
        metadata={"metavar": "S", "help": "Share of every expert's texts that is held out to evaluate."},
    )
    max_length: int = field(
        default=1024,
        metadata={"metavar": "L", "help": "Of a text with more tokens the prompt's beginning is left out."},
    )
    top_k: int = field(
        default=64,
        metadata={"metavar": "K", "help": "Tokens of an expert's distribution that are kept; the rest is one bucket."},
    )
    variants: int = field(
        default=0,
        metadata={
            "metavar": "N",
            "help": "Half of what trains is so many variants of each text: its prompt changed, its expert's answer.",
        },
    )
    freeze_single_owner_rows: bool = field(
        default=False, metadata={"help": "Rows that only one expert reads stay bit for bit."}
    )
    train_per_expert: bool = field(
        default=False, metadata={"help": "Norms and whatever else is kept per expert train, too."}
    )
    patience: int = field(
        default=3,
        metadata={"metavar": "P", "help": "Evaluations in a row without a new best after which training ends."},
    )
    dtype: str = field(
        default="float32",
        metadata={
            "metavar": "DTYPE",
            "help": f"What the experts run in and the rows train in: {', '.join(DTYPES)}; stored as before.",
        },
    )
    max_shard_size: str = field(
        default="5GB", metadata={"metavar": "SIZE", "help": "Largest size of one safetensors file."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a model in the output folder."})

    def __post_init__(self):
        for name in ("max_length", "top_k", "patience"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.variants < 0:
            raise ValueError(f"variants is {self.variants}, expected at least 0")
        if not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share is {self.eval_share}, expected a share above 0 and below 1")


def option_help() -> list[tuple[str, str]]:
    """All options of refine with what they do, for a reader of the command line's help."""
    options = (option for option in fields(RefineArguments) if option.name != "checkpoint")
    return [
        ("--recipe RECIPE", "What the checkpoint was made from; its `refine:` may hold these options. [required]"),
        *describe_options(options, OUTPUT_HELP, "--learning-rate 1e-4, --max-steps 200, ..."),
    ]
