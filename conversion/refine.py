"""Refine the stored rows of a channel-merged checkpoint with its experts as teachers.

    channel-merge refine merged --recipe recipe.yaml --output-dir refined

or, on several devices, `accelerate launch -m conversion refine ...`; `refine:` in the recipe and `--config F.yaml`
give the same options, which are those of `RefineArguments` and of `transformers.TrainingArguments`.

Every expert runs once over its calibration texts, one expert in memory at a time, and its most probable next tokens
are kept on disk. Then the rows train on all of it: each text runs through its own expert's view of the shared rows,
the loss is the divergence from what that expert said, at every token, and the gradients of a shared row add up. Some
texts of every expert are held out: on these the divergence is measured before, in between and after, by them the best
rows are kept, and where nothing was gained the rows of the input, bit for bit.

A run that was stopped goes on where it was when the same command is given again. The router is not trained; what it
reads are an expert's first blocks, whose rows change: train it after the refinement.
"""

import contextlib
import hashlib
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import get_last_checkpoint

from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.hub.conversion_report import package_versions
from conversion.hub.model_card import write_card
from conversion.io.data_rows import find_data, read_data
from conversion.io.model_files import copy_files, read_config_file
from conversion.io.options import format_bytes, parse_size
from conversion.io.sources import check_unchanged, without_folder
from conversion.io.staged_folder import StagedFolder, check_disk_space, check_not_a_source, check_target
from conversion.io.wording import one_line
from conversion.merging.calibration import read_texts
from conversion.merging.expert_model import load_expert_model
from conversion.merging.places import locate
from conversion.merging.plan import Plan, make_plan
from conversion.merging.recipe import Recipe, load_recipe
from conversion.refinement.arguments import RefineArguments
from conversion.refinement.matching_experts import check_same_experts
from conversion.refinement.record import refinement_record, shown_options
from conversion.refinement.refined_checkpoint import write_files, write_weights
from conversion.refinement.student import load_student, round_to_stored, route
from conversion.refinement.teachers import (
    BYTES_OF_REST,
    KEPT_BYTES,
    TeacherFiles,
    TeacherSettings,
    all_texts,
    run_teachers,
    teacher_bytes,
)
from conversion.refinement.texts import TeacherDataset, check_count, collate, hold_out
from conversion.refinement.trainer import RefinementTrainer, expert_divergences
from conversion.refinement.training_arguments import RefineTrainingArguments, parse_options
from conversion.router.evaluation_report import METRICS_FILE, PLOT_FILE, card_section, eval_results
from conversion.training.argument_parser import TrainingArgumentParser
from conversion.training.trainer_checkpoints import FinishedCheckpoints, log_parameters
from conversion.vocabulary.calibration_texts import CalibrationText

logger = logging.getLogger(__name__)

STATES = 4  # of a parameter that trains: itself, its gradient, the two moments of AdamW

# Options that no result depends on, or that the fingerprint has otherwise.
NO_RESULT = (
    *("output_dir", "resume_from_checkpoint", "checkpoint", "train_data", "overwrite", "disable_tqdm"),
    "max_shard_size",  # no finished part depends on it
)


def refine(checkpoint: Path | str, recipe: Recipe | Path | str, out: Path | str, **options: Any) -> dict[str, Any]:
    """Write a checkpoint whose stored rows were trained to say what the recipe's experts say.

    Args:
        checkpoint: channel-merged checkpoint, a folder or a Hub id.
        recipe: what it was made from, whose `refine` may hold options.
        out: the folder to make. It appears only when it is complete.
        options: by the names of `RefineArguments` and `transformers.TrainingArguments`.

    Returns:
        What came of it; the report and the card of the output have the same.

    Raises:
        ValueError: options, recipe, checkpoint or texts are not as they must be; mostly before weights are read.
        OSError: a file cannot be read or written.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    with contextlib.ExitStack() as stack:
        args, training_args = parse_options(recipe, **options, checkpoint=str(checkpoint), output_dir=str(out))
        return _refine(recipe, args, training_args, stack)


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Refine as a command line says: `--recipe`, and the options of `refine`."""
    parser = TrainingArgumentParser((), add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    known, others = parser.parse_known_args(arguments)
    recipe = load_recipe(known.recipe)
    with contextlib.ExitStack() as stack:
        return _refine(recipe, *parse_options(recipe, others), stack)


def _refine(
    recipe: Recipe, args: RefineArguments, training_args: RefineTrainingArguments, stack: contextlib.ExitStack
) -> dict[str, Any]:
    """Refine and save; what must be closed at the end is entered into `stack`."""
    if not training_args.should_log:  # one process of several speaks
        logging.getLogger("conversion").setLevel(logging.ERROR)
    started, out = time.monotonic(), Path(training_args.output_dir)
    check_target(out, args.overwrite)
    parse_size(args.max_shard_size)
    data = find_texts(recipe, args)
    merged = stack.enter_context(MergedCheckpoint(args.checkpoint))
    merged.check_channel_indices()
    plan = make_plan(recipe)
    for reader in (plan.base_reader, *plan.readers):
        stack.callback(reader.close)
    sources = {f"the checkpoint of {source.name} ({source.model})": source.folder for source in plan.experts}
    check_not_a_source(out, {"the checkpoint that is refined": merged.folder, **sources})
    check_same_experts(merged, plan)
    with training_args.main_process_first():
        texts = read_texts(plan, data, args.max_length)
    train, held_out = hold_out(texts, args.eval_share, training_args.seed, plan.expert_names)
    settings = TeacherSettings(
        top_k=args.top_k,
        batch_size=training_args.per_device_eval_batch_size,
        variants=args.variants,
        seed=training_args.seed,
        kept=special_tokens(plan),
        ends=tuple(tuple(plan.vocabulary.eos_token_ids(expert)) for expert in range(plan.num_experts)),
    )

    staged = None
    if training_args.process_index == 0:
        fingerprint = refinement_fingerprint(merged, plan, texts, args, training_args)
        stored_bytes = sum(tensor.num_bytes for tensor in merged.tensors.values())
        check_disk_space(out, stored_bytes + teacher_bytes(texts, settings), fingerprint)
        staged = stack.enter_context(StagedFolder(out, args.overwrite, fingerprint))
        run_teachers(
            train,
            held_out,
            lambda number: load_expert_model(plan, number, getattr(torch, args.dtype), training_args.device),
            plan.expert_names,
            staged.journal,
            settings,
            progress=not training_args.disable_tqdm,
        )
    (folder,) = broadcast_object_list([str(staged.journal.folder) if staged else None])
    training_args.output_dir, training_args.eval_on_start = folder, True

    model = load_student(merged, args)
    log_parameters(model)
    labelled, trained_on, evaluated_on = all_texts(train, held_out, Path(folder), args.variants)
    teachers = TeacherFiles(Path(folder), labelled)
    trainer = RefinementTrainer(
        model=model,
        args=training_args,
        data_collator=collate,
        train_dataset=TeacherDataset(labelled, trained_on, teachers, plan.num_experts),
        eval_dataset=TeacherDataset(labelled, evaluated_on, teachers, plan.num_experts),
        compute_metrics=lambda prediction: expert_divergences(prediction, plan.expert_names),
        callbacks=[FinishedCheckpoints(staged)] if staged else None,
    )
    if training_args.load_best_model_at_end:
        trainer.add_callback(EarlyStoppingCallback(args.patience))
    prompts = [text.input_ids[: text.answer_start] for text in texts] if model.router.is_trained else []
    routes = route(model, prompts, training_args.per_device_eval_batch_size)
    try:
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint or get_last_checkpoint(folder))
    except ImportError as error:  # an optimizer or an integration that is not installed
        raise ValueError(one_line(error)) from error

    round_to_stored(model, {name: tensor.dtype for name, tensor in merged.tensors.items()})
    trainer.evaluate()
    record = refinement_record(trainer.state, train, held_out, plan.expert_names)
    now = route(model, prompts, training_args.per_device_eval_batch_size) if record["improved"] else routes
    record |= {"router": compare_routes(routes, now), "data": without_folder(data)}
    record |= {"options": shown_options(args, training_args), "seconds": round(time.monotonic() - started, 1)}
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if staged:
        trained = {name: state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
        write_weights(staged.path, merged, trained if record["improved"] else {}, args.max_shard_size)
        config_text = write_files(staged.path, merged, record)
        write_router_evaluation(staged.path, merged, record)
        check_unchanged([merged.source, plan.base, *plan.experts])
        staged.publish(config_text)
        logger.info("saved the refined checkpoint to %s", out)
    trainer.accelerator.end_training()
    return record


def special_tokens(plan: Plan) -> frozenset[int]:
    """Tokens of the merged vocabulary that are no text."""
    tokenizer = plan.vocabulary.tokenizer
    return frozenset({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})


def check_refinement(recipe: Recipe, out: Path, overwrite: bool, use_cpu: bool) -> None:
    """ValueError where a conversion could not be refined as its recipe says: options, texts or output are wrong."""
    args, _ = parse_options(recipe, checkpoint="checkpoint", output_dir=str(out), use_cpu=use_cpu)
    locate(recipe, out, overwrite)
    counts = Counter(str(row.get("expert")) for row in read_data(find_texts(recipe, args)).rows)
    for expert in recipe.experts:
        check_count(expert.name, counts[expert.name])


def plan_line(recipe: Recipe, output: Mapping[str, Any], use_cpu: bool) -> str:
    """What a refinement of a recipe takes, for a terminal; `output` as `plan_conversion` gives it."""
    args, training_args = parse_options(recipe, checkpoint="checkpoint", output_dir="out", use_cpu=use_cpu)
    passes = training_args.num_train_epochs
    work = f"{training_args.max_steps:,} steps" if training_args.max_steps > 0 else f"{passes:g} passes over the texts"
    parameters = output["bytes_at_most"] // getattr(torch, output["dtype"]).itemsize
    memory = STATES * getattr(torch, args.dtype).itemsize * parameters
    return (
        f"refinement  {work}, {training_args.per_device_train_batch_size} texts at a time; about "
        f"{format_bytes(memory)} of memory in {args.dtype} beside activations; of disk until it is done "
        f"{args.top_k * KEPT_BYTES + BYTES_OF_REST:,} bytes a token, and {format_bytes(output['bytes_at_most'])} for "
        "the model before"
    )


def find_texts(recipe: Recipe, args: RefineArguments) -> str:
    """The file or dataset with the texts: that of the arguments, else that of the recipe's calibration."""
    if args.train_data is not None:
        return args.train_data
    if recipe.calibration is None or recipe.calibration.data is None:
        raise ValueError(
            "the recipe has no calibration texts to refine on: give calibration.data there or --train-data"
        )
    return find_data(recipe.calibration.data, recipe.folder)


def refinement_fingerprint(
    merged: MergedCheckpoint,
    plan: Plan,
    texts: Sequence[CalibrationText],
    args: RefineArguments,
    training_args: RefineTrainingArguments,
) -> dict[str, Any]:
    """All that the result depends on, as JSON holds it."""
    options = {**training_args.to_dict(), **asdict(args)}
    values = {
        "command": "refine",
        "checkpoint": merged.source.files,
        "experts": {source.name: source.files for source in (plan.base, *plan.experts)},
        "texts": hashlib.sha256(json.dumps([asdict(text) for text in texts]).encode()).hexdigest(),
        "options": {name: value for name, value in options.items() if name not in NO_RESULT},
        "versions": package_versions(),
    }
    return json.loads(json.dumps(values, default=str))


def compare_routes(before: list[int], after: list[int]) -> dict[str, int] | None:
    """Of how many prompts the router sends how many elsewhere; None where there is no trained router."""
    if not before:
        return None
    moved = sum(old != new for old, new in zip(before, after, strict=True))
    if moved:
        logger.warning(
            "the router sends %d of %d prompts to another expert than before, for what it reads has changed: train it "
            "again with channel-merge train-router",
            moved,
            len(before),
        )
    return {"prompts": len(before), "moved": moved}


def write_router_evaluation(folder: Path, merged: MergedCheckpoint, record: dict[str, Any]) -> None:
    """The card, with the evaluation of the router as long as it routes as it did; else it stays behind."""
    metrics = read_config_file(merged.folder / METRICS_FILE)
    if not metrics or (record["improved"] and record["router"] and record["router"]["moved"]):
        write_card(folder)
        return
    files = copy_files(merged.folder, folder, (METRICS_FILE, PLOT_FILE))
    write_card(folder, card_section(metrics, folder / PLOT_FILE in files), eval_results(metrics))


if __name__ == "__main__":
    main(sys.argv[1:])
