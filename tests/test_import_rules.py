"""The arrows between the rooms: hub_examples -> conversion -> modeling_channel_merged -> torch, transformers."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("hub_examples", "conversion", "modeling_channel_merged")
MODEL = ROOT / "modeling_channel_merged"
SHIPPED = sorted(file for file in MODEL.glob("*.py") if file.name != "__init__.py")
# Each room may import those after it, and itself.
ALLOWED = {room: set(ROOMS[place:]) for place, room in enumerate(ROOMS)}
# The loader of Transformers finds relative imports with this kind of expression, in docstrings and comments too.
RELATIVE_IMPORT_TEXT = re.compile(r"^\s*(?:from\s+\.|import\s+\.)", re.MULTILINE)


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(file: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def imported_roots(file: Path) -> set[str]:
    """First names of all absolute imports of a file, wherever they stand in it."""
    roots = set()
    for node in imports(file):
        if isinstance(node, ast.Import):
            roots.update(alias.name.split(".")[0] for alias in node.names)
        elif node.level == 0:
            roots.add(node.module.split(".")[0])
    return roots


def sibling_imports(file: Path) -> set[str]:
    """Names of the modules beside it that a file imports relatively."""
    return {node.module for node in imports(file) if isinstance(node, ast.ImportFrom) and node.level and node.module}


def names(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", [file for room in ROOMS for file in files_of(room)], ids=names)
def test_imports_point_one_way(file):
    """No file imports a room before its own, and none imports tests."""
    room = file.relative_to(ROOT).parts[0]
    ours = imported_roots(file) & {*ROOMS, "tests"}
    assert ours <= ALLOWED[room], f"{names(file)} imports {sorted(ours - ALLOWED[room])}"


def test_modeling_folder_is_flat():
    """What ships to the Hub lies in one folder, and nothing but code does."""
    files = [
        file.relative_to(MODEL) for file in MODEL.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    ]
    assert files and all(len(file.parts) == 1 and file.suffix == ".py" for file in files), files


@pytest.mark.parametrize("file", sorted(MODEL.glob("*.py")), ids=names)
def test_modeling_files_import_as_the_loader_expects(file):
    """`from .x import y` with a plain sibling; no `from . import x`, `from .a.b import x` or absolute name of ours."""
    for node in imports(file):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
            assert (MODEL / f"{node.module}.py").is_file(), ast.unparse(node)
    assert not imported_roots(file) & {*ROOMS, "tests"}


@pytest.mark.parametrize("file", SHIPPED, ids=names)
def test_shipped_files_need_only_torch_and_transformers(file):
    foreign = imported_roots(file) - set(sys.stdlib_module_names) - {"torch", "transformers", "triton"}
    assert not foreign, f"{names(file)} imports {sorted(foreign)}"


@pytest.mark.parametrize("file", SHIPPED, ids=names)
def test_no_import_text_outside_of_imports(file):
    """Every line that looks like a relative import is one: the loader would follow a docstring's example too."""
    text = file.read_text(encoding="utf-8")
    real = sum(isinstance(node, ast.ImportFrom) and node.level > 0 for node in imports(file))
    assert len(RELATIVE_IMPORT_TEXT.findall(text)) == real


def test_modeling_files_have_no_import_cycle():
    graph = {file.stem: sibling_imports(file) for file in SHIPPED}
    while graph:
        leaves = {module for module, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"import cycle among {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in leaves}


def test_package_initialiser_is_not_imported_by_its_modules():
    """__init__.py does not ship, so nothing may need it."""
    for file in SHIPPED:
        assert "__init__" not in sibling_imports(file)


def test_rules_catch_what_they_should(tmp_path):
    """The scan sees imports inside functions, in try blocks and behind TYPE_CHECKING."""
    file = tmp_path / "example.py"
    file.write_text(
        "import os\nif TYPE_CHECKING:\n    import conversion.merging.plan\n"
        "def f():\n    from tests.x import y\n"
        "    try:\n        from .sibling import z\n    except ImportError:\n        pass\n"
    )
    assert imported_roots(file) == {"os", "conversion", "tests"}
    assert sibling_imports(file) == {"sibling"}
    assert len(RELATIVE_IMPORT_TEXT.findall('"""Use:\n    from .layers import x\n"""')) == 1
