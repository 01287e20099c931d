"""How much of small experts is kept for how many bytes: ours against one model, the paper and other ways to compress.

    make bench-quality        the sets of small experts
    make bench-quality-real   the set on a real base, which is made first, in under an hour

Sets of experts that are not shipped are trained first, once, into the work folder (`quality/expert_sets.py` says
which, with what seeds). Then every contender is made from the same experts and the same calibration texts, at every
budget where it has one, and measured on questions that neither training nor calibration has seen:

- bytes: what would be stored, as a share of the N experts in bfloat16; indices, masks, scales and coefficients count.
- kept: exact match, the right expert given, as a share of the experts' own mean; and its spread over independent draws
  of test questions (and over seeds, of calibration and conversion, with --seeds).
- routed, with --routed: the same share where the checkpoint's own router picks the expert.
- KL elsewhere: nats a token between each expert and its view on text that no calibration shows: the other experts'
  questions and plain lines. Where a set leaves families of questions out of calibration, these have two columns more.

What fails stays in the table with its error. A table for each set, a mean over sets, one line of JSON, and a picture.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from rich.console import Console
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))

from quality.contenders import CONTENDERS, Contender
from quality.expert_sets import SMALL_SETS
from quality.measures import Measures
from quality.problem import Problem, Stored
from quality.questions import draw_questions
from quality.report import Line, draw_curves, in_order, mean_table, set_table
from quality.routing import routed_match
from quality.sets import SETS

BUDGETS = (0.55, 0.5, 0.4, 0.35, 0.3)
WIDTH = 110


@dataclass(frozen=True)
class Sample:
    """One contender at one budget for one seed."""

    bytes: float
    kept: list[float]  # of each draw of test questions
    routed: float | None
    elsewhere: float
    left_out_kept: float | None
    left_out: float | None
    seconds: float


class Arena:
    """One set of experts with the texts of one seed; `routed`: routers are trained where there is a checkpoint."""

    def __init__(self, problem: Problem, routed: bool):
        self.problem = problem
        self.routed = routed
        self.measures = Measures(problem)
        self.own = self.measures.quality(problem.experts)

    def samples(self, contender: Contender, budget: float | None) -> dict[str, Sample]:
        """Each variant of a contender, by name."""
        start = time.perf_counter()
        made = contender.stored(self.problem, budget)
        seconds = time.perf_counter() - start
        return {name: self._measure(stored, seconds) for name, stored in made.items()}

    def _measure(self, stored: Stored, seconds: float) -> Sample:
        quality, own = self.measures.quality(stored.views), self.own
        has_left_out = quality.left_out_match is not None
        routed = None
        if self.routed and stored.checkpoint is not None:
            routed = routed_match(self.problem, stored.checkpoint) / own.exact_match[0]
        return Sample(
            stored.num_bytes / self.problem.expert_bytes,
            [given / best for given, best in zip(quality.exact_match, own.exact_match, strict=True)],
            routed,
            quality.elsewhere,
            quality.left_out_match / own.left_out_match if has_left_out else None,
            quality.divergence.get("left out"),
            seconds,
        )


def samples_of_set(
    name: str, contenders: list[Contender], args: argparse.Namespace, console: Console
) -> Iterator[tuple[str, float | None, Sample | str]]:
    """Every contender, budget and seed of a set: what was measured, or why there is nothing."""
    for seed in range(args.seeds):
        with TemporaryDirectory() as scratch:
            questions = draw_questions(SETS[name], args.texts, args.questions, args.draws, seed)
            arena = Arena(Problem(SETS[name], questions, args.work_dir, Path(scratch), seed), args.routed)
            accuracies = ", ".join(f"{accuracy:.3f}" for accuracy in arena.own.exact_match)
            console.print(f"[bold]{name}[/bold], seed {seed}: the experts' own exact match is {accuracies}")
            for contender in contenders:
                for budget in args.budgets if contender.budgets else (None,):
                    try:
                        for variant, sample in arena.samples(contender, budget).items():
                            yield variant, budget, sample
                    except Exception as error:  # what fails is a result, too
                        for variant in contender.variants():
                            yield variant, budget, f"{type(error).__name__}: {error}"


def measure_set(name: str, contenders: list[Contender], args: argparse.Namespace, console: Console) -> list[Line]:
    """The lines of one set."""
    samples: dict[tuple[str, float | None], list[Sample]] = {}
    errors: dict[tuple[str, float | None], str] = {}
    for variant, budget, result in samples_of_set(name, contenders, args, console):
        if isinstance(result, str):
            errors[variant, budget] = result
            console.print(f"  {variant} {budget or ''}: {result}", highlight=False)
        else:
            samples.setdefault((variant, budget), []).append(result)
            console.print(
                f"  {variant} {budget or ''}: {result.bytes:.1%} of bytes keep {statistics.fmean(result.kept):.3f}, "
                f"KL elsewhere {result.elsewhere:.4f}, made in {result.seconds:.1f} s",
                highlight=False,
            )
    lines = [line_of(name, *key, found) for key, found in samples.items() if key not in errors]
    return lines + [Line(name, *key, error=error) for key, error in errors.items()]


def line_of(set_name: str, contender: str, budget: float | None, samples: list[Sample]) -> Line:
    kept = [share for sample in samples for share in sample.kept]
    return Line(
        set_name,
        contender,
        budget,
        bytes=mean_of(sample.bytes for sample in samples),
        kept=mean_of(kept),
        spread=statistics.stdev(kept) if len(kept) > 1 else 0.0,
        routed=mean_of(sample.routed for sample in samples),
        elsewhere=mean_of(sample.elsewhere for sample in samples),
        left_out_kept=mean_of(sample.left_out_kept for sample in samples),
        left_out=mean_of(sample.left_out for sample in samples),
        seconds=mean_of(sample.seconds for sample in samples),
    )


def mean_of(values: Iterable[float | None]) -> float | None:
    """None where there are none."""
    given = [value for value in values if value is not None]
    return statistics.fmean(given) if given else None


def versions() -> dict[str, str]:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "commit": subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work-dir", type=Path, default=Path(__file__).parent / ".quality", help="trained sets, results and picture"
    )
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SMALL_SETS))
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="contenders")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), help="shares of the experts' bytes")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions with other texts and other conversions")
    parser.add_argument("--draws", type=int, default=3, help="independent draws of test questions")
    parser.add_argument("--questions", type=int, default=60, help="test questions of each expert and draw")
    parser.add_argument("--texts", type=int, default=400, help="calibration texts of each expert")
    parser.add_argument("--routed", action="store_true", help="train a router for each checkpoint, and ask it, too")
    parser.add_argument("--join", nargs="+", type=Path, default=[], help="earlier runs' JSON, for tables and picture")
    parser.add_argument("--train-only", action="store_true", help="train what is missing and stop")
    return parser.parse_args()


def main() -> None:
    args, start = parse_arguments(), time.perf_counter()
    console = Console(width=max(WIDTH, Console().width))  # of the tables, also in a file
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in args.sets:
        SETS[name].train_missing(args.work_dir)
    if args.train_only:
        return
    contenders = [contender for contender in CONTENDERS if contender.name in args.only]
    lines = [Line(**line) for file in args.join for line in json.loads(file.read_text(encoding="utf-8"))["lines"]]
    lines = in_order(lines + [line for name in args.sets for line in measure_set(name, contenders, args, console)])
    sets = list(dict.fromkeys(line.set for line in lines))
    for name in sets:
        console.print(set_table([line for line in lines if line.set == name]))
    if len(sets) > 1:
        console.print(mean_table(lines))
    args.work_dir.mkdir(parents=True, exist_ok=True)
    draw_curves(lines, args.work_dir / "quality.png")
    seconds = time.perf_counter() - start
    console.print(f"Done in {seconds / 60:.1f} minutes. The picture is {args.work_dir / 'quality.png'}.")
    settings = {"texts": args.texts, "questions": args.questions, "draws": args.draws, "seeds": args.seeds}
    result = {**settings, "lines": [asdict(line) for line in lines], "seconds": round(seconds), "versions": versions()}
    (args.work_dir / "quality.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
