"""The wheel: what is in it, and that it works away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel's content in a folder of its own, as pip would lay it out."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, *arguments: str) -> str:
    """Run Python with the wheel's content first on the path, away from the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=installed.parent, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_wheel_holds_both_packages_and_nothing_else(installed):
    folders = {path.name for path in installed.iterdir()}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"conversion", "modeling_channel_merged"}
    for package in ("conversion", "modeling_channel_merged"):
        folder = installed / package
        files = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
        assert files == {file.relative_to(ROOT / package) for file in (ROOT / package).rglob("*.py")}
    (metadata,) = installed.glob("*.dist-info")
    assert (metadata / "licenses" / "LICENSE").is_file()
    assert "channel-merge = conversion.__main__:main" in (metadata / "entry_points.txt").read_text()


def test_wheel_runs_away_from_the_checkout(installed):
    """The command line answers, and the modeling files that a conversion copies are the wheel's own."""
    assert "train-router" in run(installed, "-m", "conversion", "--help")
    code = (
        "import modeling_channel_merged, conversion.hub.model_folder as hub; from pathlib import Path; "
        "out = Path('code'); out.mkdir(); hub.write_code(out); "
        "print(modeling_channel_merged.__file__); print(*sorted(file.name for file in out.iterdir()))"
    )
    where, copied = run(installed, "-c", code).splitlines()[-2:]
    assert Path(where).is_relative_to(installed)
    shipped = {file.name for file in (ROOT / "modeling_channel_merged").glob("*.py")} - {"__init__.py"}
    assert set(copied.split()) == shipped
