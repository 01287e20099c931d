"""Threads that work on one item each, and end together at the first error."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
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
