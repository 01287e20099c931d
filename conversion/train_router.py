"""Train the router of a channel-merged checkpoint and save the complete checkpoint again.

    channel-merge train-router merged \\
        --train-data math.jsonl code.jsonl chat.jsonl \\
        --eval-data eval.jsonl \\
        --output-dir routed \\
        --num-train-epochs 3 \\
        --learning-rate 1e-2

or, on several devices, `accelerate launch -m conversion train-router ...`; `--config router.yaml` gives the same
options.

The data are JSONL, JSON, Parquet or CSV files, or Hub datasets (`id` or `id:split`; the split is `train` unless
named), with the columns `text` (taken as it stands) or `messages` (of which the turns that the router reads, by
`router.context` of the config, are put into the chat template), `expert`, the name of the expert that should answer,
and, if there is one, `source`, for the report.

Only the router trains, on every query, on a variant of each `text` as another source might write it, and on generated
queries in styles that one source does not show, for the experts whose names tell which (`--style-queries`). What it
reads, the features of the first blocks, which run as the trunk expert, and the tokens, is computed once for every
query, and then `transformers.Trainer` trains the router on that. Last, a temperature is fitted to the evaluation
queries, so that the router's probabilities say how often it is right; how well they do is measured on queries that a
temperature was not fitted to (see `router_metrics`).
"""

import dataclasses
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from conversion.generate import load_tokenizer
from conversion.merged_checkpoint import read_config, resolve_folder
from conversion.model_card import write_card
from conversion.model_files import CARD_FILE, COMPANION_FILES, EXPERT_FILES, REPORT_FILE, copy_files
from conversion.model_source import without_folder
from conversion.report import format_bytes
from conversion.router_data import (
    Query,
    RouterCollator,
    check_splits,
    encode_queries,
    hold_out,
    load_queries,
    with_styles,
    with_variants,
)
from conversion.router_metrics import (
    METRICS_FILE,
    PLOT_FILE,
    card_section,
    evaluate_router,
    plot_confusion,
    router_metrics,
    useful_temperature,
)

logger = logging.getLogger(__name__)

EVAL_SHARE = 0.1


@dataclass
class RouterArguments:
    """Which checkpoint and which data."""

    checkpoint: str = field(metadata={"help": "Channel-merged checkpoint: folder or Hub id."})
    train_data: list[str] = field(metadata={"help": "Files or Hub datasets with `text` or `messages`, and `expert`."})
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "The same; default: a tenth of the training data, of every expert alike."}
    )
    augment: bool = field(
        default=True, metadata={"help": "Also train on a variant of each `text`, as another source might write it."}
    )
    style_queries: int = field(
        default=1000,
        metadata={
            "help": "Most generated queries in other styles to add for each expert named instruct, math, code or "
            "chinese, never more than three times those of its own; 0: none."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "The router reads the first and last half of so many tokens of a longer query (router.max_tokens)."
        },
    )
    threshold: float | None = field(
        default=None,
        metadata={"help": "Probability below which the default expert answers (router.threshold)."},
    )
    cache_features: bool = field(
        default=True, metadata={"help": "Compute what the router reads once, and keep it in memory."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a model in the output folder."})


@dataclass
class RouterTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with defaults for a small head on frozen features."""

    output_dir: str = field(metadata={"help": "Folder of the trained checkpoint."})
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
        values = yaml.safe_load(Path(known.config).read_text(encoding="utf-8"))
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


class RouterFeatures(nn.Module):
    """The frozen part of a model on the way to its router: queries in, the router's inputs out."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": self.model.router_features(input_ids, attention_mask)}


class RouterOnFeatures(nn.Module):
    """A model's router alone, on inputs computed beforehand; what it learns, the model has learned."""

    accepts_loss_kwargs = True  # the Trainer then counts the queries of accumulated batches

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.router = model.router
        self.router_loss = model.router_loss

    def forward(
        self,
        features: torch.Tensor,
        labels: torch.LongTensor,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Loss and (B, N) logits, from features (B, F) and labels (B,)."""
        logits = self.router(features)
        return {"loss": self.router_loss(logits, labels, num_items_in_batch), "logits": logits}


def cache_features(
    model: PreTrainedModel, queries: list[Query], collator: RouterCollator, args: RouterTrainingArguments
) -> list[Query]:
    """The queries with the router's inputs in the place of their tokens; one pass over all of them, on all devices."""
    blocks, all_blocks = model.config.router["layers"], model.config.num_hidden_layers
    logger.info("running the first %d of %d blocks on %d queries, once", blocks, all_blocks, len(queries))
    order = sorted(range(len(queries)), key=lambda number: -len(queries[number]["input_ids"]))  # little padding
    texts = [{"input_ids": queries[number]["input_ids"]} for number in order]
    features = Trainer(RouterFeatures(model), args, collator, eval_dataset=texts).predict(texts).predictions
    cached = [{key: value for key, value in query.items() if key != "input_ids"} for query in queries]
    for number, row in zip(order, features):
        cached[number]["features"] = row
    logger.info("%d features of each are kept, %s", features.shape[1], format_bytes(features.nbytes))
    return cached


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


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train and save; returns the final metrics, which are also in the output's router_eval.json."""
    args, training_args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if not training_args.should_log:  # one process of several speaks
        logging.getLogger("conversion").setLevel(logging.ERROR)
    folder, out = resolve_folder(args.checkpoint), Path(training_args.output_dir)
    config = read_config(folder)
    if args.max_length is not None:
        config.router["max_tokens"] = args.max_length
    if args.threshold is not None:
        config.router["threshold"] = args.threshold
    check_output(out, folder, args.overwrite or bool(training_args.resume_from_checkpoint))
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(folder)
    with training_args.main_process_first():
        train = load_queries(args.train_data, tokenizer, config)
        evaluation = load_queries(args.eval_data or (), tokenizer, config)
    if args.eval_data is None:
        train, evaluation = hold_out(train, EVAL_SHARE, training_args.seed, config.expert_names)
    check_splits(train, evaluation, config.expert_names)
    train_queries = len(train)
    train = with_styles(train, args.style_queries, training_args.seed, config.expert_names)
    if args.augment:
        train = with_variants(train, training_args.seed)
    train = encode_queries(train, tokenizer, config)
    evaluation = encode_queries(evaluation, tokenizer, config)

    model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    model.freeze_for_router_training()
    log_parameters(model)

    collator, trained, sources = RouterCollator(tokenizer), model, [query["source"] for query in evaluation]
    if args.cache_features:
        train, evaluation = (cache_features(model, part, collator, training_args) for part in (train, evaluation))
        trained = RouterOnFeatures(model)
    trainer = Trainer(
        model=trained,
        args=training_args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collator,
        compute_metrics=lambda prediction: router_metrics(prediction, config.expert_names),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    prediction = trainer.predict(evaluation)
    router = model.config.router
    router["temperature"] = useful_temperature(prediction.predictions, prediction.label_ids)
    metrics = evaluate_router(prediction.predictions, prediction.label_ids, sources, config.expert_names, router)
    metrics["training"] = {"queries": train_queries, **training_record(args), "seed": training_args.seed}
    if trainer.is_world_process_zero():
        save_checkpoint(model, folder, out, metrics)
    trainer.accelerator.end_training()
    return metrics


def training_record(args: RouterArguments) -> dict[str, Any]:
    """The arguments for readers elsewhere: local files and folders by their names."""
    return dataclasses.asdict(args) | {
        "checkpoint": without_folder(args.checkpoint),
        "train_data": [without_folder(data) for data in args.train_data],
        "eval_data": None if args.eval_data is None else [without_folder(data) for data in args.eval_data],
    }


def save_checkpoint(model: PreTrainedModel, folder: Path, out: Path, metrics: dict[str, Any]) -> None:
    """The model with its trained router, everything else of the checkpoint it is from, and the evaluation."""
    model.save_pretrained(out)
    copy_files(folder, out, (*COMPANION_FILES, *EXPERT_FILES, CARD_FILE, REPORT_FILE))
    (out / METRICS_FILE).write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    has_plot = True
    try:
        plot_confusion(metrics, out / PLOT_FILE)
    except ValueError as error:
        has_plot = False
        (out / PLOT_FILE).unlink(missing_ok=True)  # of an earlier run
        logger.info("no picture of the confusion matrix was drawn: %s", error)
    write_card(out, card_section(metrics, has_plot))
    logger.info("saved the trained checkpoint to %s", out)


if __name__ == "__main__":
    main()
