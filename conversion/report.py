"""What a channel-merged checkpoint stores, from its config, headers and channel indices alone.

Stored parameters are compared with those of the N experts as separate models, where a tied head counts once, and with
the distinct ones as the conversion counted them; bytes of the channel indices and of the router stand beside them.
How far each expert is from what it was is what the conversion measured and wrote into its report.
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from conversion.channels.delta_errors import relative_error
from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.io.foreign_files import read_json
from conversion.io.model_files import REPORT_FILE

PER_EXPERT_KIND = "kept per expert"


@dataclass(frozen=True)
class MatrixReport:
    """One channel module: its size, and how many of its rows have 1, 2, ..., N owners."""

    path: str
    channels: int
    rows: int
    parameters: int
    expert_parameters: int
    rows_by_owner_count: tuple[int, ...]
    rows_by_owners: dict[str, int]  # "math" or "math + code" -> stored rows, most rows first
    delta_norms: tuple[float, ...] | None  # of each expert, as the conversion measured them
    error_norms: tuple[float, ...] | None  # of (merged rows - expert's rows)

    @property
    def kind(self) -> str:
        """The module's own name, which it shares with its like in the other blocks: "q_proj", "lm_head"."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def layer(self) -> int | None:
        """Number of the decoder block; None outside of the blocks."""
        number = re.search(r"\.(\d+)\.", self.path)
        return int(number[1]) if number else None


@dataclass(frozen=True)
class KindReport:
    """All modules of one kind together."""

    kind: str
    modules: int
    channels: int
    rows: int
    parameters: int
    expert_parameters: int
    relative_errors: tuple[float | None, ...] | None  # of each expert, as the conversion measured them


@dataclass(frozen=True)
class CheckpointReport:
    """The numbers of `channel-merge inspect`."""

    checkpoint: str
    architecture: str
    dtype: str
    expert_names: tuple[str, ...]
    matrices: tuple[MatrixReport, ...]
    kinds: tuple[KindReport, ...]
    rows_by_owners: dict[str, int]  # "math" or "math + code" -> stored rows, most rows first
    relative_errors: tuple[float | None, ...] | None
    parameters: int
    expert_parameters: int
    index_bytes: int
    router_bytes: int
    router_trained: bool
    router: dict[str, Any]
    merge: dict[str, Any]

    @property
    def share(self) -> float:
        """Stored parameters over those of the N experts."""
        return self.parameters / self.expert_parameters

    @property
    def distinct_parameters(self) -> int | None:
        """Parameters of the experts, rows that are equal bit for bit counted once; None where it was not recorded."""
        return self.merge.get("parameters", {}).get("experts_distinct")

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {**dataclasses.asdict(self), "share": self.share, "distinct_parameters": self.distinct_parameters}


def inspect_checkpoint(checkpoint: str | Path) -> CheckpointReport:
    """Report on a checkpoint folder or Hub id; reads no weights."""
    with MergedCheckpoint(checkpoint) as merged:
        owners = {path: row_owners(merged.channel_index(path), merged.num_rows(path)) for path in stored_paths(merged)}
        for path in merged.modules.channel.keys() - owners.keys():
            merged.channel_index(path)  # a tied head stores no rows, but its index must be valid too
        norms = _conversion_norms(merged)
        matrices = tuple(_matrix_report(merged, path, masks, norms.get(path)) for path, masks in owners.items())
        kinds = (*_kind_reports(matrices), _per_expert_report(merged))
        config = merged.config
        return CheckpointReport(
            checkpoint=str(checkpoint),
            architecture=type(merged.base_model).__name__,
            dtype=str(config.dtype).removeprefix("torch."),
            expert_names=tuple(config.expert_names),
            matrices=matrices,
            kinds=kinds,
            rows_by_owners=_rows_by_owners(owners.values(), config.expert_names),
            relative_errors=relative_errors(matrices),
            parameters=sum(kind.parameters for kind in kinds),
            expert_parameters=sum(kind.expert_parameters for kind in kinds),
            index_bytes=sum(
                merged.tensors[f"model.{path}.channel_index"].num_bytes for path in merged.modules.channel
            ),
            router_bytes=sum(merged.tensors[name].num_bytes for name in merged.router_names()),
            router_trained=any(bool(merged.reader.read(name).any()) for name in merged.router_names()),
            router=dict(config.router),
            merge=dict(config.merge),
        )


def stored_paths(merged: MergedCheckpoint) -> list[str]:
    """Channel modules that store rows of their own: all but a tied head."""
    return [path for path, module in merged.modules.channel.items() if module.tied_to is None]


def row_owners(channel_index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Bit mask of the experts that read each stored row: int64 (R,), from channel_index (N, O)."""
    owners = torch.zeros(num_rows, dtype=torch.int64)
    for expert, index in enumerate(channel_index.long()):
        owners[index[index >= 0]] |= 1 << expert
    return owners


def owner_counts(owners: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Number of owners of each row: int64 (R,)."""
    return sum((owners >> expert) & 1 for expert in range(num_experts))


def _expert_channels(merged: MergedCheckpoint, path: str) -> int:
    """Channels of a module over all experts; an expert with a smaller vocabulary has fewer."""
    num_experts = merged.config.num_experts
    if merged.is_vocabulary(path):
        return sum(int(merged.has_token(expert).sum()) for expert in range(num_experts))
    return num_experts * merged.modules.channel[path].out_features


def _conversion_norms(merged: MergedCheckpoint) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Norms of each expert's deltas and errors by module, from the conversion's report; empty where there is none."""
    file, names = merged.folder / REPORT_FILE, merged.config.expert_names
    if not file.is_file():
        return {}
    try:
        modules = read_json(file).get("modules", {})
        return {
            # Of an exact expert that was added without its base at hand, the change from the base is not known.
            path: tuple(
                tuple(float(module[key][name] or 0) for name in names) for key in ("delta_norms", "error_norms")
            )
            for path, module in modules.items()
            if "error_norms" in module
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is no report of a conversion of {', '.join(names)}") from None


def relative_errors(matrices: Iterable[MatrixReport]) -> tuple[float | None, ...] | None:
    """Relative error of each expert over several modules; None where they were not measured."""
    matrices = list(matrices)
    if not matrices or any(matrix.error_norms is None for matrix in matrices):
        return None
    errors, deltas = (
        torch.tensor(norms, dtype=torch.float64).square().sum(0).tolist()
        for norms in zip(*((matrix.error_norms, matrix.delta_norms) for matrix in matrices))
    )
    return tuple(map(relative_error, errors, deltas))


def _matrix_report(
    merged: MergedCheckpoint,
    path: str,
    owners: torch.Tensor,
    norms: tuple[tuple[float, ...], tuple[float, ...]] | None,
) -> MatrixReport:
    module, num_experts = merged.modules.channel[path], merged.config.num_experts
    row_size = module.in_features + module.bias
    counts = torch.bincount(owner_counts(owners, num_experts), minlength=num_experts + 1)
    return MatrixReport(
        path=path,
        channels=module.out_features,
        rows=len(owners),
        parameters=len(owners) * row_size,
        expert_parameters=_expert_channels(merged, path) * row_size,
        rows_by_owner_count=tuple(counts[1:].tolist()),
        rows_by_owners=_rows_by_owners([owners], merged.config.expert_names),
        delta_norms=norms and norms[0],
        error_norms=norms and norms[1],
    )


def _kind_reports(matrices: tuple[MatrixReport, ...]) -> list[KindReport]:
    by_kind: dict[str, list[MatrixReport]] = {}
    for matrix in matrices:
        by_kind.setdefault(matrix.kind, []).append(matrix)
    return [
        KindReport(
            kind=kind,
            modules=len(members),
            channels=sum(matrix.channels for matrix in members),
            rows=sum(matrix.rows for matrix in members),
            parameters=sum(matrix.parameters for matrix in members),
            expert_parameters=sum(matrix.expert_parameters for matrix in members),
            relative_errors=relative_errors(members),
        )
        for kind, members in by_kind.items()
    ]


def _per_expert_report(merged: MergedCheckpoint) -> KindReport:
    base = merged.base_model
    per_expert = merged.modules.per_expert
    parameters = merged.config.num_experts * sum(
        base.get_parameter(f"{path}.{name}").numel() for path, names in per_expert.items() for name in names
    )
    return KindReport(PER_EXPERT_KIND, len(per_expert), 0, 0, parameters, parameters, None)


def _rows_by_owners(owners, expert_names: list[str]) -> dict[str, int]:
    masks, counts = torch.cat(list(owners)).unique(return_counts=True)
    named = {
        " + ".join(name for expert, name in enumerate(expert_names) if mask >> expert & 1) or "nobody": count
        for mask, count in zip(masks.tolist(), counts.tolist())
    }
    return dict(sorted(named.items(), key=lambda item: -item[1]))


def report_tables(report: CheckpointReport, max_owner_sets: int = 16) -> list[Table | str]:
    """The report for a terminal of at least 80 columns, as rich renderables."""
    tables = [
        _summary(report),
        "\nStored by kind of module; share of the experts as separate models",
        _kind_table(report),
        "\nStored rows by owners",
        _owner_table(report, max_owner_sets),
    ]
    if report.relative_errors is not None:
        tables += [
            "\nWhat merging changed: (merged rows - own rows) over (own rows - base rows)",
            _error_table(report),
        ]
    return tables


def format_bytes(count: int) -> str:
    """A number of bytes with the unit that suits it."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} bytes"


def _summary(report: CheckpointReport) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    router, state = report.router, "trained" if report.router_trained else "untrained"
    if not report.router_trained:
        state += f", answers with {router['default_expert']}"
    method, distinct = report.merge.get("method"), report.distinct_parameters
    for name, value in (
        ("checkpoint", report.checkpoint),
        ("base architecture", f"{report.architecture}, {report.dtype}"),
        ("experts", ", ".join(report.expert_names)),
        ("merge method", method),
        ("parameters", f"{report.parameters:,} stored"),
        ("", f"{report.share:.1%} of the {report.expert_parameters:,} of the experts as separate models"),
        ("", distinct and f"{report.parameters / distinct:.1%} of the {distinct:,} in which they differ"),
        ("channel indices", format_bytes(report.index_bytes)),
        ("router", f"{format_bytes(report.router_bytes)}, {state}"),
    ):
        if value is not None:
            table.add_row(name, value)
    return table


def format_count(count: int) -> str:
    """A number as it is up to four digits, then four of them with the unit that suits it."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= max(size, 10**4):
            return f"{count / size:.4g} {unit}"
    return f"{count:,}"


def _kind_table(report: CheckpointReport) -> Table:
    table = Table()
    table.add_column("kind", no_wrap=True)
    for column in ("modules", "channels", "rows", "rows each", "params", "share"):
        table.add_column(column, justify="right")
    total = KindReport(
        "all",
        sum(kind.modules for kind in report.kinds),
        sum(kind.channels for kind in report.kinds),
        sum(kind.rows for kind in report.kinds),
        report.parameters,
        report.expert_parameters,
        report.relative_errors,
    )
    for kind in (*report.kinds, total):
        if kind is total:
            table.add_section()
        table.add_row(
            kind.kind,
            f"{kind.modules:,}",
            format_count(kind.channels) if kind.channels else "",
            format_count(kind.rows) if kind.rows else "",
            f"{kind.rows / kind.channels:.2f}" if kind.channels else "",
            format_count(kind.parameters),
            f"{kind.parameters / kind.expert_parameters:.1%}" if kind.expert_parameters else "",
        )
    return table


def _error_table(report: CheckpointReport) -> Table:
    """Each expert's relative error over all modules, and in the kinds where it is least and most."""
    table = Table("expert")
    table.add_column("relative error", justify="right")
    table.add_column("least in")
    table.add_column("most in")
    for expert, (name, error) in enumerate(zip(report.expert_names, report.relative_errors)):
        kinds = sorted(
            (kind.relative_errors[expert], kind.kind)
            for kind in report.kinds
            if kind.relative_errors is not None and kind.relative_errors[expert] is not None
        )
        ends = [f"{kinds[place][0]:.1%} {kinds[place][1]}" if kinds else "" for place in (0, -1)]
        table.add_row(name, "was the base" if error is None else f"{error:.1%}", *ends)
    return table


def _owner_table(report: CheckpointReport, max_owner_sets: int) -> Table:
    table = Table()
    table.add_column("owners", overflow="fold")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    total = sum(report.rows_by_owners.values())
    rows = list(report.rows_by_owners.items())
    if len(rows) > max_owner_sets:
        rest = rows[max_owner_sets - 1 :]
        rows = [*rows[: max_owner_sets - 1], (f"{len(rest)} other sets", sum(count for _, count in rest))]
    for owners, count in rows:
        table.add_row(owners, f"{count:,}", f"{count / total:.1%}")
    return table


def plot_report(report: CheckpointReport, file: str | Path) -> None:
    """Draw where the experts share rows, and what merging changed.

    By kind of module, by owners, and along the decoder blocks. The lower half, the relative errors, is left out where
    they were not measured.

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
    _plot_blocks(axes[0, 2], report, "share of rows with one owner", _share_of_one_owner)
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


def _plot_blocks(axes, report: CheckpointReport, label: str, value) -> None:
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
    axes.figure.colorbar(image, ax=axes, format=_percent())


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
