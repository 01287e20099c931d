"""The files that the weights of a checkpoint may lie in, by their names alone. Importing it is quick."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from conversion.io.foreign_files import read_json


@dataclass(frozen=True)
class WeightFormat:
    """A way to store a checkpoint: in one file, or in several with an index."""

    single: str

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"


# The first that is there is read.
MODEL_FORMATS = (WeightFormat("model.safetensors"), WeightFormat("pytorch_model.bin"))
ADAPTER_FORMATS = (WeightFormat("adapter_model.safetensors"), WeightFormat("adapter_model.bin"))


def weight_files(folder: Path, formats: Iterable[WeightFormat] = MODEL_FORMATS) -> list[str]:
    """Names of a checkpoint's files, from the single file or the index; they need not be there.

    Raises:
        ValueError: the folder has none of the formats, or an index cannot be read.
    """
    looked_for = []
    for format in formats:
        if (folder / format.single).exists():
            return [format.single]
        if (folder / format.index).exists():
            return sorted(set(weight_map(folder / format.index).values()))
        looked_for.append(format.single)
    raise ValueError(f"{folder} has no {' or '.join(looked_for)}, nor an index of several{_other_format(folder)}")


def weight_map(index: Path) -> dict[str, str]:
    """Tensor names and the names of their files, from an index."""
    from modeling_channel_merged.stored_tensors import check_shard_names

    files = read_json(index).get("weight_map")
    check_shard_names(files, str(index))
    return files


def _other_format(folder: Path) -> str:
    """What a folder without a known format holds instead, for the error."""
    others = sorted(file.name for pattern in ("*.pt", "*.pth", "*.gguf", "*.h5") for file in folder.glob(pattern))
    if not others:
        return ""
    return f", only {others[0]}: save it as safetensors first (load it with Transformers and call save_pretrained)"
