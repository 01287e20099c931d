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
CONVERSION = ROOT / "conversion"
# Which rooms of conversion/ each room may import beside itself. The files at the door may import every room.
MAY_IMPORT = {
    "channels": (),
    "io": (),
    "vocabulary": ("io",),
    "checkpoints": ("io", "channels"),
    "merging": ("channels", "io", "vocabulary", "checkpoints"),
    "hub": ("channels", "io", "vocabulary", "checkpoints", "merging"),
    "addition": ("channels", "io", "vocabulary", "checkpoints", "merging", "hub"),
    "training": ("io",),
    "router": ("io", "vocabulary", "training"),
    "serving": ("io", "vocabulary", "checkpoints", "router"),
    "refinement": ("io", "vocabulary", "checkpoints", "merging", "hub", "training"),
}
DOOR = "the door"
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


def imported_files(file: Path) -> set[Path]:
    """Files of conversion/ that a file imports, wherever in it."""
    found = set()
    for node in imports(file):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif node.level == 0:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            modules = []
        for module in modules:
            path = ROOT.joinpath(*module.split("."))
            if module.split(".")[0] == "conversion" and path.with_suffix(".py").is_file():
                found.add(path.with_suffix(".py"))
    return found


def room_of(file: Path) -> str:
    """The room of conversion/ that a file lies in."""
    place = file.relative_to(CONVERSION).parts
    return place[0] if len(place) > 1 else DOOR


def names(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", [file for room in ROOMS for file in files_of(room)], ids=names)
def test_imports_point_one_way(file):
    """No file imports a room before its own, and none imports tests."""
    room = file.relative_to(ROOT).parts[0]
    ours = imported_roots(file) & {*ROOMS, "tests"}
    assert ours <= ALLOWED[room], f"{names(file)} imports {sorted(ours - ALLOWED[room])}"


def test_every_folder_of_the_conversion_is_a_room():
    """No folder is left out of the table, none lies in another, and each says what it is for and nothing else."""
    folders = {file.parent.relative_to(CONVERSION) for file in files_of("conversion")} - {Path(".")}
    assert folders == set(map(Path, MAY_IMPORT))
    for room in MAY_IMPORT:
        (docstring,) = ast.parse((CONVERSION / room / "__init__.py").read_text(encoding="utf-8")).body
        assert isinstance(docstring.value.value, str)


@pytest.mark.parametrize("file", files_of("conversion"), ids=names)
def test_rooms_import_only_rooms_below(file):
    """A room imports what the table allows and nothing at the door; the files at the door do not import each other,
    but for the command line, which imports its commands."""
    allowed = {room_of(file), *MAY_IMPORT.get(room_of(file), MAY_IMPORT)}
    if room_of(file) == DOOR and file.name != "__main__.py":
        allowed.remove(DOOR)
    wrong = sorted(names(other) for other in imported_files(file) - {file} if room_of(other) not in allowed)
    assert not wrong, f"{names(file)} imports {wrong}"


def test_table_of_rooms_has_no_circle():
    for room, below in MAY_IMPORT.items():
        assert not [other for other in below if room in MAY_IMPORT[other]], room


def test_conversion_files_have_no_import_cycle():
    graph = {file: imported_files(file) - {file} for file in files_of("conversion")}
    while graph:
        leaves = {file for file, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"import cycle among {sorted(map(names, graph))}"
        graph = {file: needs for file, needs in graph.items() if file not in leaves}


@pytest.mark.parametrize("file", files_of("conversion"), ids=names)
def test_every_file_says_what_it_is_for(file):
    first_line = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    assert len(first_line) > 20, f"{names(file)} has no docstring"


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
    file.write_text(
        "import conversion.io.journal\ndef f():\n    from conversion.merging import plan, recipe\n"
        "    from conversion.convert import convert\n"
    )
    assert set(map(room_of, imported_files(file))) == {"io", "merging", DOOR}
    assert {other.name for other in imported_files(file)} == {"journal.py", "plan.py", "recipe.py", "convert.py"}
    assert len(RELATIVE_IMPORT_TEXT.findall('"""Use:\n    from .layers import x\n"""')) == 1
