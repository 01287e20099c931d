"""What a channel-merged checkpoint stores, from its config, headers and channel indices alone.

Stored parameters are compared with those of the N experts as separate models, where a tied head counts once, and with
the distinct ones as the conversion counted them; bytes of the channel indices and of the router stand beside them.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from conversion.merged_checkpoint import ROUTER_TENSORS, MergedCheckpoint

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
        matrices = tuple(_matrix_report(merged, path, masks) for path, masks in owners.items())
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
            parameters=sum(kind.parameters for kind in kinds),
            expert_parameters=sum(kind.expert_parameters for kind in kinds),
            index_bytes=sum(
                merged.tensors[f"model.{path}.channel_index"].num_bytes for path in merged.modules.channel
            ),
            router_bytes=sum(merged.tensors[name].num_bytes for name in ROUTER_TENSORS),
            router_trained=any(bool(merged.reader.read(name).any()) for name in ROUTER_TENSORS),
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


def _matrix_report(merged: MergedCheckpoint, path: str, owners: torch.Tensor) -> MatrixReport:
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
        )
        for kind, members in by_kind.items()
    ]


def _per_expert_report(merged: MergedCheckpoint) -> KindReport:
    base = merged.base_model
    per_expert = merged.modules.per_expert
    parameters = merged.config.num_experts * sum(
        base.get_parameter(f"{path}.{name}").numel() for path, names in per_expert.items() for name in names
    )
    return KindReport(PER_EXPERT_KIND, len(per_expert), 0, 0, parameters, parameters)


def _rows_by_owners(owners, expert_names: list[str]) -> dict[str, int]:
    masks, counts = torch.cat(list(owners)).unique(return_counts=True)
    named = {
        " + ".join(name for expert, name in enumerate(expert_names) if mask >> expert & 1) or "nobody": count
        for mask, count in zip(masks.tolist(), counts.tolist())
    }
    return dict(sorted(named.items(), key=lambda item: -item[1]))


def report_tables(report: CheckpointReport, max_owner_sets: int = 16) -> list[Table | str]:
    """The report for a terminal, as rich renderables."""
    return [
        _summary(report),
        "\nStored by kind of module; share of the experts as separate models",
        _kind_table(report),
        "\nStored rows by owners",
        _owner_table(report, max_owner_sets),
    ]


def format_bytes(count: int) -> str:
    """A number of bytes with the unit that suits it."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} bytes"


def _summary(report: CheckpointReport) -> Table:
    table = Table.grid(padding=(0, 2))
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
    )
    for kind in (*report.kinds, total):
        if kind is total:
            table.add_section()
        table.add_row(
            kind.kind,
            f"{kind.modules:,}",
            f"{kind.channels:,}" if kind.channels else "",
            f"{kind.rows:,}" if kind.rows else "",
            f"{kind.rows / kind.channels:.2f}" if kind.channels else "",
            f"{kind.parameters:,}",
            f"{kind.parameters / kind.expert_parameters:.1%}" if kind.expert_parameters else "",
        )
    return table


def _owner_table(report: CheckpointReport, max_owner_sets: int) -> Table:
    table = Table("owners")
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
    """Draw where the experts share rows: by kind of module and number of owners, and along the decoder blocks.

    Raises:
        ValueError: matplotlib is not installed, or it cannot write files of this suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a plot needs matplotlib: pip install 'channel-merged[plot]'") from error
    figure = Figure(figsize=(13, 5), layout="constrained")
    by_kind, by_layer = figure.subplots(1, 2)
    _plot_owner_counts(by_kind, report)
    _plot_layers(by_layer, report)
    figure.suptitle(
        f"{', '.join(report.expert_names)}: {report.share:.1%} of the experts' parameters ({report.architecture})"
    )
    figure.savefig(file, dpi=150)


def _plot_owner_counts(axes, report: CheckpointReport) -> None:
    """One bar per kind of module: share of its rows by number of owners."""
    kinds = [kind.kind for kind in report.kinds if kind.rows]
    num_experts = len(report.expert_names)
    counts = torch.zeros(len(kinds), num_experts)
    for matrix in report.matrices:
        counts[kinds.index(matrix.kind)] += torch.tensor(matrix.rows_by_owner_count)
    shares = (counts / counts.sum(1, keepdim=True)).T.tolist()
    left = [0.0] * len(kinds)
    for owners, share in enumerate(shares, start=1):
        color = str(0.85 - 0.75 * (owners - 1) / max(1, num_experts - 1))
        axes.barh(kinds, share, left=left, label=str(owners), color=color)
        left = [done + part for done, part in zip(left, share)]
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of stored rows")
    axes.legend(title="owners", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _plot_layers(axes, report: CheckpointReport) -> None:
    """One line per kind of module: stored rows per channel along the decoder blocks."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for matrix in report.matrices:
        if matrix.layer is not None:
            lines.setdefault(matrix.kind, []).append((matrix.layer, matrix.rows / matrix.channels))
    for kind, points in lines.items():
        axes.plot(*zip(*sorted(points)), marker="o", markersize=3, label=kind)
    axes.set_ylim(0.95, len(report.expert_names) + 0.05)
    axes.set_xlabel("decoder block")
    axes.set_ylabel("stored rows per channel")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if lines:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
