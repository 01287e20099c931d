"""The report of a checkpoint in the terminal and as a picture."""

import io
import sys

import pytest
from rich.console import Console

from conversion.checkpoints.checkpoint_report import inspect_checkpoint
from conversion.checkpoints.report_plot import plot_report
from conversion.report import report_tables


def test_tables_name_everything(stored):
    """The printed report has every kind and every expert; many owner sets are summed up in one line."""
    report = inspect_checkpoint(stored.folder)
    console = Console(width=100, file=io.StringIO())
    console.print(*report_tables(report, max_owner_sets=3), sep="\n")
    text = console.file.getvalue()
    for word in (*(kind.kind for kind in report.kinds), *report.expert_names, f"{report.share:.1%}", "5 other sets"):
        assert word in text, word


def test_plot(stored, tmp_path):
    file = tmp_path / "sharing.png"
    plot_report(inspect_checkpoint(stored.folder), file)
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000


def test_plot_without_matplotlib(stored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'channel-merged\[plot\]'"):
        plot_report(inspect_checkpoint(stored.folder), tmp_path / "sharing.png")


def test_an_expert_that_was_the_base(measured, write_norms):
    for matrix in inspect_checkpoint(measured.folder).matrices:
        write_norms(measured, matrix.path, delta_norms={"code": 0.0})
    report = inspect_checkpoint(measured.folder)
    assert report.relative_errors[2] is None
    text = printed(report, 80)
    assert "was the base" in text
    plot_report(report, measured.folder / "plot.png")


def test_errors_that_were_not_measured_are_left_out(stored):
    """A checkpoint that was saved anew by Transformers has no report of its conversion."""
    (stored.folder / "conversion_report.json").unlink()
    report = inspect_checkpoint(stored.folder)
    assert report.relative_errors is None and "merging changed" not in printed(report, 80)


def printed(report, width):
    console = Console(width=width, file=io.StringIO())
    console.print(*report_tables(report), sep="\n")
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(measured, width):
    """Nothing is cut off or folded within a word."""
    report = inspect_checkpoint(measured.folder)
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for kind in report.kinds:
        assert f"│ {kind.kind} " in text
    assert "50.0%" in text and "25.0%" in text


def test_plot_shows_errors_where_they_were_measured(measured, tmp_path):
    plot_report(inspect_checkpoint(measured.folder), tmp_path / "with.png")
    (measured.folder / "conversion_report.json").unlink()
    plot_report(inspect_checkpoint(measured.folder), tmp_path / "without.png")
    heights = [int.from_bytes((tmp_path / f"{name}.png").read_bytes()[20:24], "big") for name in ("with", "without")]
    assert heights[0] > 1.5 * heights[1]
