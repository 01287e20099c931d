"""A picture of what a channel-merged checkpoint stores: who shares rows, and what merging changed."""

from pathlib import Path
from typing import Any

import torch

from conversion.channels.delta_errors import relative_error
from conversion.checkpoints.checkpoint_report import CheckpointReport, MatrixReport, relative_errors, rows_per_channel


def plot_report(report: CheckpointReport, file: str | Path) -> None:
    """Draw where the experts share rows, and what merging changed.

    By kind of module, by owners, and along the decoder blocks, with a budget as rows per channel. The lower half, the
    relative errors, is left out where they were not measured.

    Raises:
        ValueError: matplotlib is not installed, or it cannot write files of this suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a plot needs matplotlib: pip install 'channel-merged[plot]'") from error
    has_errors = report.relative_errors is not None
    figure = Figure(figsize=(17, 9.5 if has_errors else 5), layout="constrained")
    axes = figure.subplots(2 if has_errors else 1, 3, squeeze=False)
    _plot_owner_counts(axes[0, 0], report)
    _plot_owner_sets(axes[0, 1], report)
    if report.budget is None:
        _plot_blocks(axes[0, 2], report, "share of rows with one owner", _share_of_one_owner)
    else:
        _plot_blocks(axes[0, 2], report, "rows per channel", rows_per_channel, as_share=False)
    if has_errors:
        _plot_errors_by_kind(axes[1, 0], report)
        _plot_errors_by_block(axes[1, 1], report)
        _plot_blocks(axes[1, 2], report, "relative error, all experts", _error_of_all)
    experts = ", ".join(report.expert_names[:8]) + (", ..." if len(report.expert_names) > 8 else "")
    figure.suptitle(
        f"{len(report.expert_names)} experts ({experts}) in {report.share:.1%} of their parameters, "
        f"{report.architecture}",
        fontsize=14,
    )
    figure.savefig(file, dpi=110)


def _kinds(report: CheckpointReport) -> list[str]:
    """Kinds of module that store rows."""
    return [kind.kind for kind in report.kinds if kind.rows]


def _plot_owner_counts(axes, report: CheckpointReport) -> None:
    """One bar per kind of module: share of its rows by number of owners."""
    from matplotlib import colormaps

    kinds, num_experts = _kinds(report), len(report.expert_names)
    counts = torch.zeros(len(kinds), num_experts)
    for matrix in report.matrices:
        counts[kinds.index(matrix.kind)] += torch.tensor(matrix.rows_by_owner_count)
    shares = (counts / counts.sum(1, keepdim=True)).T.tolist()
    left = [0.0] * len(kinds)
    for owners, share in enumerate(shares, start=1):
        color = colormaps["viridis_r"]((owners - 0.5) / num_experts)
        label = str(owners) if any(share) else None
        axes.barh(kinds, share, left=left, label=label, color=color, edgecolor="white", linewidth=0.5)
        left = [done + part for done, part in zip(left, share)]
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(_percent())
    axes.set_title("Stored rows by number of owners")
    axes.set_xlabel("share of stored rows")
    axes.legend(title="owners", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _plot_owner_sets(axes, report: CheckpointReport, max_owner_sets: int = 15) -> None:
    """One bar per owner set, the largest first."""
    total = sum(report.rows_by_owners.values())
    largest = list(report.rows_by_owners.items())[:max_owner_sets]
    labels = [name if len(name) <= 34 else f"{name[:31]}..." for name, _ in largest]
    bars = axes.barh(range(len(largest)), [count / total for _, count in largest], color="tab:blue")
    axes.bar_label(bars, [f"{count / total:.1%}" for _, count in largest], padding=3, fontsize=9)
    axes.set_yticks(range(len(largest)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.xaxis.set_major_formatter(_percent())
    more = len(report.rows_by_owners) - len(largest)
    axes.set_title("Stored rows by owners" + (f" ({more} smaller sets not shown)" if more else ""))
    axes.set_xlabel("share of stored rows")


def _plot_blocks(axes, report: CheckpointReport, label: str, value, as_share: bool = True) -> None:
    """A map of kinds of module against decoder blocks, coloured by `value` of the matrices that are there."""
    matrices = [matrix for matrix in report.matrices if matrix.layer is not None]
    kinds = list(dict.fromkeys(matrix.kind for matrix in matrices))
    blocks = 1 + max((matrix.layer for matrix in matrices), default=0)
    values = torch.full((len(kinds), blocks), torch.nan)
    for row, kind in enumerate(kinds):
        for block in range(blocks):
            number = value([matrix for matrix in matrices if (matrix.kind, matrix.layer) == (kind, block)])
            if number is not None:
                values[row, block] = number
    image = axes.imshow(values.tolist(), aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(label[0].upper() + label[1:])
    axes.set_xlabel("decoder block")
    axes.figure.colorbar(image, ax=axes, format=_percent() if as_share else "%.3g")


def _share_of_one_owner(matrices: list[MatrixReport]) -> float | None:
    rows = sum(matrix.rows for matrix in matrices)
    return sum(matrix.rows_by_owner_count[0] for matrix in matrices) / rows if rows else None


def _error_of_all(matrices: list[MatrixReport]) -> float | None:
    """Relative error of all experts together."""
    errors, deltas = (
        sum(norm**2 for matrix in matrices for norm in norms(matrix))
        for norms in (lambda matrix: matrix.error_norms, lambda matrix: matrix.delta_norms)
    )
    return relative_error(errors, deltas) if matrices else None


def _plot_errors_by_kind(axes, report: CheckpointReport) -> None:
    """One line of markers per expert: its relative error in every kind of module."""
    kinds = [kind for kind in report.kinds if kind.relative_errors is not None]
    for expert, (name, style) in enumerate(zip(report.expert_names, _expert_styles(report))):
        errors = [kind.relative_errors[expert] for kind in kinds]
        errors = [torch.nan if error is None else error for error in errors]
        axes.plot(errors, [kind.kind for kind in kinds], linestyle="none", label=name, **style)
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0.3)
    axes.set_title("Relative error of the experts' deltas")
    _finish_errors(axes.xaxis, axes, report)


def _plot_errors_by_block(axes, report: CheckpointReport) -> None:
    """One line per expert: its relative error in every decoder block."""
    by_block: dict[int, list[MatrixReport]] = {}
    for matrix in report.matrices:
        if matrix.layer is not None:
            by_block.setdefault(matrix.layer, []).append(matrix)
    blocks = sorted(by_block)
    errors = [relative_errors(by_block[block]) for block in blocks]
    for expert, (name, style) in enumerate(zip(report.expert_names, _expert_styles(report))):
        line = [torch.nan if part[expert] is None else part[expert] for part in errors]
        axes.plot(blocks, line, label=name, **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.set_title("Relative error along the decoder blocks")
    axes.set_xlabel("decoder block")
    _finish_errors(axes.yaxis, axes, report)


def _expert_styles(report: CheckpointReport) -> list[dict[str, Any]]:
    """A colour and a marker for each expert that no other one shares, up to thirty experts."""
    from matplotlib import colormaps

    colors, markers = colormaps["tab10"].colors, "osD"
    return [
        {"color": colors[expert % 10], "marker": markers[expert // 10 % 3], "markersize": 5}
        for expert in range(len(report.expert_names))
    ]


def _finish_errors(axis, axes, report: CheckpointReport) -> None:
    axis.set_major_formatter(_percent())
    columns = 1 + (len(report.expert_names) - 1) // 16
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, ncols=columns)


def _percent():
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=None)
