"""The rows of one group to one row: linear, task_arithmetic, ties, dare_linear and dare_ties as mergekit defines them.

    linear           sum_m w_m row_m; the base plays no part
    task_arithmetic  base + lambda * sum_m w_m delta_m
    ties             the same on deltas trimmed to the largest `density` of their tensor, and only over the members
                     whose sign is that of the weighted sum
    dare_linear      task_arithmetic on a random `density` of each delta, rescaled by 1 / density
    dare_ties        ties on these instead of trimmed deltas

With `normalize` a sum is divided by the sum of the w_m that take part in it.

Arithmetic is float32 in mergekit's order of operations, so that one group of up to four experts gives mergekit's bits;
beyond four, torch.sum (which it uses) adds in an order that depends on the place in the tensor, and this does not.
The trim threshold and the random mask are exact for a whole tensor that is only ever seen in chunks.

Shapes: M members of the group, C channels, I inputs.
"""

import hashlib
import json
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

MERGE_METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
ELECTING_METHODS = ("ties", "dare_ties")
MASKED_METHODS = ("dare_linear", "dare_ties")
SPARSE_METHODS = ("ties", "dare_linear", "dare_ties")

# Elements of one working block: some ten of them fit the cache, and a call costs little against them.
BLOCK_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class MergeMethod:
    """A merge method with its parameters, under mergekit's names (`lambda_` is its `lambda`)."""

    name: str
    density: float = 1.0
    lambda_: float = 1.0
    normalize: bool = True

    def __post_init__(self):
        if self.name not in MERGE_METHODS:
            raise ValueError(f"merge method is {self.name!r}, expected one of {', '.join(MERGE_METHODS)}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}, expected more than 0 and at most 1")
        if not math.isfinite(self.lambda_):
            raise ValueError(f"lambda is {self.lambda_}, expected a finite number")
        if self.density != 1 and self.name not in SPARSE_METHODS:
            raise ValueError(f"density is {self.density}, but {self.name} keeps all of a delta")
        if self.lambda_ != 1 and self.name == "linear":
            raise ValueError(f"lambda is {self.lambda_}, but linear merges rows and not deltas")

    @property
    def needs_threshold(self) -> bool:
        """Whether `merge_rows` takes the trim thresholds of the members' tensors."""
        return self.name == "ties" and self.density < 1

    @property
    def needs_mask(self) -> bool:
        """Whether `merge_rows` takes the members' random masks."""
        return self.name in MASKED_METHODS and self.density < 1


def row_deltas(base: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Expert rows minus base rows in float32, as everything here takes them; the shapes broadcast."""
    return rows.float() - base.float()


def merge_rows(
    base: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    method: MergeMethod,
    *,
    thresholds: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Merge one group: M members, C channels at once. What the group's members are is the caller's choice.

    Args:
        base: (C, I), any float dtype up to float32.
        rows: (M, C, I).
        weights: (M,).
        method: the method; `thresholds` or `keep` must be given where it needs them.
        thresholds: (M,) float32, the least magnitude that each member's trim keeps, from `MagnitudeThreshold`.
        keep: (M, C, I) bool, from `keep_mask`.

    Returns:
        (C, I) float32.
    """
    if rows.shape[1:] != base.shape or weights.shape != rows.shape[:1]:
        raise ValueError(
            f"base {tuple(base.shape)}, rows {tuple(rows.shape)} and weights {tuple(weights.shape)} do not fit, "
            "expected (C, I), (M, C, I) and (M,)"
        )
    if method.needs_threshold and (thresholds is None or thresholds.shape != weights.shape):
        raise ValueError(f"{method.name} at density {method.density} needs one threshold for each of {len(rows)} rows")
    if method.needs_mask and (keep is None or keep.shape != rows.shape):
        raise ValueError(f"{method.name} at density {method.density} needs a keep mask of shape {tuple(rows.shape)}")
    weights = weights.float()
    if method.name == "linear" and method.normalize and weights.sum() == 0:
        raise ValueError(f"the weights {weights.tolist()} of a normalized linear merge sum to 0")
    least = _largest_dropped(thresholds) if method.needs_threshold else [None] * len(rows)
    merged = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    step = max(1, BLOCK_ELEMENTS // max(1, base.shape[1]))
    for start in range(0, base.shape[0], step):
        block = slice(start, start + step)
        if method.name == "linear":
            merged[block] = _weighted_mean(rows[:, block], weights, method.normalize)
            continue
        deltas = _sparse_deltas(
            base[block], rows[:, block], method, least, keep[:, block] if method.needs_mask else None
        )
        merged[block] = _add_deltas(base[block], deltas, weights, method)
    return merged


def _largest_dropped(thresholds: torch.Tensor) -> list[float | None]:
    """The float just below each threshold: a magnitude is kept when it is above. None: all are."""
    below = torch.nextafter(thresholds.float(), torch.zeros_like(thresholds, dtype=torch.float32))
    return [
        below_ if threshold > 0 else None
        for below_, threshold in zip(below.tolist(), thresholds.tolist(), strict=True)
    ]


def _weighted_mean(rows: torch.Tensor, weights: torch.Tensor, normalize: bool) -> torch.Tensor:
    merged = torch.zeros(rows.shape[1:], dtype=torch.float32, device=rows.device)
    for row, weight in zip(rows, weights, strict=True):
        merged.addcmul_(row.float(), weight)
    return merged.div_(weights.sum()) if normalize else merged


def _sparse_deltas(
    base: torch.Tensor,
    rows: torch.Tensor,
    method: MergeMethod,
    least: list[float | None],
    keep: torch.Tensor | None,
) -> list[torch.Tensor]:
    """What the method keeps of each member's delta: M tensors (c, I)."""
    base = base.float()
    deltas = []
    for member, row in enumerate(rows):
        delta = row.float() - base
        if least[member] is not None:
            delta = F.hardshrink(delta, least[member])
        if keep is not None:
            delta.mul_(keep[member].to(delta.dtype)).mul_(1 / method.density)
        deltas.append(delta)
    return deltas


def _add_deltas(
    base: torch.Tensor, deltas: list[torch.Tensor], weights: torch.Tensor, method: MergeMethod
) -> torch.Tensor:
    """Base plus lambda times the sum or mean of the deltas. Overwrites `deltas`."""
    for delta, weight in zip(deltas, weights, strict=True):
        delta.mul_(weight)
    if method.name in ELECTING_METHODS:
        mixed, divisor = _elect(deltas, weights, method.normalize)
    else:
        mixed, divisor = _sum_in_order(deltas), weights.sum()
        divisor = torch.where(divisor.abs() < 1e-8, 1, divisor)
    if method.normalize:
        mixed.div_(divisor)
    if method.lambda_ != 1:
        mixed.mul_(method.lambda_)
    return mixed.add_(base.float())


def _sum_in_order(deltas: list[torch.Tensor]) -> torch.Tensor:
    mixed = deltas[0].clone()
    for delta in deltas[1:]:
        mixed.add_(delta)
    return mixed


def _elect(deltas: list[torch.Tensor], weights: torch.Tensor, count: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum of the weighted deltas whose sign is that of the whole sum (plus where it is 0). Overwrites `deltas`.

    Returns:
        The sum, and with `count` the weight of the deltas in it, 1 where that is 0.
    """
    total = _sum_in_order(deltas)
    sign = torch.lt(total, 0, out=torch.empty_like(total)).mul_(-2).add_(1)
    mixed = torch.zeros_like(total)
    divisor = torch.zeros_like(total) if count else None
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = delta.mul_(sign).clamp_(min=0)
        mixed.add_(agreeing)
        if divisor is not None:
            divisor.add_(agreeing.sign_().mul_(weight))
    if divisor is not None:
        divisor.add_(torch.eq(divisor, 0, out=torch.empty_like(divisor)))
    return mixed.mul_(sign), divisor


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


def keep_mask(
    seed: int,
    expert: str,
    tensor_name: str,
    start: int,
    count: int,
    density: float,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Which elements of a tensor a random drop keeps: elements `start` to `start + count` of it, flattened.

    Element i is kept where a 32-bit hash of (seed, expert, tensor, i) is below density * 2^32: every element by
    itself, so that chunks, order and device do not matter. All arithmetic is on integers.

    Returns:
        (count,) bool.
    """
    if start < 0 or count < 0:
        raise ValueError(f"elements {start} to {start + count} are not a range of a tensor")
    if not 0 <= density <= 1:
        raise ValueError(f"density is {density}, expected 0 to 1")
    kept = torch.empty(count, dtype=torch.bool, device=device)
    if density == 1:
        return kept.fill_(True)
    limit = int(density * 2**32) - 2**31  # the hash is compared as a signed number, 2^31 lower
    ramp = torch.arange(min(count, BLOCK_ELEMENTS), dtype=torch.int32, device=device)
    hashed, shifted = torch.empty_like(ramp), torch.empty_like(ramp)
    done = 0
    while done < count:
        page, offset = divmod(start + done, 2**32)  # 32-bit counters within a page of 2^32 elements
        size = min(count - done, BLOCK_ELEMENTS, 2**32 - offset)
        keys = _mask_keys(seed, expert, tensor_name, page)
        _hash_counters(ramp[:size], offset, keys, hashed[:size], shifted[:size])
        torch.lt(hashed[:size], limit, out=kept[done : done + size])
        done += size
    return kept


def _mask_keys(seed: int, expert: str, tensor_name: str, page: int) -> tuple[int, int]:
    """Two 32-bit keys for one page of one expert's tensor."""
    text = json.dumps([seed, expert, tensor_name, page])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _hash_counters(
    ramp: torch.Tensor, offset: int, keys: tuple[int, int], out: torch.Tensor, scratch: torch.Tensor
) -> None:
    """Hash the counters `ramp + offset` into `out`, all int32 with arithmetic modulo 2^32.

    Three xorshift-multiply rounds ("triple32" without its last shift, which reaches the lowest bits only), the first
    key added to the counter and the second mixed in between, so that no two streams are shifts of one another.
    """
    torch.add(ramp, _signed(offset + keys[0]), out=out)
    _xor_shift(out, 17, scratch)
    out.mul_(_signed(0xED5AD4BB)).bitwise_xor_(_signed(keys[1]))
    _xor_shift(out, 11, scratch)
    out.mul_(_signed(0xAC4C1B51))
    _xor_shift(out, 15, scratch)
    out.mul_(_signed(0x31848BAB))


def _xor_shift(values: torch.Tensor, shift: int, scratch: torch.Tensor) -> None:
    """values ^= values >> shift, without the sign bits that int32 would shift in."""
    torch.bitwise_right_shift(values, shift, out=scratch)
    values.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))


def _signed(word: int) -> int:
    """The int32 with the lowest 32 bits of `word`."""
    return ((word + 2**31) & (2**32 - 1)) - 2**31
