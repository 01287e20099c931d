"""Whether there is a channel-merged checkpoint where one is named, by its config alone. Importing it is quick."""

from pathlib import Path
from typing import Any

from conversion.io.foreign_files import read_model_config
from conversion.io.sources import Source, find_place

MODEL_TYPE = "channel_merged"


def check_checkpoint(checkpoint: str | Path, expert: str | None = None) -> None:
    """ValueError where there is no channel-merged checkpoint, a folder or a Hub id, or none with that expert."""
    source = find_place("checkpoint", str(checkpoint), Path())
    refuse_adapter(source)
    names = read_plain_config(source.folder).get("expert_names")
    if expert is not None and isinstance(names, list) and expert not in names:
        raise ValueError(f"unknown expert {expert!r}: this model has {names}")


def refuse_adapter(source: Source) -> None:
    if source.is_adapter:
        raise ValueError(f"{source.model} is a PEFT adapter, expected a channel-merged checkpoint")


def read_plain_config(folder: Path) -> dict[str, Any]:
    """The plain values of a checkpoint's config; ValueError where the folder holds something else."""
    config = read_model_config(folder / "config.json")
    if config["model_type"] != MODEL_TYPE:
        raise ValueError(
            f"{folder} is not a channel-merged checkpoint: its model_type is {config['model_type']!r}, "
            f"expected {MODEL_TYPE!r}"
        )
    return config
