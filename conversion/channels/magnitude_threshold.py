"""The trim threshold of TIES: the k-th largest magnitude of a tensor that is only ever seen in chunks."""

import torch

# Magnitudes are ordered like the bit patterns of their floats: 8 bits of exponent, 23 of mantissa. The coarse
# histogram counts their upper 15 bits, the fine one the lower 16 of those in a window of coarse bins.
FINE_BITS = 16
COARSE_BINS = 1 << 15
FIRST_NON_FINITE_BIN = 0x7F80

# Magnitudes that are kept as they are before a window must be chosen, and the window's coarse bins to either side of
# the likely one (each is at most 1/128 of its value wide): 4 MB and 9 MB.
MAX_HELD = 1 << 20
WINDOW_REACH = 8


class MagnitudeThreshold:
    """The k-th largest magnitude of a tensor that comes in chunks, k = max(1, int(density * numel)): exact, unsorted.

    One read is enough for up to `MAX_HELD` elements, and nearly always beyond: once that many have come, the
    threshold's likely place is known, and from then on a histogram of every single bit pattern is kept around it
    beside a coarse one of all elements. Should the threshold end up outside that window, the coarse histogram tells
    the bin that it is in, and a second read of the same data counts the patterns of that bin. Memory is bounded
    (`threshold_bytes`) whatever the size of the tensor; the order and size of the chunks do not matter for the value.

        threshold = MagnitudeThreshold(numel, density)
        while not threshold.complete:
            for chunk in chunks():
                threshold.update(chunk)
        threshold.value
    """

    def __init__(self, numel: int, density: float):
        if numel < 1:
            raise ValueError(f"numel is {numel}, expected at least 1")
        if not 0 < density <= 1:
            raise ValueError(f"density is {density}, expected more than 0 and at most 1")
        self.numel = numel
        self.rank = max(1, int(density * numel))
        self._value: float | None = 0.0 if self.rank == numel else None
        self._seen = 0  # elements of the current read
        self._second_read = False
        self._coarse: torch.Tensor | None = None  # (COARSE_BINS,) int64
        self._held: list[torch.Tensor] = []  # int32 patterns, until there is a window
        self._window: tuple[int, int] | None = None  # coarse bins, first and one past the last
        self._fine: torch.Tensor | None = None  # (bins of the window << FINE_BITS,) int64

    @property
    def complete(self) -> bool:
        """Whether the value is known. False after all data were read: read and update with them once more."""
        return self._value is not None

    @property
    def value(self) -> float:
        """The least magnitude that is kept; 0.0 where everything is."""
        if self._value is None:
            raise ValueError(f"{self._seen} of {self.numel} elements were read, the threshold is not known yet")
        return self._value

    def update(self, deltas: torch.Tensor) -> None:
        """Take the next chunk, float32 of any shape. Does nothing once the value is known."""
        if self.complete:
            return
        if deltas.dtype != torch.float32:
            raise ValueError(f"deltas are {deltas.dtype}, expected torch.float32")
        if self._seen + deltas.numel() > self.numel:
            raise ValueError(f"{self._seen + deltas.numel()} elements were read, expected {self.numel}")
        for block in deltas.reshape(-1).view(torch.int32).split(MAX_HELD):
            self._count(block & 0x7FFFFFFF)
        if self._seen == self.numel:
            self._finish_read()

    def _count(self, patterns: torch.Tensor) -> None:
        """Count one block of magnitude patterns (n,) int32."""
        self._seen += patterns.numel()
        if not self._second_read:
            coarse = torch.bincount(patterns >> FINE_BITS, minlength=COARSE_BINS)
            self._coarse = coarse if self._coarse is None else self._coarse.add_(coarse)
        if self._window is not None:
            self._count_window(patterns)
            return
        self._held.append(patterns)
        if MAX_HELD < self._seen < self.numel:
            self._open_window(WINDOW_REACH)

    def _bin_of_rank(self, rank: int) -> tuple[int, int]:
        """Coarse bin of the element of this rank among those counted, and its rank within the bin."""
        coarse_bin = _bin_of_rank(self._coarse, rank)
        return coarse_bin, rank - int(self._coarse[coarse_bin + 1 :].sum())

    def _open_window(self, reach: int) -> None:
        """Count the held patterns around the threshold in full and let go of them.

        The threshold is where it would be were the data to come like those that were seen.
        """
        likely, _ = self._bin_of_rank(max(1, self.rank * self._seen // self.numel))
        self._set_window(max(0, likely - reach), min(COARSE_BINS, likely + reach + 1))
        for patterns in self._held:
            self._count_window(patterns)
        self._held = []

    def _set_window(self, first: int, last: int) -> None:
        self._window = first, last
        self._fine = torch.zeros((last - first) << FINE_BITS, dtype=torch.int64, device=self._coarse.device)

    def _count_window(self, patterns: torch.Tensor) -> None:
        first, last = self._window
        reach = (last - first) << FINE_BITS >> 1
        offsets = patterns - ((first + last) << FINE_BITS >> 1)  # from the middle: -reach up to reach - 1 are inside
        inside = ((offsets ^ (offsets >> 31)) < reach).nonzero()[:, 0]
        places = offsets[inside].long().add_(reach)
        self._fine.scatter_add_(0, places, places.new_ones(1).expand_as(places))

    def _finish_read(self) -> None:
        """All data were read: take the value from the window, or start the second read with the right window."""
        if int(self._coarse[FIRST_NON_FINITE_BIN:].sum()):
            raise ValueError("a delta is not finite: there is no trim threshold for NaN or infinity")
        if self._window is None:
            self._open_window(0)
        coarse_bin, rank = self._bin_of_rank(self.rank)
        first, last = self._window
        if first <= coarse_bin < last:
            fine = self._fine[(coarse_bin - first) << FINE_BITS :][: 1 << FINE_BITS]
            pattern = (coarse_bin << FINE_BITS) + _bin_of_rank(fine, rank)
            self._value = torch.tensor(pattern, dtype=torch.int32).view(torch.float32).item()
            self._coarse = self._fine = None
        else:
            self._seen, self._second_read = 0, True
            self._set_window(coarse_bin, coarse_bin + 1)


def threshold_bytes(numel: int) -> int:
    """The most that a `MagnitudeThreshold` of a tensor of this size holds."""
    if numel <= MAX_HELD:
        return 4 * numel + 8 * ((1 << FINE_BITS) + COARSE_BINS)
    return 4 * 2 * MAX_HELD + 8 * (((2 * WINDOW_REACH + 1) << FINE_BITS) + COARSE_BINS)


def _bin_of_rank(counts: torch.Tensor, rank: int) -> int:
    """Highest bin at or above which there are at least `rank` elements."""
    at_least = counts.flip(0).cumsum(0)
    return len(counts) - 1 - int((at_least < rank).sum())
