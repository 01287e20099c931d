"""A folder that appears under its name only when it is complete, whatever stops the run that makes it.

Hidden folders of a target, beside it or in it, tell what a killed run had come to:

    .<name>.partial-*    being written, or what a stopped run had finished
    .<name>.replaced-*   the old model, out of the way of the new one
    .<name>.complete-*   written, about to be moved into the target, which shows the old model or nothing
    .<name>.moving-*     on its way into the target, which shows nothing but the new model
    .<name>.unrefined    in it the merged model that the target's is made from, see `working_folder`

A target that may be renamed, as most, only ever has the first two, beside it. One that is a folder of its own kind, a
mount point or an empty folder that somebody made, stays that folder: its files move in, config.json last.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from conversion.io.journal import JOURNAL_FOLDER, Journal, differences, read_fingerprint
from conversion.io.wording import first_names

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
FILE_LIST = ".channel-merge.json"  # in a published folder: what was written there, and may be replaced
NOBODYS_FILES = {".DS_Store", "Thumbs.db", "__pycache__", "lost+found"}  # systems make them
LOCK_SECONDS = 0.2
FULL_BYTES = 1 << 16  # a disk with less is full
NO_SPACE = {errno.ENOSPC, errno.EFBIG} | ({errno.EDQUOT} if hasattr(errno, "EDQUOT") else set())
NOT_RENAMED = {errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM}  # what renaming a mount point fails with


class StagedFolder:
    """A folder that appears under its name only when it is complete.

    Files are written into a hidden folder, which `publish` gives its name. A lock keeps every other run away from the
    target until that is done. Leaving the `with` block without `publish` removes what was written, and so does the
    next run where this one was killed.

    With a fingerprint there is a journal of what is finished. Finished parts stay, whatever ended the run, until the
    next run of the same fingerprint has worked on from there, or another one has succeeded.

    Args:
        target: the folder to make; it must be absent or empty, or a folder that was made here if `overwrite`.
        overwrite: replace that, once the new one is complete.
        fingerprint: all that the result depends on, as JSON holds it.
        resume: go on from what a stopped run of the same fingerprint left.
        how_to_resume: what the user is told where finished parts stay.
    """

    def __init__(
        self,
        target: Path,
        overwrite: bool = False,
        fingerprint: Mapping[str, Any] | None = None,
        resume: bool = True,
        how_to_resume: str = "the same command goes on from there",
    ):
        self.overwrite = overwrite
        self.check(target)
        self.target = target.resolve()
        self.path = _hidden(self.target, self.target.parent, "partial")
        self.journal: Journal | None = None
        self._fingerprint = fingerprint
        self._resume = resume
        self._how_to_resume = how_to_resume
        self._others: list[Path] = []  # finished parts of other runs
        self._complete = False
        self._locks = contextlib.ExitStack()

    def __enter__(self) -> "StagedFolder":
        self.target.parent.mkdir(parents=True, exist_ok=True)
        inside = _is_a_folder_of_its_own(self.target)
        home = self.target if inside else self.target.parent
        with contextlib.ExitStack() as stack:
            if inside and os.access(self.target.parent, os.W_OK):
                stack.enter_context(_lock(self.target, self.target.parent))
            stack.enter_context(_lock(self.target, home))
            self._finish_publishing()
            self.check(self.target)
            self.path = _hidden(self.target, home, "partial")
            self._look_at_leftovers()
            self.path.mkdir(exist_ok=True)
            if self._fingerprint is not None:
                self.journal = Journal(self.path, self._fingerprint)
                self.journal.remove_unfinished()
            self._locks = stack.pop_all()
        return self

    def __exit__(self, kind, exception, traceback) -> None:
        full = _full_disk(exception, self.path.parent)
        with self._locks:
            if self._complete:
                if exception is not None and self.path.exists():
                    logger.warning("the new model is complete in %s: the next run puts it in its place", self.path)
            elif self.journal is not None and len(self.journal):
                with contextlib.suppress(OSError):
                    self.journal.remove_unfinished()
                logger.warning("what was finished is kept in %s: %s", self.path, self._how_to_resume)
            else:
                shutil.rmtree(self.path, ignore_errors=True)
        if full:
            reason = f"there is no room for the output ({os.strerror(full)})"
            raise OSError(full, reason, str(self.target)) from exception

    def publish(self, config: str | None = None) -> None:
        """Flush every file and give the folder its name. Nothing old is removed before that has succeeded.

        Args:
            config: text of config.json, without which nothing loads: written last. None: it is there already.
        """
        self.check(self.target)
        if config is not None:
            (self.path / CONFIG_FILE).write_text(config, encoding="utf-8")
        files = [file for file in _files(self.path) if file.parts[0] != JOURNAL_FOLDER]
        written: dict[str, Any] = {"files": sorted({*(file.as_posix() for file in files), FILE_LIST})}
        if self._fingerprint is not None:
            written["fingerprint"] = _hash(self._fingerprint)
        (self.path / FILE_LIST).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        for file in (*files, Path(FILE_LIST)):
            _sync(self.path / file)
        if _is_a_folder_of_its_own(self.target):
            self._move_in()
        else:
            self._rename()
        self._remove_others()

    def check(self, target: Path) -> None:
        """ValueError where what is at the target must stay."""
        check_target(target, self.overwrite)

    def _remove_others(self) -> None:
        """Remove what other runs had finished for this target."""
        for path in self._others:
            logger.info("%s is there: removing what another run had finished, %s", self.target, path)
            shutil.rmtree(path, ignore_errors=True)

    def _rename(self) -> None:
        """Exchange the target, if there is one, for the staged folder."""
        replaced = None
        try:
            if self.target.exists():
                replaced = _hidden(self.target, self.target.parent, "replaced")
                os.rename(self.target, replaced)
            os.rename(self.path, self.target)
        except OSError as error:
            if replaced is not None and replaced.exists():
                os.rename(replaced, self.target)
            if error.errno not in NOT_RENAMED or not self.target.is_dir():
                raise
            with _lock(self.target, self.target):
                self._move_in()
            return
        self._complete = True
        _sync(self.target.parent)
        shutil.rmtree(self.target / JOURNAL_FOLDER, ignore_errors=True)
        if replaced is not None:
            _remove_model(replaced)

    def _move_in(self) -> None:
        """Exchange the target's files for those of the staged folder."""
        if self.path.parent != self.target:
            inside = _hidden(self.target, self.target, "partial")
            shutil.move(self.path, inside)
            self.path = inside
        complete = _hidden(self.target, self.target, "complete")
        os.rename(self.path, complete)
        self.path, self._complete = complete, True
        _move_in(self.target, complete)

    def _finish_publishing(self) -> None:
        """End what a killed run had begun when its model was complete."""
        for purpose in ("complete", "moving"):
            for path in _leftovers(self.target, purpose):
                logger.info("a run was stopped while it put a complete model into %s: finishing that", self.target)
                _move_in(self.target, path)
        for path in _leftovers(self.target, "replaced"):
            if (self.target / CONFIG_FILE).is_file():
                _remove_model(path)
            elif not self.target.exists():  # killed between two renames: the old folder is still the best there is
                os.rename(path, self.target)
            else:
                logger.warning("%s holds the model that was in %s, which holds something else now", path, self.target)

    def _look_at_leftovers(self) -> None:
        """Take over what a stopped run of the same fingerprint finished; keep what others did, remove the rest."""
        for path in _leftovers(self.target, "partial"):
            before = read_fingerprint(path)
            if before is None:
                shutil.rmtree(path)
            elif self._resume and before == self._fingerprint and not self.path.exists():
                self.path = path
            else:
                self._others.append(path)
                differing = [] if self._fingerprint is None else list(differences(before, self._fingerprint))
                logger.warning(
                    "an earlier run%s left finished work (%.2f GB) in %s: it is not used, and goes when this one has "
                    "succeeded",
                    f" that differs in {', '.join(filter(None, differing[:5])) or 'everything'}" if differing else "",
                    _disk_bytes(path) / 1e9,
                    path,
                )


class StagedFile(StagedFolder):
    """A file that appears under its name only when it is complete, made in a hidden folder beside it.

    Args:
        target: the file to make; it must be absent, or one that was made here if `overwrite`.
        is_ours: whether a file was made here; only such a file is replaced.
        others: as `StagedFolder` takes them.
    """

    def __init__(self, target: Path, is_ours: Callable[[Path], bool], overwrite: bool = False, **others: Any):
        self._is_ours = is_ours
        super().__init__(target, overwrite, **others)

    def check(self, target: Path) -> None:
        check_target_file(target, self._is_ours, self.overwrite)

    def publish(self, file: Path) -> None:
        """Flush the finished file, which lies in `path`, and give it its name."""
        self.check(self.target)
        _sync(file)
        os.replace(file, self.target)
        self._complete = True
        _sync(self.target.parent)
        shutil.rmtree(self.path, ignore_errors=True)
        self._remove_others()


def check_target_file(target: Path, is_ours: Callable[[Path], bool], overwrite: bool = False) -> None:
    """ValueError unless a file may be written to `target`: absent, or made here and to be replaced."""
    if target.is_dir():
        raise ValueError(f"the output {target} is a folder, expected the name of a file")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ValueError(f"the output {target} is there already: choose another name, or replace it with --overwrite")
    if not is_ours(target):
        raise ValueError(f"the output {target} is something else than this command writes, it is not overwritten")


def check_target(target: Path, overwrite: bool = False) -> None:
    """ValueError unless a checkpoint may be written to `target`: absent, empty, or made here and to be replaced."""
    try:
        target.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"the output {target} is a symbolic link to itself, expected a folder") from None
        return
    if not target.is_dir():
        raise ValueError(f"the output {target} is a file, expected a folder")
    if _is_empty(target) or _leftovers(target.resolve(), "complete", "moving"):
        return
    if not overwrite:
        raise ValueError(
            f"the output folder {target} is not empty: choose another, or replace a model with --overwrite"
        )
    if not (target / CONFIG_FILE).is_file():
        raise ValueError(f"the output folder {target} is not a model folder (no {CONFIG_FILE}), it is not overwritten")
    try:
        written = set(json.loads((target / FILE_LIST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"the output folder {target} does not say what was written there (no {FILE_LIST}), it is not overwritten: "
            "choose another, or remove it yourself"
        ) from None
    hidden = (f"{JOURNAL_FOLDER}/", f".{target.resolve().name}.")
    files = sorted(file.as_posix() for file in _files(target))
    others = [file for file in files if file not in written and not file.startswith(hidden)]
    if others:
        raise ValueError(
            f"the output folder {target} holds {first_names(others, 1)}, which no run has written there: it is not "
            "overwritten; choose another, or move that away"
        )


def is_result(target: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Whether a run of this fingerprint has written all that is at the target."""
    try:
        written = json.loads((target / FILE_LIST).read_text(encoding="utf-8"))
        files = [target / file for file in written["files"]]
        return written["fingerprint"] == _hash(fingerprint) and all(file.is_file() for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def working_folder(target: Path, name: str) -> Path:
    """The hidden folder of a target for what is made on the way to it."""
    target = Path(os.path.realpath(target))  # which takes a link to itself as it is
    return (target if _is_a_folder_of_its_own(target) else target.parent) / f".{target.name}.{name}"


def check_not_a_source(target: Path, folders: Mapping[str, Path]) -> None:
    """ValueError where a target is one of the folders that are read, named by what they are, or a folder around it.

    What is in a hidden folder of the target stays as it is, and so may be read.
    """
    target = target.resolve()
    for what, folder in folders.items():
        hidden = f".{target.name}."
        path = folder.resolve()
        if path.is_relative_to(target) and not "".join(path.relative_to(target).parts[:1]).startswith(hidden):
            raise ValueError(f"the output folder {target} holds {what}: choose another")


def leftover_bytes(target: Path, fingerprint: Mapping[str, Any] | None = None) -> int:
    """Disk space that stopped runs hold for `target`; with a fingerprint, what a run of it would use or remove."""
    paths = _leftovers(target.resolve(), "partial")
    return sum(
        _disk_bytes(path) for path in paths if fingerprint is None or read_fingerprint(path) in (None, fingerprint)
    )


def _move_in(target: Path, folder: Path) -> None:
    """Exchange what a folder shows for the files of the `complete` or `moving` folder in it, config.json last."""
    token = folder.name.rpartition("-")[2]
    replaced = _hidden(target, target, "replaced", token)
    if folder.name.startswith(_prefix(target, "complete")):
        replaced.mkdir(exist_ok=True)
        old = [path for path in target.iterdir() if not _is_hidden_or_nobodys(path, target)]
        for path in sorted(old, key=lambda path: path.name != CONFIG_FILE):
            os.rename(path, replaced / path.name)
        moving = _hidden(target, target, "moving", token)
        os.rename(folder, moving)
        folder = moving
    new = [path for path in folder.iterdir() if path.name != JOURNAL_FOLDER]
    for path in sorted(new, key=lambda path: path.name == CONFIG_FILE):
        os.replace(path, target / path.name)
    _sync(target)
    shutil.rmtree(folder, ignore_errors=True)
    _remove_model(replaced)


def _remove_model(folder: Path) -> None:
    """Remove an old model, first what makes it load: stopped halfway, it is none."""
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _lock(target: Path, folder: Path):
    """Hold the lock of a target that lies in `folder`; that of a killed process is gone."""
    with tempfile.TemporaryFile(dir=folder):  # says why where nothing can be written; the lock would only wait
        pass
    file = folder / f".{target.name}.lock"
    lock = FileLock(file, timeout=LOCK_SECONDS)
    try:
        lock.acquire(poll_interval=LOCK_SECONDS / 4)
    except Timeout:
        raise ValueError(f"another run is writing to {target} now (it holds {file})") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # an open file stays on Windows
            file.unlink()
        lock.release()


def _is_a_folder_of_its_own(target: Path) -> bool:
    """Whether a target cannot, or should not, be exchanged for another folder."""
    if not target.is_dir():
        return False
    return os.path.ismount(target) or _is_empty(target) or not os.access(target.parent, os.W_OK)


def _is_empty(target: Path) -> bool:
    return all(_is_hidden_or_nobodys(path, target.resolve()) for path in target.iterdir())


def _is_hidden_or_nobodys(path: Path, target: Path) -> bool:
    return path.name.startswith(f".{target.name}.") or path.name in NOBODYS_FILES


def _leftovers(target: Path, *purposes: str) -> list[Path]:
    """Hidden folders of a target, beside it and in it."""
    prefixes = tuple(_prefix(target, purpose) for purpose in purposes)
    folders = [folder for folder in (target, target.parent) if folder.is_dir()]
    paths = sorted(path for folder in folders for path in folder.iterdir())
    return [path for path in paths if path.name.startswith(prefixes) and path.is_dir()]


def _hidden(target: Path, folder: Path, purpose: str, token: str | None = None) -> Path:
    return folder / f"{_prefix(target, purpose)}{token or secrets.token_hex(4)}"


def _prefix(target: Path, purpose: str) -> str:
    return f".{target.name}.{purpose}-"


def _hash(fingerprint: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    """Everything in a folder but folders, relative to it, and but what systems put there."""
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if not NOBODYS_FILES & set(relative.parts) and (path.is_symlink() or not path.is_dir()):
            yield relative


def _disk_bytes(folder: Path) -> int:
    size = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another run may be at work there
            stat = file.stat()
            # On disk a file that was prepared but not yet written is smaller than its size says.
            size += min(stat.st_size, getattr(stat, "st_blocks", stat.st_size) * 512) if file.is_file() else 0
    return size


def _full_disk(error: BaseException | None, folder: Path) -> int | None:
    """The error number where an error, or one that led to it, says that there is no room."""
    if isinstance(error, RuntimeError) and folder.is_dir() and shutil.disk_usage(folder).free < FULL_BYTES:
        return errno.ENOSPC  # torch.save does not say it
    while isinstance(error, Exception):
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return error.errno
        for number in NO_SPACE:  # safetensors' own error
            if os.strerror(number) in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_disk_space(out: Path, max_bytes: int, fingerprint: Mapping[str, Any]) -> None:
    """ValueError where the output of a run of this fingerprint might not fit."""
    free = free_bytes(out, fingerprint)
    if max_bytes > free:
        raise ValueError(
            f"{out} needs up to {max_bytes / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free there: free some space"
        )


def free_bytes(out: Path, fingerprint: Mapping[str, Any] | None = None) -> int:
    """Room for the output where it would go; what stopped runs left there counts as `leftover_bytes` says."""
    folder = out.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free + leftover_bytes(out, fingerprint)
