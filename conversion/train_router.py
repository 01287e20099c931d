"""Train the router of a channel-merged checkpoint and save the complete checkpoint again.

    channel-merge train-router merged \\
        --train-data train.jsonl \\
        --eval-data eval.jsonl \\
        --output-dir routed \\
        --num-train-epochs 3 \\
        --learning-rate 1e-2

or, on several GPUs, `accelerate launch -m conversion train-router ...`. `--config router.yaml` gives the same options.

The data are a JSONL, JSON, Parquet or CSV file, or a Hub dataset (`id` or `id:split`; the split is `train` unless
named), with the columns `text` (taken as it stands) or `messages` (put into the chat template; an answer at the end is
left out, for the router reads queries), and `expert`, the name of the expert that should answer. The loss is the
cross-entropy over experts. Only the router trains; it reads the features of the first blocks, which run as the trunk
expert and stay frozen.
"""

import dataclasses
import json
import logging
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import load_dataset
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from conversion.export import COMPANION_FILES, copy_files
from conversion.generate import load_tokenizer
from conversion.hub_folder import CARD_FILE, EXPERT_FOLDER, REPORT_FILE
from conversion.merged_checkpoint import read_config, resolve_folder

logger = logging.getLogger(__name__)

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
EVAL_SHARE = 0.1
METRICS_FILE = "router_eval.json"
ROUTER_SECTION = "## Router"


@dataclass
class RouterArguments:
    """Which checkpoint and which data."""

    checkpoint: str = field(metadata={"help": "Channel-merged checkpoint: folder or Hub id."})
    train_data: str = field(metadata={"help": "File or Hub dataset with `text` or `messages`, and `expert`."})
    eval_data: str | None = field(
        default=None, metadata={"help": "The same; default: a tenth of the training data, of every expert alike."}
    )
    max_length: int = field(default=512, metadata={"help": "Longest query in tokens; the rest is cut off."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a model in the output folder."})


@dataclass
class RouterTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with defaults for a small linear head on frozen features."""

    output_dir: str = field(metadata={"help": "Folder of the trained checkpoint."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Initial learning rate."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Batch size per device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Batch size per device."})
    logging_steps: float = field(default=20, metadata={"help": "Log every so many steps."})
    save_strategy: str = field(
        default="no", metadata={"help": "Intermediate checkpoints; the result is always saved."}
    )
    report_to: str = field(default="none", metadata={"help": "Integrations to report to."})
    dataloader_pin_memory: bool = field(default=torch.accelerator.is_available(), metadata={"help": "Pin memory."})
    # The Trainer would take `labels` for a label too and then find no loss, and drop columns that it does not know.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off."})
    label_names: list[str] = field(default_factory=lambda: ["expert_labels"], metadata={"help": "Must stay."})


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
        values = yaml.safe_load(Path(known.config).read_text(encoding="utf-8"))
        set_defaults(parser, values, known.config)
    router_arguments, training_arguments, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(unknown)}")
    if router_arguments.max_length < 1:
        raise ValueError(f"max_length is {router_arguments.max_length}, expected at least 1")
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
        # Numbers such as 1e-3 are strings in YAML; argparse converts defaults that are strings.
        parser.set_defaults(**{name: value})


def load_rows(data: str) -> list[dict[str, Any]]:
    """All rows of a data file or Hub dataset, checked for nothing yet."""
    if (file_format := FILE_FORMATS.get(Path(data).suffix)) is not None:
        if not Path(data).is_file():
            raise FileNotFoundError(f"there is no file {data}")
        dataset = load_dataset(file_format, data_files=data, split="train")
    else:
        name, _, split = data.partition(":")
        dataset = load_dataset(name, split=split or "train")
    columns = dataset.column_names
    if "expert" not in columns or not {"text", "messages"} & set(columns):
        raise ValueError(f"{data} has the columns {columns}, expected 'expert', and 'text' or 'messages'")
    return dataset.select_columns([name for name in columns if name in ("text", "messages", "expert")]).to_list()


def encode_rows(
    rows: list[dict[str, Any]],
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    expert_names: list[str],
    max_length: int,
) -> list[dict[str, Any]]:
    """Token ids of every query and the index of its expert.

    Returns:
        One {"input_ids": list of int, "expert_labels": int} a row; the first `max_length` tokens are kept.

    Raises:
        ValueError: an unknown expert or an empty query, with its row.
    """
    encoded = []
    for number, row in enumerate(rows, start=1):
        place = f"{data}, row {number}"
        if row["expert"] not in expert_names:
            raise ValueError(f"{place}: unknown expert {row['expert']!r}, the checkpoint has {expert_names}")
        text, from_chat = query_text(row, place, tokenizer)
        input_ids = tokenizer(
            text, truncation=True, max_length=max_length, truncation_side="right", add_special_tokens=not from_chat
        )["input_ids"]
        encoded.append({"input_ids": input_ids, "expert_labels": expert_names.index(row["expert"])})
    return encoded


def query_text(row: dict[str, Any], place: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """The query of a row, and whether the chat template (which writes special tokens itself) made it."""
    text, messages = row.get("text"), list(row.get("messages") or ())
    if isinstance(text, str) and text.strip():
        return text, False
    while messages and messages[-1].get("role") == "assistant":
        messages.pop()
    if not messages:
        raise ValueError(f"{place}: the text is empty" if "text" in row else f"{place}: messages hold no query")
    if not all(isinstance(message.get("content"), str) and message["content"].strip() for message in messages):
        raise ValueError(f"{place}: a message has no content")
    if not tokenizer.chat_template:
        raise ValueError(f"{place} has messages, but the tokenizer has no chat template: give `text` instead")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), True


def split_by_expert(
    queries: list[dict[str, Any]], share: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split off `share` of every expert's queries, at least one where it has two: (train, eval)."""
    by_expert: dict[int, list[int]] = {}
    for number, query in enumerate(queries):
        by_expert.setdefault(query["expert_labels"], []).append(number)
    chosen: set[int] = set()
    for expert in sorted(by_expert):
        numbers = by_expert[expert]
        count = max(1, round(share * len(numbers))) if len(numbers) > 1 else 0
        chosen.update(random.Random(f"{seed} {expert}").sample(numbers, count))
    train = [query for number, query in enumerate(queries) if number not in chosen]
    return train, [queries[number] for number in sorted(chosen)]


def check_splits(train: list[dict[str, Any]], evaluation: list[dict[str, Any]], expert_names: list[str]) -> None:
    """Raise on an empty split; warn of experts without training queries and of queries in both splits."""
    for name, queries in (("training", train), ("evaluation", evaluation)):
        if not queries:
            raise ValueError(f"there are no {name} queries: {len(train)} for training, {len(evaluation)} to evaluate")
    counts = Counter(query["expert_labels"] for query in train)
    for expert, name in enumerate(expert_names):
        if not counts[expert]:
            logger.warning("no training query names expert %s: the router will not learn to pick it", name)
    seen = {tuple(query["input_ids"]) for query in train}
    if shared := sum(tuple(query["input_ids"]) in seen for query in evaluation):
        logger.warning("%d of %d evaluation queries are training queries too", shared, len(evaluation))


class RouterCollator:
    """Pads queries, on the tokenizer's side, and stacks their experts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, queries: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (B, T), `expert_labels` (B,), all int64."""
        batch = self.pad([{"input_ids": query["input_ids"]} for query in queries])
        batch["expert_labels"] = torch.tensor([query["expert_labels"] for query in queries])
        return dict(batch)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_experts: int) -> np.ndarray:
    """Queries by right expert (row) and picked expert (column): (N, N) int64, from two (B,) arrays."""
    matrix = np.zeros((num_experts, num_experts), dtype=np.int64)
    np.add.at(matrix, (labels, predictions), 1)
    return matrix


def recalls(matrix: np.ndarray) -> list[float | None]:
    """Share of each expert's queries that went to it; None where there are none."""
    totals = matrix.sum(1)
    return [float(matrix[e, e] / totals[e]) if totals[e] else None for e in range(len(matrix))]


def router_metrics(prediction: EvalPrediction, expert_names: list[str]) -> dict[str, float]:
    """Accuracy, macro recall and every expert's recall, from router logits (B, N) and labels (B,)."""
    matrix = confusion_matrix(prediction.label_ids, prediction.predictions.argmax(-1), len(expert_names))
    known = {name: recall for name, recall in zip(expert_names, recalls(matrix)) if recall is not None}
    return {
        "accuracy": float(matrix.trace() / matrix.sum()),
        "macro_recall": sum(known.values()) / len(known),
        **{f"recall_{name}": recall for name, recall in known.items()},
    }


def check_output(out: Path, checkpoint: Path, overwrite: bool) -> None:
    """ValueError where the output folder holds a model that must stay."""
    if out.resolve() == checkpoint.resolve():
        raise ValueError(f"the output folder {out} is the checkpoint that is trained: choose another")
    if out.is_file():
        raise ValueError(f"the output {out} is a file, expected a folder")
    if (out / "config.json").exists() and not overwrite:
        raise ValueError(f"the output folder {out} holds a model: choose another, or replace it with --overwrite")


def log_parameters(model: PreTrainedModel) -> None:
    """Say how many parameters train and how many are frozen."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    logger.info("%d parameters train, %d are frozen", counts[True], counts[False])


def evaluate(trainer: Trainer, evaluation: list[dict[str, Any]], expert_names: list[str]) -> dict[str, Any]:
    """Final numbers on the evaluation queries, as JSON types."""
    output = trainer.predict(evaluation, metric_key_prefix="eval")
    matrix = confusion_matrix(output.label_ids, output.predictions.argmax(-1), len(expert_names))
    return {
        "expert_names": expert_names,
        "queries": len(evaluation),
        "loss": output.metrics["eval_loss"],
        "accuracy": output.metrics["eval_accuracy"],
        "macro_recall": output.metrics["eval_macro_recall"],
        "recall": dict(zip(expert_names, recalls(matrix))),
        "confusion_matrix": matrix.tolist(),  # rows: the right expert, columns: the one that the router picked
    }


def add_to_card(card: Path, metrics: dict[str, Any]) -> None:
    """Put the evaluation into the model card, before its limits; an earlier one is replaced."""
    if not card.is_file():
        return
    names = metrics["expert_names"]
    lines = [
        ROUTER_SECTION,
        "",
        f"The router was trained on {metrics['training']['queries']:,} queries. It sends {metrics['accuracy']:.1%} of "
        f"{metrics['queries']:,} evaluation queries to the right expert (macro recall {metrics['macro_recall']:.1%}).",
        "",
        "| right expert | " + " | ".join(f"picked {name}" for name in names) + " | recall |",
        "|" + "---|" * (len(names) + 2),
    ]
    for name, row in zip(names, metrics["confusion_matrix"]):
        recall = metrics["recall"][name]
        lines.append(f"| {name} | {' | '.join(map(str, row))} | {'-' if recall is None else f'{recall:.1%}'} |")
    text = re.sub(rf"(?ms)^{ROUTER_SECTION}$.*?(?=^## |\Z)", "", card.read_text(encoding="utf-8"))
    before, limits, after = text.partition("## Limits\n")
    card.write_text(before.rstrip() + "\n\n" + "\n".join(lines) + "\n\n" + limits + after, encoding="utf-8")


def evaluation_tables(metrics: dict[str, Any]) -> list[Table | str]:
    """The evaluation for a terminal, as rich renderables."""
    table = Table("")
    for name in (*metrics["expert_names"], "recall"):
        table.add_column(name, justify="right")
    for name, row in zip(metrics["expert_names"], metrics["confusion_matrix"]):
        recall = metrics["recall"][name]
        table.add_row(name, *map(str, row), "-" if recall is None else f"{recall:.3f}")
    summary = f"accuracy {metrics['accuracy']:.3f}, macro recall {metrics['macro_recall']:.3f}"
    return [
        "Queries by right expert (row) and picked expert (column)",
        table,
        f"{summary} on {metrics['queries']} queries",
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train and save; returns the final metrics, which are also in the output's router_eval.json."""
    args, training_args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    folder, out = resolve_folder(args.checkpoint), Path(training_args.output_dir)
    config = read_config(folder)
    check_output(out, folder, args.overwrite or bool(training_args.resume_from_checkpoint))
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(folder)
    max_length = min(args.max_length, getattr(config.text_config, "max_position_embeddings", args.max_length))
    train = encode_rows(load_rows(args.train_data), args.train_data, tokenizer, config.expert_names, max_length)
    if args.eval_data is None:
        train, evaluation = split_by_expert(train, EVAL_SHARE, training_args.seed)
    else:
        evaluation = encode_rows(load_rows(args.eval_data), args.eval_data, tokenizer, config.expert_names, max_length)
    check_splits(train, evaluation, config.expert_names)

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.freeze_for_router_training()
    log_parameters(model)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=RouterCollator(tokenizer),
        compute_metrics=lambda prediction: router_metrics(prediction, config.expert_names),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    metrics = evaluate(trainer, evaluation, config.expert_names)
    metrics["training"] = {"queries": len(train), **dataclasses.asdict(args), "seed": training_args.seed}

    trainer.save_model()
    if trainer.is_world_process_zero():
        copy_files(folder, out, (*COMPANION_FILES, CARD_FILE, REPORT_FILE, f"{EXPERT_FOLDER}/**/*"))
        (out / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        add_to_card(out / CARD_FILE, metrics)
        logger.info("saved the trained checkpoint to %s", out)
    return metrics


if __name__ == "__main__":
    main()
