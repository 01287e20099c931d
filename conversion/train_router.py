"""Train the router of a channel-merged checkpoint and save the complete checkpoint again.

    channel-merge train-router merged \\
        --train-data math.jsonl code.jsonl chat.jsonl \\
        --eval-data eval.jsonl \\
        --output-dir routed

or, on several devices, `accelerate launch -m conversion train-router ...`; `--config router.yaml` gives the same
options.

The data are JSONL, JSON, Parquet or CSV files, or Hub datasets (`id` or `id:split`; the split is `train` unless
named), with the columns `text` (taken as it stands) or `messages` (of which the turns that the router reads, by
`router.context` of the config, are put into the chat template), `expert`, the name of the expert that should answer,
and, where there are such columns, `source`, for the report, and `generated` (true for queries that a program wrote, as
hub_examples/style_queries.py does: they are not held out to evaluate).

Only the router changes. Its table of n-grams is counted (see `naive_bayes`) from every query and from a variant of
each `text` as another source might write it, in seconds; queries that look like another expert's are left out. Each
source is left out in turn to see how sure the router may be of sources that it has not seen: that gives the
temperature. `--num-train-epochs` lets `transformers.Trainer` train the table further; on sources that were not in the
data that lowered the accuracy.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, set_seed

from conversion.checkpoints.merged_checkpoint import whole_checkpoint
from conversion.hub.model_card import write_card
from conversion.io.foreign_files import foreign
from conversion.io.model_files import CARD_FILE, COMPANION_FILES, EXPERT_FILES, REPORT_FILE, copy_files
from conversion.io.sources import Source, check_unchanged, without_folder
from conversion.io.staged_folder import CONFIG_FILE, StagedFolder, check_not_a_source, check_target
from conversion.router.arguments import RouterArguments
from conversion.router.data import (
    Query,
    RouterCollator,
    check_splits,
    encode_queries,
    hold_out,
    load_queries,
    with_variants,
)
from conversion.router.data_checks import check_amounts
from conversion.router.evaluation_report import METRICS_FILE, PLOT_FILE, card_section, eval_results, plot_confusion
from conversion.router.features import RouterOnFeatures, cache_features, trunk_features
from conversion.router.fitting import fit_router
from conversion.router.metrics import evaluate_router, router_metrics
from conversion.router.training_arguments import RouterTrainingArguments, parse_arguments
from conversion.training.trainer_checkpoints import FinishedCheckpoints, find_resumed, log_parameters
from conversion.vocabulary.chat_markers import derive_turns
from conversion.vocabulary.prompts import load_tokenizer

logger = logging.getLogger(__name__)

EVAL_SHARE = 0.1


def check_output(out: Path, checkpoint: Path, overwrite: bool) -> None:
    """ValueError where the output folder holds something that must stay."""
    check_target(out, overwrite)
    check_not_a_source(out, {"the checkpoint that is trained": checkpoint})


def training_fingerprint(source: Source, *queries: list[Query]) -> dict[str, Any]:
    """What the Trainer's checkpoints depend on, beside its own arguments: the model and the encoded queries."""
    digest = hashlib.sha256()
    for query in (query for part in queries for query in part):
        digest.update(json.dumps(query, sort_keys=True).encode())
    values = {"command": "train-router", "checkpoint": source.files, "queries": digest.hexdigest()}
    return json.loads(json.dumps(values))


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
    overwrite = args.overwrite or resume is True  # which goes on from the output itself
    if args.max_length is not None:
        config.router["max_tokens"] = args.max_length
    if args.threshold is not None:
        config.router["threshold"] = args.threshold
    check_output(out, folder, overwrite)
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(folder)
    turns = derive_turns(tokenizer).turns
    config.router["turns"] = turns.to_dict() if turns else None
    with training_args.main_process_first():
        train = load_queries(args.train_data, tokenizer, config)
        evaluation = load_queries(args.eval_data or (), tokenizer, config)
    if args.eval_data is None:
        train, evaluation = hold_out(train, EVAL_SHARE, training_args.seed, config.expert_names)
    check_splits(train, evaluation, config.expert_names)
    check_amounts(train, config.expert_names)
    counts = Counter("generated_queries" if query["generated"] else "queries" for query in train)
    if args.augment:
        train = with_variants(train, training_args.seed)
    train = encode_queries(train, tokenizer, config)
    evaluation = encode_queries(evaluation, tokenizer, config)

    with foreign(str(folder)):
        model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    model.freeze_for_router_training()

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

    collator = RouterCollator(tokenizer)
    temperature_from = fit_router(
        model, tokenizer, train, lambda queries: trunk_features(model, queries, collator, training_args)
    )
    trained, sources = model, [query["source"] for query in evaluation]
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
    spread = trainer.predict(evaluation).predictions.std()
    if training_args.num_train_epochs or training_args.max_steps > 0:
        log_parameters(model)
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    prediction = trainer.predict(evaluation)
    router = model.config.router
    # Training makes logits larger, and not more often right.
    router["temperature"] *= float(prediction.predictions.std() / spread) if spread else 1.0
    metrics = evaluate_router(prediction.predictions, prediction.label_ids, sources, config.expert_names, router)
    metrics["training"] = {"queries": 0, "generated_queries": 0, **counts, **training_record(args)}
    metrics["training"] |= {"seed": training_args.seed, "temperature_from": temperature_from}
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
    write_card(out, card_section(metrics, has_plot), eval_results(metrics))
    return config


if __name__ == "__main__":
    main()
