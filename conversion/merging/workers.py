"""Threads that work on one item each, and end together at the first error."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import torch


class Stopped(Exception):
    """Another thread failed, and what this one does is not needed any more."""


@dataclass(frozen=True)
class Workers:
    """Threads that work on one item each; their own tensor operations are not split further.

    Args:
        threads: how many.
        stop: called at the first error, so that the other threads end early too.
    """

    threads: int
    stop: Callable[[], None]

    def for_each(self, function: Callable, items: Iterable) -> list:
        """`function` of every item, in the items' order. The first error stops the rest."""
        items = list(items)
        before = torch.get_num_threads()
        with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.stop()
                pool.shutdown(cancel_futures=True)
                raise
            finally:
                torch.set_num_threads(before)
        return [future.result() for future in futures]


class InTurn:
    """Lets threads work on shared things one after the other, in the order of their items' numbers."""

    def __init__(self):
        self._next: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._stopped = False

    @contextmanager
    def turn(self, what: str, number: int) -> Iterator[None]:
        """Wait until items 0 to `number` - 1 are done with `what`; items are started in their order.

        Raises:
            Stopped: another thread failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._next[what] == number)
            if self._stopped:
                raise Stopped
        yield
        with self._changed:
            self._next[what] += 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
