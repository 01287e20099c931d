"""The Trainer's checkpoints in a staged folder, from which a stopped run goes on."""

import logging
from pathlib import Path

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from conversion.io.staged_folder import StagedFolder

logger = logging.getLogger(__name__)


class FinishedCheckpoints(TrainerCallback):
    """Writes into the journal of a staged folder which of the Trainer's checkpoints are whole."""

    def __init__(self, staged: StagedFolder):
        self._staged = staged

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self._staged.journal.record(str(file.relative_to(self._staged.path)), file)


def find_resumed(resume: bool | str | None, folders: tuple[Path, ...]) -> str | None:
    """The Trainer's checkpoint to go on from: the named one, or for True the last one of the first folder with any."""
    if resume is not True:
        return resume or None
    last = next(filter(None, (get_last_checkpoint(folder) for folder in folders if folder.is_dir())), None)
    if last is None:
        raise ValueError(
            f"there is no {PREFIX_CHECKPOINT_DIR}-* of the same training to go on from in {folders[-1]} or beside it: "
            "leave --resume-from-checkpoint out, or name one"
        )
    return last


def log_parameters(model: nn.Module) -> None:
    """Say how many parameters train and how many are frozen."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    logger.info("%d parameters train, %d are frozen", counts[True], counts[False])
