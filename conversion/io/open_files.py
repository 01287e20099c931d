"""Files that several threads read at once, each at its own place; few stay open, however many there are."""

import os
import threading
import weakref
from collections import OrderedDict
from pathlib import Path

# Over all checkpoints of the process, beside those that a thread is reading: it must work with a limit of 64.
KEPT_OPEN = 16


class OpenFile:
    """A file that is read at any place. It is closed when nobody holds this object any more."""

    def __init__(self, file: Path):
        self._stream = file.open("rb", buffering=0)
        self._lock = threading.Lock()
        weakref.finalize(self, self._stream.close)

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill the beginning of `view` with bytes from `offset` on; how many there were, 0 at the file's end."""
        if hasattr(os, "preadv"):
            return os.preadv(self._stream.fileno(), [view], offset)
        with self._lock:
            self._stream.seek(offset)
            return self._stream.readinto(view)


class OpenFiles:
    """The files of one reader, opened when they are first read and again after they were closed for others."""

    _lock = threading.Lock()
    _recent: OrderedDict[OpenFile, None] = OrderedDict()  # of all readers; the one used last is at the end

    def __init__(self):
        self._files = weakref.WeakValueDictionary[Path, OpenFile]()

    def get(self, file: Path) -> OpenFile:
        with self._lock:
            opened = self._files.get(file)
            if opened is None:
                opened = self._files[file] = OpenFile(file)
            self._recent[opened] = None
            self._recent.move_to_end(opened)
            if len(self._recent) > KEPT_OPEN:
                self._recent.popitem(last=False)
        return opened

    def close(self) -> None:
        """What a thread is reading stays open until it has it."""
        with self._lock:
            for opened in self._files.values():
                self._recent.pop(opened, None)
