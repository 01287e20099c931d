"""The model card's section about the refinement of the stored rows, and the same for a terminal's table."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

from conversion.io import markdown

REFINEMENT = "refinement"  # of the conversion's report and of config.merge


def divergence_rows(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of divergences."""
    rows = [
        [name, f"{own['texts']:,}", f"{own['held_out']:,}", f"{own['kl_before']:.4f}", f"{own['kl_after']:.4f}"]
        for name, own in record["experts"].items()
    ]
    texts, held_out = (sum(own[key] for own in record["experts"].values()) for key in ("texts", "held_out"))
    mean = ["all", f"{texts:,}", f"{held_out:,}", f"{record['kl_before']:.4f}", f"{record['kl_after']:.4f}"]
    return ["expert", "texts", "held out", "KL a token before", "and after"], [*rows, mean]


def outcome(record: Mapping[str, Any]) -> str:
    """What came of it, in one sentence."""
    texts = f"{sum(own['texts'] for own in record['experts'].values()):,} texts"
    if variants := record["options"]["variants"]:
        texts += f" and {variants} variants of each"
    if not record["improved"]:
        return (
            f"{record['steps']:,} steps on {texts} brought them no nearer to what the experts say, so they "
            "are bit for bit as they were."
        )
    per_expert = ", and what is kept per expert," if record["options"]["train_per_expert"] else ""
    frozen = " Rows of a single expert were left out." if record["options"]["freeze_single_owner_rows"] else ""
    return (
        f"They were{per_expert} trained on {texts} to say what the experts say, each text through its own "
        f"expert's view; the best of {record['steps']:,} steps was {record['best_step']:,}.{frozen}"
    )


def refinement_results(report: Mapping[str, Any]) -> list[EvalResult]:
    """The divergence that was measured, as the Hub shows it beside a model; nothing where there was no refinement."""
    if REFINEMENT not in report:
        return []
    record = report[REFINEMENT]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="generator",  # what the Hub calls data that are not one of its datasets
            dataset_name=f"{record['data']}, a part held out",
            metric_type="kl_divergence",
            metric_name="KL(expert, this model) a token, in nats, mean over the experts",
            metric_value=record["kl_after"],
        )
    ]


def refinement_section(report: Mapping[str, Any]) -> str:
    """The section, or nothing where the rows were not refined."""
    if REFINEMENT not in report:
        return ""
    record = report[REFINEMENT]
    router = record["router"]
    routing = (
        f" Of {router['prompts']:,} prompts the router sends {router['moved']:,} to another expert than before: "
        "`channel-merge train-router` trains it again."
        if router and router["moved"]
        else ""
    )
    return f"""
## Refinement of the stored rows

{outcome(record)}{routing} The divergence KL(expert, merged model), in nats, on texts that were held out; the relative
errors above are those of the merge before it:

{markdown.table(*divergence_rows(record))}
"""
