"""Rows of a data file or of a Hub dataset, as plain values."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.io.foreign_files import foreign, read_json_lines
from conversion.io.sources import without_folder

JSON_SUFFIXES = (".json", ".jsonl")
FILE_FORMATS = {".parquet": "parquet", ".csv": "csv"}
DATA_SUFFIXES = (*JSON_SUFFIXES, *FILE_FORMATS)


@dataclass(frozen=True)
class DataRows:
    """What a data file or dataset holds, checked for nothing but that it holds something."""

    rows: list[dict[str, Any]]
    columns: list[str]  # of all rows; those of JSON need not be in each
    name: str  # the file's without its suffix, or the dataset's id


def read_data(data: str, config: str | None = None) -> DataRows:
    """All rows of a JSONL, JSON, Parquet or CSV file, or of a Hub dataset (`id` or `id:split`; default: `train`).

    Args:
        config: of a Hub dataset that has several.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or has no rows.
    """
    check_data(data)
    suffix = Path(data).suffix
    if suffix in JSON_SUFFIXES:
        rows, name = [row for _, row in read_json_lines(Path(data))], Path(data).stem
        columns = list(dict.fromkeys(key for row in rows for key in row))
    else:
        if (file_format := FILE_FORMATS.get(suffix)) is not None:
            name, arguments = Path(data).stem, {"path": file_format, "data_files": data, "split": "train"}
        else:
            name, _, split = data.partition(":")
            arguments = {"path": name, "name": config, "split": split or "train"}
        from datasets import load_dataset  # slow to load

        with foreign(data), one_line_of_datasets():
            dataset = load_dataset(**arguments)
        rows, columns = dataset.to_list(), dataset.column_names
    if not rows:
        raise ValueError(f"{data} has no rows")
    return DataRows(rows, columns, without_folder(name))


def check_data(data: str) -> None:
    """FileNotFoundError where data are named as a file that is not there."""
    if Path(data).suffix in DATA_SUFFIXES and not Path(data).is_file():
        raise FileNotFoundError(f"there is no file {data}")


def read_stream(data: str, split: str | None, config: str | None, count: int) -> DataRows:
    """The first rows of a Hub dataset, without downloading all of it; errors as of `read_data`."""
    from datasets import load_dataset  # slow to load

    with foreign(data), one_line_of_datasets():
        stream = load_dataset(data, config, split=split or "train", streaming=True)
        rows = list(stream.take(count))
    if not rows:
        raise ValueError(f"{data} has no rows")
    return DataRows(rows, list(rows[0]), without_folder(data))


def find_data(data: str, folder: Path) -> str:
    """A data file that is named by where it lies from a folder; a Hub dataset as it stands."""
    path = Path(data).expanduser()
    named = path if path.is_absolute() else folder / path
    return str(named) if named.is_file() or path.suffix in DATA_SUFFIXES else data


@contextmanager
def one_line_of_datasets() -> Iterator[None]:
    """What `datasets` raises says everything; what it logs before it would stand beside that."""
    from datasets.utils import logging as datasets_logging

    level = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(level)
