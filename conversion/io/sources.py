"""Where the models of a recipe are: local folders, or Hub repositories of which only the files needed are fetched.

A folder holds one model: the weights of a whole model, or a PEFT adapter (`adapter_config.json`) of the base.
"""

import contextlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from conversion.io.foreign_files import check_ordinary
from conversion.io.journal import file_hash
from conversion.io.model_files import EXPERT_FILES, TOKENIZER_PATTERNS
from conversion.io.weight_formats import ADAPTER_FORMATS, MODEL_FORMATS, WeightFormat, weight_files
from conversion.io.wording import one_line

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
ADAPTER_CONFIG = "adapter_config.json"
BASE = "base_model"  # the name of the base among the sources of a recipe

# What a model has beside its weights, at the top of its repository: the Hub's patterns match folders with "*" too,
# so none begins with one.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "conversion_report.json",
    "README.md",
    ADAPTER_CONFIG,
    *(format.index for format in MODEL_FORMATS),
    *TOKENIZER_PATTERNS,
    "qwen.tiktoken",
    *EXPERT_FILES,
)

# Files beside the weights that a result depends on.
READ_FILES = (
    "config.json",
    "generation_config.json",
    ADAPTER_CONFIG,
    *(format.index for format in (*MODEL_FORMATS, *ADAPTER_FORMATS)),
    *TOKENIZER_PATTERNS,
    "*.tiktoken",
    *EXPERT_FILES,
)


Identity = str | list[int]  # a small file's hash; size, times of change and inode of a large one, or of weights
HASHED_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """One checkpoint: where it is, and what is written down about it."""

    name: str  # the expert's, or BASE
    model: str  # as the recipe has it
    revision: str | None  # commit of a Hub repository
    folder: Path
    files: Mapping[str, Identity] = field(default_factory=dict, compare=False)  # as they were before anything was read

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds a PEFT adapter, also beside a model; its config alone beside one is a leftover."""
        if not (self.folder / ADAPTER_CONFIG).exists():
            return False
        return (
            self.revision is not None
            or _has_weights(self.folder, ADAPTER_FORMATS)
            or not _has_weights(self.folder, MODEL_FORMATS)
        )

    @property
    def repository(self) -> str:
        """The Hub id without its revision."""
        return self.model.partition("@")[0]

    @property
    def shown(self) -> str:
        """The model for readers elsewhere: a Hub id, or the name of a local folder without where it lies."""
        return self.model if self.revision else self.folder.resolve().name

    def record(self) -> dict[str, str]:
        record = {"name": self.name, "model": self.shown}
        if self.revision:
            record["revision"] = self.revision
        if self.is_adapter:
            record["adapter"] = "LoRA"
        return record


def find_source(name: str, model: str, folder: Path) -> Source:
    """Where a model of the recipe is: a folder (relative to the recipe's), or a Hub repository.

    Of a repository only the small files are fetched yet.
    """
    source = find_place(name, model, folder)
    if source.revision is not None:
        return source
    source = replace(source, files=input_files(source.folder))
    if source.is_adapter and _has_weights(source.folder, MODEL_FORMATS):
        logger.warning("%s: %s holds a model and a PEFT adapter, the adapter is read", name, model)
    return source


def find_place(name: str, model: str, folder: Path) -> Source:
    """The same by the names of files alone, which is quick: `files` is empty."""
    local = Path(model).expanduser()
    local = local if local.is_absolute() else folder / local
    if local.is_dir():
        for file in local.iterdir():
            if not file.is_dir():
                check_ordinary(file)
        source = Source(name, model, None, local)
    elif local.exists():
        raise ValueError(f"{name}: {model} is a file, expected a folder with a checkpoint or a Hub id")
    else:
        repo, _, revision = model.partition("@")
        if not HUB_ID.fullmatch(repo) or repo.startswith("."):
            raise ValueError(f"{name}: there is no folder {model}")
        snapshot = _fetch(name, repo, revision or None, SMALL_FILES)
        source = Source(name, model, snapshot.name, snapshot)
    if not source.is_adapter and not (source.folder / "config.json").exists():
        raise ValueError(f"{name}: {model} has no config.json")
    return source


def with_weights(source: Source) -> Source:
    """The same source with its weight files at hand: safetensors if it has them, else pickled ones.

    The order is Transformers' own: one file before several, safetensors before `.bin`.
    """
    if source.revision is None:
        return source
    for format in ADAPTER_FORMATS if source.is_adapter else MODEL_FORMATS:
        _fetch(source.name, source.repository, source.revision, [format.single])
        if (source.folder / format.single).exists():
            break
        if (source.folder / format.index).exists():
            _fetch(source.name, source.repository, source.revision, weight_files(source.folder, [format]))
            break
    return replace(source, files=input_files(source.folder))


def input_files(folder: Path) -> dict[str, Identity]:
    """The files of a model folder that anything is read from, but its card, each with what tells that it changed."""
    weights = []
    for formats in (MODEL_FORMATS, ADAPTER_FORMATS):
        with contextlib.suppress(ValueError):  # there are none, or not yet
            weights += weight_files(folder, formats)
    small = {file.relative_to(folder).as_posix() for pattern in READ_FILES for file in folder.glob(pattern)}
    names = sorted(name for name in {*weights, *small} if (folder / name).is_file())
    return {name: identity(folder / name, name in weights) for name in names}


def identity(file: Path, has_weights: bool) -> Identity:
    """What tells that a file changed."""
    stat = file.stat()
    if not has_weights and stat.st_size <= HASHED_BYTES:
        return file_hash(file)
    # A copy may keep size and time of modification; nobody can set the time of the inode's change.
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def check_unchanged(sources: Iterable[Source]) -> None:
    """ValueError where a file is not what it was before it was read: two versions of it may have been mixed."""
    for source in sources:
        now = input_files(source.folder)
        changed = sorted(name for name in source.files.keys() | now.keys() if source.files.get(name) != now.get(name))
        if changed:
            raise ValueError(
                f"{source.name}: {source.folder / changed[0]} was changed while it was read: what came of that is "
                "not written; give the command again when nothing changes it"
            )


def _has_weights(folder: Path, formats: Iterable[WeightFormat]) -> bool:
    return any((folder / name).exists() for format in formats for name in (format.single, format.index))


def _fetch(name: str, repo: str, revision: str | None, patterns: Iterable[str]) -> Path:
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        place = repo + (f"@{revision}" if revision else "")
        raise ValueError(
            f"{name}: there is no folder {place} and the Hub did not give it: {one_line(error)}"
        ) from None


def without_folder(place: str) -> str:
    """The name of a local file or folder without where it lies; what is none, a Hub id, as it stands."""
    path = Path(place).expanduser()
    return path.resolve().name if path.exists() else place
