"""Embedding and head of one checkpoint, read by the channels of the merged vocabulary."""

import threading
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from conversion.io.row_reader import RowReader
from conversion.vocabulary.merged_vocabulary import MergedVocabulary, inverse

MEAN_ROWS = 1024  # rows of one step of a mean: fixed, so that it does not depend on any chunk size


class VocabularyReader:
    """A `RowReader` whose embedding and head have the merged vocabulary's channels; the rest is its own.

    Args:
        reader: the checkpoint's reader.
        parameters: names of the parameters whose rows are tokens.
        own_ids: (V,) the checkpoint's own id of each channel, -1 where it has none.
        tokens: (M,) own ids whose mean row is read where there is no own one; None: zeros are.
    """

    def __init__(
        self,
        reader: RowReader,
        parameters: Iterable[str],
        own_ids: torch.LongTensor,
        tokens: torch.LongTensor | None = None,
    ):
        self._reader = reader
        self._own_ids = own_ids
        self._tokens = tokens
        self._means: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()
        self.name = reader.name
        self.tensors = dict(reader.tensors)
        self._parameters = frozenset(parameters) & self.tensors.keys()
        for name in self._parameters:
            own = self.tensors[name]
            shape = (len(own_ids), *own.shape[1:])
            self.tensors[name] = replace(own, shape=shape, num_bytes=own.num_bytes // own.shape[0] * len(own_ids))

    def read(self, name: str) -> torch.Tensor:
        return self.read_rows(name, 0, len(self._own_ids)) if name in self._parameters else self._reader.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of channels `start` to `stop`: (stop - start, I), or (stop - start,) of a vector; stored dtype."""
        if name not in self._parameters:
            return self._reader.read_rows(name, start, stop)
        numbers = self._own_ids[start:stop]
        breaks = numbers.diff() != (numbers[:-1] >= 0).long()  # own ids that follow each other, or none
        edges = [0, *(breaks.nonzero()[:, 0] + 1).tolist(), len(numbers)]
        parts = []
        for first, last in pairwise(edges):
            own, count = int(numbers[first]), last - first
            if own >= 0:
                parts.append(self._reader.read_rows(name, own, own + count))
            else:
                parts.append(self.mean_row(name).expand(count, *self.tensors[name].shape[1:]))
        return torch.cat(parts)

    def mean_row(self, name: str) -> torch.Tensor:
        """Mean of the checkpoint's token rows: (1, I), or (1,) of a vector; stored dtype."""
        with self._lock:
            if name not in self._means:
                self._means[name] = self._mean_row(name)
            return self._means[name]

    def close(self) -> None:
        self._reader.close()

    def _mean_row(self, name: str) -> torch.Tensor:
        if self._tokens is None:
            return torch.zeros(1, *self.tensors[name].shape[1:], dtype=self.tensors[name].dtype)
        total: np.ndarray | float = 0.0
        size = int(self._tokens.max()) + 1
        is_token = torch.zeros(size, dtype=torch.bool)
        is_token[self._tokens] = True
        for start in range(0, size, MEAN_ROWS):
            stop = min(start + MEAN_ROWS, size)
            rows = self._reader.read_rows(name, start, stop)[is_token[start:stop]]
            # NumPy adds row after row, whatever the number of threads.
            total = total + rows.double().numpy().sum(axis=0, keepdims=True)
        return torch.from_numpy(np.asarray(total / len(self._tokens))).to(self.tensors[name].dtype)


def by_channels(
    reader: RowReader,
    paths: Iterable[str],
    vocabulary: MergedVocabulary,
    channels: torch.LongTensor,
    *,
    mean_of: torch.LongTensor | None = None,
) -> RowReader:
    """A checkpoint read by the channels of the merged vocabulary; as it is where all ids are the merged ones.

    Args:
        reader: the checkpoint's reader, by its own ids.
        paths: the embedding and the head.
        vocabulary: the merged one.
        channels: the channel of each of the checkpoint's own ids, -1 where it has none.
        mean_of: own ids whose mean row is read at channels without an own id; None: zeros are.
    """
    if vocabulary.is_identity:
        return reader
    names = [f"{path}.{name}" for path in paths for name in ("weight", "bias")]
    return VocabularyReader(reader, names, inverse(channels, vocabulary.size), mean_of)
