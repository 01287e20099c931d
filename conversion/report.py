"""What a channel-merged checkpoint stores, as tables for a terminal."""

from rich import box
from rich.table import Table

from conversion.checkpoints.checkpoint_report import CheckpointReport, KindReport, rows_per_channel
from conversion.io.options import format_bytes, format_count


def report_tables(report: CheckpointReport, max_owner_sets: int = 16) -> list[Table | str]:
    """The report for a terminal of at least 80 columns, as rich renderables."""
    tables = [
        _summary(report),
        "\nStored by kind of module; share of the experts as separate models",
        _kind_table(report),
        *budget_tables(report),
        "\nStored rows by owners",
        _owner_table(report, max_owner_sets),
    ]
    if report.relative_errors is not None:
        tables += [
            "\nWhat merging changed: (merged rows - own rows) over (own rows - base rows)",
            _error_table(report),
        ]
    return tables


def budget_tables(report: CheckpointReport) -> list[Table | str]:
    """What a budget bought in every decoder block; nothing without one."""
    matrices = [matrix for matrix in report.matrices if matrix.layer is not None]
    if report.budget is None or not matrices:
        return []
    kinds = list(dict.fromkeys(matrix.kind for matrix in matrices))
    table = Table("block", box=box.SIMPLE)
    for kind in kinds:
        table.add_column(kind, justify="right", overflow="fold")
    for layer in sorted({matrix.layer for matrix in matrices}):
        cells = [
            rows_per_channel(matrix for matrix in matrices if (matrix.kind, matrix.layer) == (kind, layer))
            for kind in kinds
        ]
        table.add_row(str(layer), *("" if cell is None else f"{cell:.2f}" for cell in cells))
    return ["\nRows per channel in every decoder block", table]


def _summary(report: CheckpointReport) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    router, state = report.router, "trained" if report.router_trained else "untrained"
    if not report.router_trained:
        state += f", answers with {router['default_expert']}"
    method, distinct = report.merge.get("method"), report.distinct_parameters
    lost, texts = report.lost_share, report.calibration_texts
    for name, value in (
        ("checkpoint", report.checkpoint),
        ("base architecture", f"{report.architecture}, {report.dtype}"),
        ("experts", ", ".join(report.expert_names)),
        ("merge method", method),
        ("parameters", f"{report.parameters:,} stored"),
        ("", f"{report.share:.1%} of the {report.expert_parameters:,} of the experts as separate models"),
        ("", distinct and f"{report.parameters / distinct:.1%} of the {distinct:,} in which they differ"),
        ("budget", report.budget and f"{report.budget:.1%}"),
        ("predicted loss", lost and f"{lost:.1%} of that of one row per channel"),
        ("calibration texts", texts and ", ".join(f"{name} {count:,}" for name, count in texts.items())),
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
