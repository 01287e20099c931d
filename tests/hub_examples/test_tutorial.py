"""The tutorial runs from top to bottom, as a reader runs it, and says what it promises."""

import re
import sys
import warnings
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="installed by make test")

FOLDER = Path(__file__).parents[2] / "hub_examples"


@pytest.mark.slow
def test_tutorial_runs(monkeypatch, tmp_path):
    """In a kernel of this environment, with this checkout's packages and a folder of its own for what it writes."""
    import nbformat

    monkeypatch.setenv("PYTHONPATH", f"{FOLDER.parent}:{FOLDER}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(FOLDER / "tutorial.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "stored without what a run printed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the notebook's own machinery
        client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}})
        client.create_kernel_manager()
        client.km.kernel_spec.argv[0] = sys.executable
        client.execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.get("name") == "stdout"
    )
    assert re.search(r"\d\d% of the four experts'", printed)
    (accuracy,) = re.findall(r"right expert for (\d+)%", printed)
    assert int(accuracy) >= 90
    answered = re.findall(r"^\[(\w+)\]", printed, re.MULTILINE)
    assert answered == ["instruct", "math", "code", "chinese"]
    (difference,) = re.findall(r"LlamaForCausalLM differs by at most (\S+)", printed)
    assert float(difference) < 1e-3
