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

import contextlib
import dataclasses
import hashlib
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from conversion.checkpoints.merged_checkpoint import whole_checkpoint
from conversion.generate import load_tokenizer
from conversion.hub.model_card import write_card
from conversion.io.foreign_files import foreign, read_yaml
from conversion.io.model_files import CARD_FILE, COMPANION_FILES, EXPERT_FILES, REPORT_FILE, copy_files
from conversion.io.sources import Source, check_unchanged, without_folder
from conversion.io.staged_folder import CONFIG_FILE, StagedFolder, check_target
from conversion.report import format_bytes
from conversion.router.data import (
    Query,
    RouterCollator,
    check_splits,
    encode_queries,
    hold_out,
    load_queries,
    with_styles,
    with_variants,
)
from conversion.router.metrics import (
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


class FinishedCheckpoints(TrainerCallback):
    """Writes into the journal of a staged folder which of the Trainer's checkpoints are whole."""

    def __init__(self, staged: StagedFolder):
        self._staged = staged

    def on_save(self, args, state, control, **kwargs):
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        for file in sorted((self._staged.path / name).rglob("*")):
            if file.is_file():
                self._staged.journal.record(str(file.relative_to(self._staged.path)), file)


def check_output(out: Path, checkpoint: Path, overwrite: bool) -> None:
    """ValueError where the output folder holds something that must stay."""
    check_target(out, overwrite)
    if out.resolve() == checkpoint.resolve() or out.resolve() in checkpoint.resolve().parents:
        raise ValueError(f"the output folder {out} holds the checkpoint that is trained: choose another")


def training_fingerprint(source: Source, *queries: list[Query]) -> dict[str, Any]:
    """What the Trainer's checkpoints depend on, beside its own arguments: the model and the encoded queries."""
    digest = hashlib.sha256()
    for query in (query for part in queries for query in part):
        digest.update(json.dumps(query, sort_keys=True).encode())
    values = {"command": "train-router", "checkpoint": source.files, "queries": digest.hexdigest()}
    return json.loads(json.dumps(values))


def find_resumed(resume: bool | str | None, folders: tuple[Path, ...]) -> str | None:
    """The Trainer's checkpoint to go on from: the named one, or for True the last one of the first folder with any."""
    if resume is not True:
        return resume or None
    last = next(filter(None, (get_last_checkpoint(folder) for folder in folders if folder.is_dir())), None)
    if last is None:
        raise ValueError(
            f"there is no {PREFIX_CHECKPOINT_DIR}-* of the same training to go on from in {folders[-1]} or beside it: "
            "leave --resume-from-checkpoint out, or name one"
        )
    return last


def log_parameters(model: PreTrainedModel) -> None:
    """Say how many parameters train and how many are frozen."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    logger.info("%d parameters train, %d are frozen", counts[True], counts[False])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train and save; returns the final metrics, which are also in the output's router_eval.json."""
    with contextlib.ExitStack() as stack:
        return train_router(*parse_arguments(sys.argv[1:] if arguments is None else arguments), stack)


def train_router(
    args: RouterArguments, training_args: RouterTrainingArguments, stack: contextlib.ExitStack
) -> dict[str, Any]:
    """Train and save; the folder that the output is written into until it is complete is entered into `stack`."""
    if not training_args.should_log:  # one process of several speaks
        logging.getLogger("conversion").setLevel(logging.ERROR)
    (source, config), out = whole_checkpoint(args.checkpoint), Path(training_args.output_dir)
    folder, resume = source.folder, training_args.resume_from_checkpoint
    overwrite = args.overwrite or bool(resume)
    if args.max_length is not None:
        config.router["max_tokens"] = args.max_length
    if args.threshold is not None:
        config.router["threshold"] = args.threshold
    check_output(out, folder, overwrite)
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

    with foreign(str(folder)):
        model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    model.freeze_for_router_training()
    log_parameters(model)

    fingerprint = training_fingerprint(source, train, evaluation)
    staged = None
    if training_args.process_index == 0:
        staged = StagedFolder(
            out,
            overwrite,
            fingerprint,
            resume=bool(resume),
            how_to_resume="the same command with --resume-from-checkpoint true goes on from there",
        )
        stack.enter_context(staged)
    (training_args.output_dir,) = broadcast_object_list([str(staged.path) if staged else None])
    training_args.resume_from_checkpoint = find_resumed(resume, (Path(training_args.output_dir), out))

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
        callbacks=[FinishedCheckpoints(staged)] if staged else None,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    prediction = trainer.predict(evaluation)
    router = model.config.router
    router["temperature"] = useful_temperature(prediction.predictions, prediction.label_ids)
    metrics = evaluate_router(prediction.predictions, prediction.label_ids, sources, config.expert_names, router)
    metrics["training"] = {"queries": train_queries, **training_record(args), "seed": training_args.seed}
    metrics["training"] |= {"revision": source.revision} if source.revision else {}
    trainer.accelerator.wait_for_everyone()  # to have written what they save
    if staged:
        config_text = save_checkpoint(model, folder, staged.path, metrics)
        check_unchanged([source])
        staged.publish(config_text)
        logger.info("saved the trained checkpoint to %s", out)
    trainer.accelerator.end_training()
    return metrics


def training_record(args: RouterArguments) -> dict[str, Any]:
    """The arguments for readers elsewhere: local files and folders by their names."""
    return dataclasses.asdict(args) | {
        "checkpoint": without_folder(args.checkpoint),
        "train_data": [without_folder(data) for data in args.train_data],
        "eval_data": None if args.eval_data is None else [without_folder(data) for data in args.eval_data],
    }


def save_checkpoint(model: PreTrainedModel, folder: Path, out: Path, metrics: dict[str, Any]) -> str:
    """The model with its trained router, everything else of the checkpoint it is from, and the evaluation.

    Returns:
        The text of config.json, which belongs there last.
    """
    model.save_pretrained(out)
    config = (out / CONFIG_FILE).read_text(encoding="utf-8")
    (out / CONFIG_FILE).unlink()
    copy_files(folder, out, (*COMPANION_FILES, *EXPERT_FILES, CARD_FILE, REPORT_FILE))
    (out / METRICS_FILE).write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    has_plot = True
    try:
        plot_confusion(metrics, out / PLOT_FILE)
    except ValueError as error:
        has_plot = False
        logger.info("no picture of the confusion matrix was drawn: %s", error)
    write_card(out, card_section(metrics, has_plot))
    return config


if __name__ == "__main__":
    main()
