import io
import json
import sys

import pytest
from rich.console import Console

from conversion.checkpoints.checkpoint_report import inspect_checkpoint
from conversion.report import plot_report, report_tables


def test_tables_name_everything(stored):
    """The printed report has every kind and every expert; many owner sets are summed up in one line."""
    report = inspect_checkpoint(stored.folder)
    console = Console(width=100, file=io.StringIO())
    console.print(*report_tables(report, max_owner_sets=3), sep="\n")
    text = console.file.getvalue()
    for word in (*(kind.kind for kind in report.kinds), *report.expert_names, f"{report.share:.1%}", "5 other sets"):
        assert word in text, word


def test_json(stored):
    report = inspect_checkpoint(stored.folder)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["share"] == report.parameters / report.expert_parameters
    assert values["rows_by_owners"] == report.rows_by_owners
    assert len(values["matrices"]) == 16


def test_plot(stored, tmp_path):
    file = tmp_path / "sharing.png"
    plot_report(inspect_checkpoint(stored.folder), file)
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000


def test_plot_without_matplotlib(stored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'channel-merged\[plot\]'"):
        plot_report(inspect_checkpoint(stored.folder), tmp_path / "sharing.png")


@pytest.fixture
def measured(stored):
    """The checkpoint with a conversion's report: e's delta norm is 2 + e, its error norm 1 in every module."""
    paths = [matrix.path for matrix in inspect_checkpoint(stored.folder).matrices]
    names = stored.config.expert_names
    module = {
        "delta_norms": {name: 2.0 + number for number, name in enumerate(names)},
        "error_norms": {name: 1.0 for name in names},
    }
    (stored.folder / "conversion_report.json").write_text(json.dumps({"modules": {path: module for path in paths}}))
    return stored


def write_norms(stored, path, **norms):
    """Change one module of the conversion's report."""
    file = stored.folder / "conversion_report.json"
    report = json.loads(file.read_text())
    for key, values in norms.items():
        report["modules"][path][key] |= values
    file.write_text(json.dumps(report))


def test_relative_errors_of_kinds_and_experts(measured):
    """Norms of several modules add up as squares do, before they are divided."""
    write_norms(measured, "model.layers.0.self_attn.q_proj", error_norms={"math": 3.0}, delta_norms={"math": 4.0})
    report = inspect_checkpoint(measured.folder)
    kinds = {kind.kind: kind.relative_errors for kind in report.kinds}
    assert kinds["lm_head"] == pytest.approx((1 / 2, 1 / 3, 1 / 4))
    assert kinds["q_proj"] == pytest.approx((1 / 2, (10 / 25) ** 0.5, 1 / 4), rel=1e-5)
    assert kinds["kept per expert"] is None
    assert report.relative_errors == pytest.approx((1 / 2, ((15 + 9) / (15 * 9 + 16)) ** 0.5, 1 / 4), rel=1e-5)


def test_an_expert_that_was_the_base(measured):
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


def test_a_report_of_other_experts_is_refused(measured):
    file = measured.folder / "conversion_report.json"
    file.write_text(file.read_text().replace('"math"', '"physics"'))
    with pytest.raises(ValueError, match="is no report of a conversion of instruct, math, code"):
        inspect_checkpoint(measured.folder)


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


def test_share_of_rows_by_owners_of_every_module(measured):
    """The JSON report has each module's rows by owner set, which add up to the whole model's."""
    report = json.loads(json.dumps(inspect_checkpoint(measured.folder).to_dict()))
    total: dict[str, int] = {}
    for matrix in report["matrices"]:
        assert sum(matrix["rows_by_owners"].values()) == matrix["rows"]
        for owners, rows in matrix["rows_by_owners"].items():
            total[owners] = total.get(owners, 0) + rows
    assert total == report["rows_by_owners"]


def test_plot_shows_errors_where_they_were_measured(measured, tmp_path):
    plot_report(inspect_checkpoint(measured.folder), tmp_path / "with.png")
    (measured.folder / "conversion_report.json").unlink()
    plot_report(inspect_checkpoint(measured.folder), tmp_path / "without.png")
    heights = [int.from_bytes((tmp_path / f"{name}.png").read_bytes()[20:24], "big") for name in ("with", "without")]
    assert heights[0] > 1.5 * heights[1]
