"""Where what a recipe names is: its models, its calibration texts, and its output. Importing it is quick.

Most mistakes in a recipe are of that kind, and need not wait for what a conversion needs.
"""

from collections.abc import Callable
from pathlib import Path

from conversion.io.data_rows import check_data, find_data
from conversion.io.sources import BASE, Source, find_place, find_source, with_weights
from conversion.io.staged_folder import check_not_a_source, check_target
from conversion.merging.recipe import Recipe


def locate(recipe: Recipe, out: Path | str | None, overwrite: bool) -> list[Source]:
    """The base and the experts, none of which `out` may replace: of Hub repositories the small files, and adapters."""
    base, *experts = _find(recipe, out, overwrite, find_source)
    return [base, *(with_weights(expert) if expert.is_adapter else expert for expert in experts)]


def check_places(recipe: Recipe, out: Path | str | None = None, overwrite: bool = False) -> None:
    """ValueError where a model is not there, or the output may not be written; what texts are named must be there."""
    _find(recipe, out, overwrite, find_place)
    if recipe.calibration is not None and recipe.calibration.data is not None:
        check_data(find_texts(recipe))


def _find(
    recipe: Recipe, out: Path | str | None, overwrite: bool, find: Callable[[str, str, Path], Source]
) -> list[Source]:
    if out is not None:
        check_target(Path(out), overwrite)
    models = [(BASE, recipe.base_model), *((expert.name, expert.model) for expert in recipe.experts)]
    sources = [find(name, model, recipe.folder) for name, model in models]
    if out is not None:
        folders = {f"the checkpoint of {source.name} ({source.model})": source.folder for source in sources}
        check_not_a_source(Path(out), folders)
    return sources


def find_texts(recipe: Recipe) -> str:
    """The calibration texts that a recipe names: a file, by the recipe's folder, or a Hub dataset as it stands."""
    data = recipe.calibration.data if recipe.calibration else None
    if data is None:
        raise ValueError("the recipe has no calibration texts: add calibration: {data: texts.jsonl}")
    return find_data(data, recipe.folder)
