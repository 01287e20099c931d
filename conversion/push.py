"""Uploading a merged checkpoint to the Hub, once it is known to be one.

Every file of the folder goes up, the code that loads it included, in one commit, which also deletes what the folder
does not have: an old model.safetensors beside new shards is what Transformers would load. Only whole checkpoints are
pushed: config, tensor headers and channel indices are checked first, and so are the metadata of the model card.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from conversion.checkpoints.checkpoint_place import read_plain_config
from conversion.io.model_files import CARD_FILE
from conversion.io.wording import one_line

logger = logging.getLogger(__name__)

LASTING = (401, 403, 413)  # answers that the same command would get again
MAX_REFUSAL = 1000  # characters: the Hub's advice stands at the end
GIT_ATTRIBUTES = ".gitattributes"  # the Hub's own: which files are large
# Also what the Trainer keeps beside a model: its state for going on, with pickles and local paths, and its logs.
IGNORED_FILES = ["*.py[co]", "**/__pycache__/**", ".*", "**/.*", "checkpoint-*/**", "runs/**", "training_args.bin"]


@dataclass(frozen=True)
class Pushed:
    """Where a checkpoint went: the repository's address, and the commit to load it by."""

    url: str
    revision: str


def push_checkpoint(
    checkpoint: str | Path, repo_id: str, *, private: bool | None = None, message: str | None = None
) -> Pushed:
    """Create the repository if it is not there, and make the folder `checkpoint` its content; commits before stay.

    Args:
        private: of a new repository; None is the default of its owner. An old one stays as it is.
        message: of the commit.

    Raises:
        ValueError: the folder is no whole checkpoint, the name is no repository's, or the Hub refused.
    """
    folder = Path(checkpoint)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository: {one_line(error)}") from None
    check_checkpoint(folder)
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        # Not upload_folder: it may make several commits, and between them the repository would mix two checkpoints.
        there = api.model_info(url.repo_id)
        commit = api.create_commit(
            url.repo_id,
            commit_operations(folder, [file.rfilename for file in there.siblings or ()]),
            commit_message=message or "Upload a channel-merged model",
            parent_commit=there.sha,  # refused where somebody else has pushed since
        )
    except HfHubHTTPError as error:
        raise ValueError(f"the Hub refused {repo_id}: {one_line(error, MAX_REFUSAL)}") from None
    except RuntimeError as error:  # as which huggingface_hub raises whatever ends the upload of a file
        if isinstance(error.__cause__, HfHubHTTPError) and error.__cause__.response.status_code in LASTING:
            raise ValueError(f"the Hub refused {repo_id}: {one_line(error.__cause__, MAX_REFUSAL)}") from None
        reason = one_line(error.__cause__ or error, MAX_REFUSAL)
        raise ValueError(
            f"{repo_id} got no commit, for a file could not be sent: the same command sends what is missing ({reason})"
        ) from None
    except KeyboardInterrupt:
        logger.warning("the same command goes on with what %s does not have yet", repo_id)
        raise
    return Pushed(str(url), commit.oid)


def commit_operations(folder: Path, there: Iterable[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What makes a repository that has the files `there` hold what a folder holds."""
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    files = list(filter_repo_objects(files, ignore_patterns=IGNORED_FILES))
    gone = sorted({*there} - {*files, GIT_ATTRIBUTES})
    if gone:
        logger.info("what the checkpoint does not have is deleted from the repository: %s", ", ".join(gone))
    return [
        *(CommitOperationDelete(name) for name in gone),
        *(CommitOperationAdd(name, folder / name) for name in files),
    ]


def check_checkpoint(folder: Path) -> None:
    """ValueError where a folder is no whole channel-merged checkpoint, or lacks its code or its model card."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    read_plain_config(folder)
    # What is slow to load comes after the first errors.
    from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
    from modeling_channel_merged.configuration_channel_merged import AUTO_MAP

    with MergedCheckpoint(folder) as merged:
        merged.check_channel_indices()
    for file in sorted({f"{name.partition('.')[0]}.py" for name in AUTO_MAP.values()}):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}: without its code the model would not load from the Hub")
    card = folder / CARD_FILE
    if not card.is_file():
        raise ValueError(f"{folder} has no {CARD_FILE}: the Hub shows it, and finds the model by its metadata")
    try:
        ModelCard.load(card, ignore_metadata_errors=False)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata of {card} cannot be read: {one_line(error)}") from None
