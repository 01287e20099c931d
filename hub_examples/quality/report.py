"""What the quality benchmark shows: a table for each set, a table over the sets, and curves."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from quality.contenders import CONTENDERS
from quality.sets import SETS

LARGEST_SHOWN = 0.62  # of the experts' bytes


@dataclass(frozen=True)
class Line:
    """One contender at one budget on one set, over all draws and seeds."""

    set: str
    contender: str
    budget: float | None
    bytes: float | None = None  # share of the N experts in bfloat16
    kept: float | None = None  # share of the experts' mean exact match
    spread: float | None = None  # standard deviation of `kept`
    routed: float | None = None  # the same share where a router picks the expert
    elsewhere: float | None = None  # nats a token
    left_out_kept: float | None = None
    left_out: float | None = None  # nats a token
    seconds: float | None = None  # to make it
    error: str | None = None


def in_order(lines: list[Line]) -> list[Line]:
    """By set, then as the contenders are listed, then from many bytes to few."""
    order = [variant for contender in CONTENDERS for variant in contender.variants()]
    return sorted(
        lines, key=lambda line: (list(SETS).index(line.set), order.index(line.contender), -(line.budget or 0))
    )


def set_table(lines: list[Line]) -> Table:
    """All contenders of one set, at all of their sizes."""
    left_out = any(line.left_out is not None for line in lines)
    title = f"{lines[0].set}: {len(SETS[lines[0].set].experts)} experts"
    columns = ["contender", "budget", "bytes", "kept", "spread", "routed", "KL elsewhere", "seconds"]
    table = Table(*columns, *(["kept, left out", "KL, left out"] if left_out else []), title=title)
    failed = [line for line in lines if line.error is not None]
    for line in lines:
        table.add_row(
            line.contender,
            text(line.budget, ".0%"),
            text(line.bytes, ".1%"),
            text(line.kept, ".3f"),
            text(line.spread, ".3f"),
            text(line.routed, ".3f"),
            text(line.elsewhere, ".4f"),
            "failed" if line.error else text(line.seconds, ".1f"),
            *([text(line.left_out_kept, ".3f"), text(line.left_out, ".4f")] if left_out else []),
        )
    if failed:
        table.caption = "\n".join(dict.fromkeys(f"{line.contender}: {line.error}" for line in failed))
    return table


def text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def mean_table(lines: list[Line]) -> Table:
    """Each contender's mean and spread over the sets on which it could be made."""
    table = Table("contender", "budget", "sets", "bytes", "kept", "spread", "KL elsewhere", title="Mean over sets")
    groups: dict[tuple[str, float | None], list[Line]] = {}
    for line in lines:
        if line.error is None:
            groups.setdefault((line.contender, line.budget), []).append(line)
    for (contender, budget), group in groups.items():
        kept = [line.kept for line in group]
        table.add_row(
            contender,
            text(budget, ".0%"),
            str(len(group)),
            text(statistics.fmean(line.bytes for line in group), ".1%"),
            text(statistics.fmean(kept), ".3f"),
            text(statistics.stdev(kept) if len(kept) > 1 else 0.0, ".3f"),
            text(statistics.fmean(line.elsewhere for line in group), ".4f"),
        )
    return table


def draw_curves(lines: list[Line], file: Path) -> None:
    """Kept share and divergence against bytes, a column for each set: curves where there are budgets, else points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in lines if line.error is None and line.bytes < LARGEST_SHOWN]
    sets = list(dict.fromkeys(line.set for line in lines))
    contenders = list(dict.fromkeys(line.contender for line in lines))
    colours = pyplot.get_cmap("tab20")
    figure, axes = pyplot.subplots(
        2, len(sets), figsize=(1 + 4.5 * len(sets), 8), sharex=True, sharey="row", squeeze=False
    )
    for column, name in enumerate(sets):
        for number, contender in enumerate(contenders):
            group = sorted(
                (line for line in lines if line.set == name and line.contender == contender),
                key=lambda line: line.bytes,
            )
            style = {
                "color": colours(number % 20),
                "marker": "o" if contender.startswith("ours") else "sv^dPX*"[number % 7],
                "linewidth": 2.5 if contender.startswith("ours") else 1.2,
                "label": contender,
            }
            sizes = [100 * line.bytes for line in group]
            axes[0, column].plot(sizes, [line.kept for line in group], **style)
            axes[1, column].plot(sizes, [line.elsewhere for line in group], **style)
        axes[0, column].set_title(name)
        axes[1, column].set_yscale("log")
        axes[1, column].set_xlabel("bytes, % of the experts in bfloat16")
    axes[0, 0].set_ylabel("kept of the experts' exact match")
    axes[1, 0].set_ylabel("KL elsewhere, nats a token")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
