"""The command line: `channel-merge COMMAND ...`, the same as `python -m conversion COMMAND ...`.

Heavy libraries are imported inside the commands, so that --help answers at once, and after what can be checked
without them, so that errors do, too.
"""

import json
import logging
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from conversion.merging.recipe import Recipe

DEBUG_VARIABLE = "CHANNEL_MERGE_DEBUG"
API_KEY_VARIABLE = "CHANNEL_MERGE_API_KEY"
INTERRUPTED = 130  # exit code after Ctrl-C, as of every shell
MAX_ERROR = 1000  # characters: a file may hold values of any length

app = typer.Typer(
    name="channel-merge",
    help="Many fine-tunes of one language model in one routed Transformers checkpoint, merged channel by channel.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Channel-merged checkpoint: folder or Hub id.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output folder.")]


def check_checkpoint(checkpoint: str, expert: str | None = None) -> None:
    """The mistakes that cost most time to wait for, before anything slow is loaded."""
    from conversion.checkpoints.checkpoint_place import check_checkpoint

    check_checkpoint(checkpoint, expert)


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar=DEBUG_VARIABLE, help="Show the traceback of an error.")
    ] = False,
):
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"
    else:
        os.environ.pop(DEBUG_VARIABLE, None)  # also one that says no, such as 0
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("conversion").setLevel(logging.INFO)


@app.command()
def convert(
    recipe: Annotated[Path, typer.Argument(help="Recipe: the base model, its experts and how to merge them.")],
    out: Annotated[Path, typer.Argument(help="Folder of the merged checkpoint; must be new or empty.")],
    overwrite: Overwrite = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one safetensors file.")] = "5GB",
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory to use beside the interpreter's own, and while experts are calibrated beside one expert's "
            "weights; default: 2GB, with a calibration 7GB."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the arithmetic runs: cpu, cuda, ...")] = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check, and print the plan: tensors, rows, sizes, memory.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
):
    """Merge the experts of a recipe, channel by channel, into one checkpoint, and refine it where the recipe says so.

    A run that was stopped goes on where it was when the same command is given again.

    \b
    Examples:
      channel-merge convert recipe.yaml merged
      channel-merge convert recipe.yaml merged --dry-run
      channel-merge convert recipe.yaml merged --max-memory 1GB
    """
    from conversion.merging.places import check_places
    from conversion.merging.recipe import load_recipe

    loaded = load_recipe(recipe)
    check_places(loaded, out, overwrite)
    if refines := loaded.refine is not None:
        from conversion.refine import check_refinement, plan_line

        check_refinement(loaded, out, overwrite, use_cpu=device == "cpu")
    if dry_run:
        from rich.console import Console

        from conversion.merging.dry_run import plan_conversion, plan_tables

        plan = plan_conversion(loaded, out, overwrite=overwrite, max_memory=max_memory)
        lines = [
            *plan_tables(plan),
            *([plan_line(loaded, plan["output"], use_cpu=device == "cpu")] if refines else []),
        ]
        Console().print(*lines, sep="\n", soft_wrap=True)
        return
    from conversion.convert import convert as run
    from conversion.io.staged_folder import working_folder

    on_the_way = working_folder(out, "unrefined")
    conversion = run(
        loaded,
        on_the_way / "merged" if refines else out,
        overwrite=overwrite or refines,
        reuse=refines,
        max_shard_size=max_shard_size,
        max_memory=max_memory,
        device=device,
        progress=progress,
    )
    if refines:
        refine_conversion(conversion.folder, loaded, out, overwrite, max_shard_size, device, progress)
    shutil.rmtree(on_the_way, ignore_errors=True)  # also that of a recipe that refined before
    parameters = conversion.report["parameters"]
    share = parameters["stored"] / parameters["experts"]
    typer.echo(f"{out}: {parameters['stored']:,} parameters, {share:.1%} of the experts' {parameters['experts']:,}")


def refine_conversion(
    merged: Path, recipe: "Recipe", out: Path, overwrite: bool, max_shard_size: str, device: str, progress: bool
) -> None:
    """The second half of a conversion that refines, in the same process; a failure says where the first half is."""
    from rich.console import Console

    from conversion.refine import refine as run
    from conversion.refinement.record import refinement_table

    try:
        record = run(
            merged,
            recipe,
            out,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            use_cpu=device == "cpu",
            disable_tqdm=not progress,
        )
    except BaseException:
        logging.getLogger("conversion").warning(
            "the merged model, not refined, is kept in %s: the same command goes on from there", merged
        )
        raise
    Console().print(*refinement_table(record), sep="\n")


@app.command()
def calibrate(
    recipe: Annotated[Path, typer.Argument(help="Recipe with the experts and calibration: {data: ...}.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT-FILE", help="File of what is measured, calibration.safetensors.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a calibration file that is there.")] = False,
    max_memory: Annotated[str, typer.Option(help="Memory to use beside one expert's weights.")] = "7GB",
    device: Annotated[str, typer.Option(help="Where the models run: cpu, cuda, ...")] = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check, and print the plan: texts, passes, memory, disk.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
):
    """Measure what every expert's channels do on its own texts, for conversions with calibration: {file: ...}.

    A run that was stopped goes on where it was when the same command is given again.

    \b
    Examples:
      channel-merge calibrate recipe.yaml calibration.safetensors
      channel-merge calibrate recipe.yaml calibration.safetensors --dry-run
      channel-merge calibrate recipe.yaml calibration.safetensors --device cuda --max-memory 9GB
    """
    from conversion.io.staged_folder import check_target_file
    from conversion.merging.places import check_places, find_texts
    from conversion.merging.recipe import load_recipe

    loaded = load_recipe(recipe)
    find_texts(loaded)
    check_target_file(out, lambda file: True, overwrite)  # whether it is a calibration takes more to see
    check_places(loaded)
    if dry_run:
        from rich.console import Console

        from conversion.calibrate import plan_lines, plan_only

        plan = plan_only(loaded, out, overwrite=overwrite, max_memory=max_memory, device=device)
        Console().print(*plan_lines(plan), sep="\n", soft_wrap=True)
        return
    from conversion.calibrate import calibrate as run

    measured = run(loaded, out, overwrite=overwrite, max_memory=max_memory, device=device, progress=progress)
    typer.echo(f"{out}: {sum(measured.texts.values()):,} texts, {sum(measured.tokens.values()):,} tokens")


@app.command()
def inspect(
    checkpoint: Checkpoint,
    plot: Annotated[Path | None, typer.Option(metavar="F.png", help="Also draw where experts share rows.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
):
    """Show what a merged checkpoint stores: rows by kind of module and by owners, and its size against the experts.

    \b
    Examples:
      channel-merge inspect merged
      channel-merge inspect merged --json
      channel-merge inspect merged --plot sharing.png
    """
    check_checkpoint(checkpoint)
    from rich.console import Console

    from conversion.checkpoints.checkpoint_report import inspect_checkpoint
    from conversion.checkpoints.report_plot import plot_report
    from conversion.report import report_tables

    report = inspect_checkpoint(checkpoint)
    if plot is not None:
        plot_report(report, plot)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        Console().print(*report_tables(report), sep="\n")


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Folder of the plain checkpoint; must be new or empty.")],
    expert: Annotated[str, typer.Option("--expert", metavar="NAME", help="The expert to take out.")],
    overwrite: Overwrite = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one safetensors file.")] = "5GB",
):
    """Write one expert as a plain checkpoint of the base architecture, which needs no code of this package.

    \b
    Example:
      channel-merge export merged --expert math math-expert
    """
    from conversion.io.staged_folder import check_target

    check_target(out, overwrite)
    check_checkpoint(checkpoint, expert)
    from conversion.export import export_expert

    export_expert(checkpoint, expert, out, overwrite=overwrite, max_shard_size=max_shard_size)
    typer.echo(f"Expert {expert}: {out}")


@app.command("add-expert")
def add_expert(
    checkpoint: Checkpoint,
    expert: Annotated[
        str,
        typer.Argument(
            metavar="EXPERT", help="Fine-tune or LoRA adapter of the same base, or an adapter of one of the experts."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the new checkpoint; must be new or empty.")],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the expert.")],
    replace: Annotated[bool, typer.Option("--replace", help="Exchange the expert that has this name.")] = False,
    tolerance: Annotated[
        float,
        typer.Option(
            help="Reuse a stored row that is off by at most this share of the expert's change from the base; "
            "0: only one that is the same bit for bit."
        ),
    ] = 0.0,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="Base model, for adapters and --tolerance; default: the recipe's, from the Hub."
        ),
    ] = None,
    overwrite: Overwrite = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one safetensors file.")] = "5GB",
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
):
    """Add an expert to a merged checkpoint, or exchange one; the others stay bit for bit as they were.

    \b
    Examples:
      channel-merge add-expert merged user/medical-7b larger --name medical
      channel-merge add-expert merged math-lora fixed --name math --replace
    """
    from conversion.io.sources import find_place
    from conversion.io.staged_folder import check_target

    check_target(out, overwrite)
    check_checkpoint(checkpoint, name if replace else None)
    find_place(name, expert, Path())
    from conversion.add_expert import add_expert as run

    added = run(
        checkpoint,
        expert,
        out,
        name,
        base=base,
        tolerance=tolerance,
        replace=replace,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        progress=progress,
    )
    rows = added.new_rows + added.reused_rows
    typer.echo(
        f"{out}: expert {name} reads {added.reused_rows:,} of its {rows:,} rows where they were; "
        f"{added.parameters:,} parameters, {added.added_parameters:+,}"
    )
    if not replace:
        typer.echo(f"The router does not pick {name} yet: give train-router queries of all experts.")


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="Prompts; they run as one mixed batch.")
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(metavar="F.jsonl", help="Also answer conversations: one JSON object with `messages` a line."),
    ] = None,
    expert: Annotated[
        str | None,
        typer.Option("--expert", metavar="NAME", help="Answer with this expert; default: the router picks."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: cuda where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: as stored.")] = "auto",
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; default: if there is one.")
    ] = None,
):
    """Answer prompts, each by the expert that the router picks for it, in that expert's own chat template.

    Before each answer stand the expert, the router's probability for it and, where the router was not sure enough, why
    the default expert answered.

    \b
    Examples:
      channel-merge generate merged "What is 12 + 30?" "Translate to Chinese: good morning"
      channel-merge generate merged --expert math --max-new-tokens 16 "What is 12 + 30?"
      channel-merge generate merged --messages conversations.jsonl
    """
    check_checkpoint(checkpoint, expert)
    from conversion.generate import answer_prompts
    from conversion.vocabulary.prompts import read_conversations

    everything = [*(prompts or ()), *(read_conversations(messages) if messages is not None else ())]
    answers = answer_prompts(
        checkpoint, everything, expert=expert, max_new_tokens=max_new_tokens, device=device, dtype=dtype, chat=chat
    )
    for answer in answers:
        typer.secho(f"[{answer.expert} {answer.choice}] {answer.question}", bold=True)
        typer.echo(answer.text.strip("\n") + "\n")


@app.command()
def serve(
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: a free one.")] = 8000,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: cuda where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: as stored.")] = "auto",
    api_key: Annotated[
        str | None,
        typer.Option(envvar=API_KEY_VARIABLE, help="Refuse requests without this key; default: none is needed."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, in tokens; a request may ask for less.")
    ] = 1024,
    max_body: Annotated[str, typer.Option(help="Largest request.")] = "1MB",
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of all running requests whose keys and values are kept; default: 16384 on a CPU, elsewhere "
            "what fits.",
        ),
    ] = None,
    grace: Annotated[int, typer.Option(min=0, help="Seconds for answers that are begun when the server stops.")] = 30,
):
    """Answer OpenAI's chat completions and responses, many at once, each by its expert.

    The model `auto` lets the router choose, by the user's last turn; an expert's name names the expert. Needs the
    extra `serve`. It stops with Ctrl-C or SIGTERM.

    \b
    Examples:
      channel-merge serve merged
      channel-merge serve merged --host 0.0.0.0 --port 80 --device cuda --api-key secret
    """
    from conversion.serve import serve_checkpoint

    serve_checkpoint(
        checkpoint,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        api_key=api_key,
        max_tokens=max_tokens,
        max_body=max_body,
        cache_tokens=cache_tokens,
        grace=grace,
    )


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a channel-merged checkpoint.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Repository on the Hub: user/name.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; default: as its owner set it.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
):
    """Check a merged checkpoint and upload its folder to the Hub, in one commit. Log in first with: hf auth login

    The repository then holds what the folder holds: files that are only there are deleted, and stay in its history.

    \b
    Example:
      channel-merge push merged user/name --private
    """
    from conversion.push import push_checkpoint

    pushed = push_checkpoint(checkpoint, repo_id, private=private, message=message)
    typer.echo(f"{pushed.url}  revision {pushed.revision}")


class TrainingCommand(TyperCommand):
    """Shows the options that are parsed together with those of `transformers.TrainingArguments`."""

    room: str  # whose arguments they are

    def format_options(self, ctx, formatter):
        super().format_options(ctx, formatter)
        with formatter.section("Training options"):
            formatter.write_dl(import_module(f"conversion.{self.room}.arguments").option_help())


class TrainRouterCommand(TrainingCommand):
    room = "router"


class RefineCommand(TrainingCommand):
    room = "refinement"


PARSED_LATER = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("train-router", cls=TrainRouterCommand, context_settings=PARSED_LATER)
def train_router(context: typer.Context, checkpoint: Checkpoint):
    """Train the router of a merged checkpoint and save the complete checkpoint again.

    \b
    Example:
      channel-merge train-router merged --train-data train.jsonl --eval-data eval.jsonl --output-dir routed
    """
    from conversion.router.arguments import option_help
    from conversion.training.option_help import check_required

    check_required(context.args, option_help())
    check_checkpoint(checkpoint)
    from accelerate import PartialState
    from rich.console import Console

    from conversion.router.evaluation_report import evaluation_tables
    from conversion.train_router import main

    metrics = main(["--checkpoint", checkpoint, *context.args])
    if PartialState().is_main_process:
        Console().print(*evaluation_tables(metrics), sep="\n")


@app.command("refine", cls=RefineCommand, context_settings=PARSED_LATER)
def refine(context: typer.Context, checkpoint: Checkpoint):
    """Train the stored rows of a merged checkpoint to say what its experts say; save the complete checkpoint again.

    A run that was stopped goes on where it was when the same command is given again.

    \b
    Examples:
      channel-merge refine merged --recipe recipe.yaml --output-dir refined
      channel-merge refine merged --recipe recipe.yaml --output-dir refined --max-steps 600 --learning-rate 5e-4
    """
    from conversion.refinement.arguments import option_help
    from conversion.training.option_help import check_required

    check_required(context.args, option_help())
    check_checkpoint(checkpoint)
    from accelerate import PartialState
    from rich.console import Console

    from conversion.refine import main
    from conversion.refinement.record import refinement_table

    record = main(["--checkpoint", checkpoint, *context.args])
    if PartialState().is_main_process:
        Console().print(*refinement_table(record), sep="\n")


def is_expected(error: Exception) -> bool:
    """Whether the user or the network is at fault: huggingface_hub lets its HTTP client's errors through."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith("httpx")


def error_line(error: Exception) -> str:
    """The message of an expected error on one line."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        message = "; ".join(
            ": ".join(filter(None, [".".join(map(str, item["loc"])), item["msg"]])) for item in error.errors()
        )
    elif isinstance(error, OSError) and error.strerror:
        message = ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
    else:
        message = str(error) or type(error).__name__
    # Half a surrogate pair, of a file or of the command line's bytes, has no UTF-8.
    return " ".join(message.encode("utf-8", "backslashreplace").decode("utf-8").split())[:MAX_ERROR]


def main(arguments: list[str] | None = None):
    """Run the command line; bad input is one line on stderr and exit code 2, an interrupt another and 130."""
    try:
        app(arguments)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo("Stopped.", err=True)
        raise
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE) or not is_expected(error):
            raise
        typer.echo(f"Error: {error_line(error)}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
