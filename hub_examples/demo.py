"""Four tiny experts become one routed model: convert, refine, train the router, measure, and answer a mixed batch.

    make demo

or, where the package is installed, `python hub_examples/demo.py`. Every number is computed in the run. Work goes to
`--output-dir` (a hidden folder beside the examples by default); what an earlier run left there is replaced.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))

from tiny_experts.evaluate import answers, chat_prompt, exact_match
from tiny_experts.example import Example
from tiny_experts.examples import SKILLS, examples

from conversion.checkpoints.checkpoint_report import inspect_checkpoint
from conversion.convert import convert
from conversion.refine import refine
from conversion.train_router import main as train_router

TINY_EXPERTS = Path(__file__).parent / "tiny_experts"
BASELINES = {"average": "average of all four", "ties": "TIES of all four"}
PRESETS = ("paper-ties", "paper-dare", "recommended")
SEED = 0
TEST_SEED = 1
ROUTER_QUERIES = 400  # of each skill

Accuracies = dict[str, float]  # exact match by skill


def load(checkpoint: Path) -> PreTrainedModel:
    """As a user of the Hub would load it: the code comes from the checkpoint."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32).eval()


def accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tests: dict[str, list[Example]], right_expert: bool
) -> Accuracies:
    """Exact match per skill; with `right_expert` a merged model is told which expert to use."""
    return {
        skill: exact_match(model, tokenizer, tests[skill], **({"expert_index": skill} if right_expert else {}))
        for skill in SKILLS
    }


def routed_accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tests: dict[str, list[Example]]
) -> Accuracies:
    """Exact match per skill, all skills shuffled into mixed batches, the router deciding."""
    questions = [(skill, example) for skill in SKILLS for example in tests[skill]]
    random.Random(SEED).shuffle(questions)
    given = answers(model, tokenizer, [example.prompt for _, example in questions])
    right = dict.fromkeys(SKILLS, 0)
    for (skill, example), answer in zip(questions, given, strict=True):
        right[skill] += answer.strip() == example.completion.strip()
    return {skill: right[skill] / len(tests[skill]) for skill in SKILLS}


def write_router_data(file: Path, split: str, count: int, seed: int):
    """Queries of every skill with the expert that should answer, as chat messages."""
    rows = [
        {"messages": [{"role": "user", "content": example.prompt}], "expert": skill}
        for skill in SKILLS
        for example in examples(skill, split, count, seed)
    ]
    random.Random(SEED).shuffle(rows)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def size_table(checkpoints: dict[str, Path]) -> tuple[Table, dict[str, float]]:
    """Stored parameters of each merged checkpoint against the four experts together."""
    table = Table("checkpoint", "parameters", "of the four experts", title="Stored size")
    shares = {}
    for name, checkpoint in checkpoints.items():
        report = inspect_checkpoint(checkpoint)
        shares[name] = report.share
        table.add_row(name, f"{report.parameters:,}", f"{report.share:.1%}")
    table.add_row("four experts", f"{report.expert_parameters:,}", "100.0%")
    return table, shares


def accuracy_table(rows: dict[str, Accuracies], shares: dict[str, float]) -> Table:
    """One line a model: the share of the four experts' parameters that it stores, and its accuracies."""
    table = Table("model", "size", *SKILLS, "mean", title="Exact match on unseen questions")
    for name, values in rows.items():
        mean = sum(values.values()) / len(values)
        share = f"{shares[name]:.1%}" if name in shares else ""
        table.add_row(name, share, *(f"{values[skill]:.2f}" for skill in SKILLS), f"[bold]{mean:.3f}[/bold]")
    return table


def mixed_batch_table(checkpoint: Path, tests: dict[str, list[Example]]) -> Table:
    """One batch of two questions of each skill, each answered by the expert that the router picks."""
    model, tokenizer = load(checkpoint), AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    chosen = [tests[skill][number] for number in (0, 1) for skill in SKILLS]
    inputs = tokenizer(
        [chat_prompt(tokenizer, example.prompt) for example in chosen], padding=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    texts = tokenizer.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    probabilities = output.router_probabilities.amax(-1)
    table = Table("prompt", "expert", "p", "answer", "expected", title="One mixed batch, routed", show_lines=True)
    for example, expert, probability, text in zip(
        chosen, output.expert_index.tolist(), probabilities.tolist(), texts, strict=True
    ):
        name, expected = model.config.expert_names[expert], example.completion.strip()
        table.add_row(example.prompt, name, f"{probability:.2f}", text.strip(), expected)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / ".demo")
    parser.add_argument("--questions", type=int, default=100, help="test questions of each skill")
    args = parser.parse_args()
    out, console, start = args.output_dir, Console(), time.perf_counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    tests = {skill: examples(skill, "test", args.questions, TEST_SEED) for skill in SKILLS}

    console.rule("Converting the four experts")
    for name in (*BASELINES, *PRESETS):
        console.print(f"{name}: [dim]channel-merge convert hub_examples/tiny_experts/recipes/{name}.yaml OUT[/dim]")
        convert(TINY_EXPERTS / "recipes" / f"{name}.yaml", out / name, overwrite=True)

    console.rule("Refining")
    recipe = TINY_EXPERTS / "recipes" / "recommended.yaml"
    console.print(f"[dim]channel-merge refine MERGED --recipe {recipe.relative_to(TINY_EXPERTS.parents[1])} OUT[/dim]")
    refinement = refine(out / "recommended", recipe, out / "refined", overwrite=True)

    console.rule("Training the router")
    write_router_data(out / "router_train.jsonl", "train", ROUTER_QUERIES, SEED)
    write_router_data(out / "router_eval.jsonl", "test", args.questions, TEST_SEED)
    router_accuracy = train_router(
        [
            *("--checkpoint", str(out / "refined"), "--output-dir", str(out / "routed"), "--overwrite"),
            *("--train-data", str(out / "router_train.jsonl"), "--eval-data", str(out / "router_eval.jsonl")),
            *("--seed", str(SEED), "--logging-strategy", "no"),
        ]
    )["accuracy"]

    console.rule("Answering questions")
    rows: dict[str, Accuracies] = {}
    tokenizer = AutoTokenizer.from_pretrained(TINY_EXPERTS / "base", padding_side="left")
    rows["base"] = accuracies(load(TINY_EXPERTS / "base"), tokenizer, tests, right_expert=False)
    rows["the four experts"] = {
        skill: exact_match(load(TINY_EXPERTS / skill), tokenizer, tests[skill]) for skill in SKILLS
    }
    for name, title in BASELINES.items():
        rows[title] = accuracies(load(out / name), tokenizer, tests, right_expert=True)
    for name in PRESETS:
        rows[f"{name}, expert given"] = accuracies(load(out / name), tokenizer, tests, right_expert=True)
    routed = load(out / "routed")
    rows["recommended, refined, expert given"] = accuracies(routed, tokenizer, tests, right_expert=True)
    rows["recommended, refined, routed"] = routed_accuracies(routed, tokenizer, tests)

    console.rule("Results")
    sizes, shares = size_table({name: out / name for name in (*BASELINES, *PRESETS)})
    console.print(sizes)
    stored = {"the four experts": 1.0}
    stored |= {title: shares[name] for name, title in BASELINES.items()}
    stored |= {row: shares[preset] for preset in PRESETS for row in rows if row.startswith(preset)}
    console.print(accuracy_table(rows, stored))
    console.print(
        f"Refinement brought the divergence from the experts on held-out texts from {refinement['kl_before']:.3f} to "
        f"{refinement['kl_after']:.3f} a token"
    )
    console.print(f"Router: right expert for {router_accuracy:.1%} of {args.questions * len(SKILLS)} queries")
    console.print(mixed_batch_table(out / "routed", tests))
    seconds = time.perf_counter() - start
    console.print(f"Done in {seconds:.0f} s. The routed model is {out / 'routed'}.")
    divergence = {key: refinement[key] for key in ("kl_before", "kl_after")}
    summary = {"exact_match": rows, "stored_share": shares, "router_accuracy": router_accuracy, **divergence}
    print(json.dumps({**summary, "seconds": round(seconds)}))


if __name__ == "__main__":
    main()
