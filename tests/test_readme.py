"""The Python examples of the README run as they stand.

A reader copies an example after the first one, and after those above it in its section. So here:

- A section (from one heading to the next) runs in a namespace of its own: the values that the first example of the
  README leaves, then its examples in order.
- Imports do not carry over from one example to the next: each has what it needs, and may be copied alone.
- The working folder is new for each section, and holds what the text speaks of: a merged and routed checkpoint under
  the names in `CHECKPOINTS`, made from the shipped tiny experts, and the files of `write_files`. `GIVEN` has the
  values that are the reader's own.
- An example that imports one of `NOT_OURS` is skipped where that is not installed. One that cannot run here at all (it
  needs a GPU, or a server) follows a line `<!-- not run: why -->`.
"""

import ast
import json
import re
import shutil
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conversion.convert import convert
from conversion.train_router import main as train_router

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CHECKPOINTS = ("you/your-merged-model", "merged", "routed")
NOT_OURS = {"bitsandbytes", "gguf", "lm_eval", "onnx", "onnxruntime", "openai", "requests", "torchao", "trl", "vllm"}
NOT_RUN = re.compile(r"<!-- not run: .+ -->")


@dataclass(frozen=True)
class Block:
    """A Python example: the heading that it stands under, the line it begins in, and its text."""

    section: str
    line: int
    text: str

    @property
    def imported(self) -> set[str]:
        """Names that its imports bind."""
        nodes = [node for node in ast.walk(ast.parse(self.text)) if isinstance(node, ast.Import | ast.ImportFrom)]
        return {(alias.asname or alias.name).partition(".")[0] for node in nodes for alias in node.names}

    @property
    def modules(self) -> set[str]:
        """First names of the modules that it imports from."""
        names = set()
        for node in ast.walk(ast.parse(self.text)):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
        return names


def python_blocks(text: str) -> list[Block]:
    """All fenced Python of a Markdown text, but what it says is not run."""
    blocks, section, begin, before = [], "", None, ""
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if begin is None and line.startswith("#"):
            section = line.lstrip("# ")
        elif begin is None and line.startswith("```"):
            begin, language, skipped = number, line[3:].strip(), NOT_RUN.fullmatch(before)
        elif begin is not None and line.startswith("```"):
            if language == "python" and not skipped:
                blocks.append(Block(section, begin + 1, "\n".join(lines[begin : number - 1])))
            begin = None
        before = line if line.strip() else before
    return blocks


BLOCKS = python_blocks(README.read_text(encoding="utf-8"))
FIRST, *_ = BLOCKS
SECTIONS = list(dict.fromkeys(block.section for block in BLOCKS))
WEEKDAYS = "今天星期三，明天星期几？"
QUERIES = {
    "instruct": "Please name a colour.",
    "math": "What is 7 times 8?",
    "code": "Write a loop.",
    "chinese": WEEKDAYS,
}


def given() -> dict[str, Any]:
    """Values that the reader has."""
    tokens = [[256, 5, 6, 7], [256, 8, 9, 10]]
    return {"data": [{"input_ids": row, "attention_mask": [1] * 4, "labels": row} for row in tokens]}


def write_files(folder: Path) -> None:
    """Files that the reader has."""
    queries = [{"text": f"{text} {number}", "expert": name} for number in range(10) for name, text in QUERIES.items()]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries), encoding="utf-8")


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Path:
    """The demo's experts, merged and routed by hardly any training."""
    folder = tmp_path_factory.mktemp("readme")
    write_files(folder)
    recipe = ROOT / "hub_examples" / "tiny_experts" / "recipes" / "average.yaml"
    convert(recipe, folder / "merged", progress=False)
    options = ("--max-steps", "20", "--disable-tqdm", "true", "--use-cpu", "true")
    data = ("--train-data", str(folder / "queries.jsonl"), "--eval-data", str(folder / "queries.jsonl"))
    train_router(["--checkpoint", str(folder / "merged"), "--output-dir", str(folder / "routed"), *data, *options])
    return folder / "routed"


def run(block: Block, namespace: dict[str, Any]) -> None:
    """Run an example as if it stood in the README's file, then forget what it imported."""
    code = compile("\n" * (block.line - 1) + block.text, str(README), "exec")
    exec(code, namespace)
    for name in block.imported:
        namespace.pop(name, None)


@pytest.mark.parametrize("section", SECTIONS)
def test_examples_run(section, routed, tmp_path, monkeypatch):
    blocks = [block for block in BLOCKS if block.section == section and block != FIRST]
    missing = {name for block in blocks for name in block.modules & NOT_OURS if find_spec(name) is None}
    for name in CHECKPOINTS:
        shutil.copytree(routed, tmp_path / name)
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    namespace = given()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries, which a reader sees and goes on
        run(FIRST, namespace)
        for block in blocks:
            if not block.modules & missing:
                run(block, namespace)
    assert not [name for name, value in namespace.items() if isinstance(value, ModuleType)]
    if missing:
        pytest.skip(f"not installed: {', '.join(sorted(missing))}")


def test_the_first_example_is_the_readers_first():
    """It makes what the others use."""
    namespace = {node.id for node in ast.walk(ast.parse(FIRST.text)) if isinstance(node, ast.Name)}
    assert FIRST == BLOCKS[0] and {"model", "tokenizer", "inputs"} <= namespace


def test_blocks_are_found():
    """All Python fences, under their headings; what is said not to run is left out."""
    text = "# A\n```python\na = 1\n```\n## B\n```bash\nls\n```\n<!-- not run: a GPU -->\n```python\nb\n```\n"
    text += "### C\n\n```python\n# no heading\nimport torch.nn as n\nfrom os import path\n```\n"
    first, last = python_blocks(text)
    assert (first, last.section, last.line) == (Block("A", 3, "a = 1"), "C", 16)
    assert last.imported == {"n", "path"} and last.modules == {"torch", "os"}
    assert len(BLOCKS) + len(NOT_RUN.findall(README.read_text(encoding="utf-8"))) == README.read_text().count(
        "```python"
    )
