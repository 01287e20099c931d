"""Channel-merged matrices as plain tensor functions: runs of rows, and matrix products.

A channel-merged matrix stores R rows for the O output channels of N experts; `channel_index[e, c]` is the row that
channel `c` of expert `e` reads (-1: this expert has no such channel, its output is -inf). Rows are sorted by their
owner set, so that the rows of one expert form few runs of consecutive rows:

    rows of owner set  {0} {0,1} {1}      N = 2, O = 3, channel 1 shared
    weight (R, I)      a0  a2 | m1 | b0 b2
    expert 0           [0 : 3]  one run, gather (0, 2, 1)
    expert 1           [2 : 5]  one run, gather (1, 0, 2)

One expert's product is then one plain matrix product per run on a view of the weight (no row is copied) and one gather
of the outputs into channel order.

Shapes: N experts, O channels, I inputs, R rows, B batch, T tokens; `*` is any number of leading dimensions.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

# A mixed batch of at most this many tokens multiplies all R rows once; above it each expert multiplies its own tokens.
ALL_ROWS_MAX_TOKENS = 64

# Up to FEW_TOKENS a product's time is that of reading its rows, and starting one takes as long as reading so many
# values (5 to 20 microseconds): a shorter gap between two runs is read over.
FEW_TOKENS = 16
CALL_VALUES = 100_000

# On a CPU, from so many tokens on copying an expert's rows can cost less than moving its outputs into channel order.
COPY_MIN_TOKENS = 256
# An expert with more runs is multiplied by one copy of its rows for many tokens, and by all rows for few.
MAX_RUNS = 32
# Up to this many tokens, a float32 product on a CPU goes in two halves (see `multiply_rows`).
HALVES_MAX_TOKENS = 4
MKL_DTYPES = (torch.float32, torch.float64)


class RowSlices(NamedTuple):
    """Slices of the stored rows, and where each channel's row lies in them."""

    slices: tuple[tuple[int, int], ...]  # first row and one past the last, ascending
    gather: torch.LongTensor | None  # (O,) place of each channel in the concatenated slices; None: already in order


class ExpertRuns(NamedTuple):
    """How one expert reads its matrix: views of the weight, then a gather of the outputs."""

    exact: RowSlices  # the expert's runs and nothing else
    few: RowSlices  # for few tokens: short gaps between runs are read, too
    rows: torch.LongTensor  # (O,) row of each channel; of a missing channel, row 0
    missing: torch.BoolTensor | None  # (O,) channels that this expert does not have; None: it has all


def expert_runs(channel_index: torch.Tensor, short_gap: int = 0) -> tuple[ExpertRuns, ...]:
    """Derive every expert's runs from `channel_index` (N, O). Copies the index to the host once.

    Args:
        short_gap: most rows between two runs that are read over for few tokens.
    """
    device = channel_index.device
    runs = []
    for index in channel_index.cpu().long():
        missing = index < 0
        rows = torch.unique(index[~missing])  # sorted
        index = index.clamp(min=0)
        exact = cover_rows(rows, index, missing, 0)
        few = cover_rows(rows, index, missing, short_gap)
        if len(few[0]) > MAX_RUNS:
            few = cover_rows(rows, index, missing, int(rows[-1]))
        exact, few = (
            RowSlices(slices, None if gather is None else gather.to(device)) for slices, gather in (exact, few)
        )
        few = exact if few.slices == exact.slices else few
        runs.append(ExpertRuns(exact, few, index.to(device), missing.to(device) if missing.any() else None))
    return tuple(runs)


def cover_rows(
    rows: torch.LongTensor, index: torch.LongTensor, missing: torch.BoolTensor, short_gap: int
) -> RowSlices:
    """Slices that hold the ascending `rows`, two of them one where at most `short_gap` other rows lie between.

    Args:
        rows: (D,) rows that the expert reads.
        index: (O,) row of each channel.
        missing: (O,) channels that read none.
    """
    breaks = (rows.diff() > 1 + short_gap).nonzero()[:, 0] + 1
    edges = [0, *breaks.tolist(), len(rows)]
    slices = tuple((int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise(edges) if b > a)
    if not slices:
        return RowSlices((), torch.zeros_like(index))
    first, last = torch.tensor(slices).T.contiguous()
    before = (last - first).cumsum(0) - (last - first)  # rows in the slices before
    own = torch.searchsorted(last, index, right=True).clamp(max=len(slices) - 1)
    gather = (index - first[own] + before[own]).masked_fill(missing, 0)
    in_order = int(last[-1] - first[-1] + before[-1]) == len(index) and torch.equal(gather, torch.arange(len(index)))
    return RowSlices(slices, None if in_order else gather)


def fill_missing(output: torch.Tensor, missing: torch.Tensor | None) -> torch.Tensor:
    """-inf where `missing` (broadcast against `output`) says that the expert has no such channel."""
    return output if missing is None else output.masked_fill(missing, float("-inf"))


def reference_linear(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    channel_index: torch.Tensor,
    expert_index: torch.Tensor,
) -> torch.Tensor:
    """The plain definition, slow, and the truth in tests: each batch row multiplies the rows that its expert reads.

    Args:
        hidden_states: (B, *, I).
        weight: (R, I); bias: (R,) or None.
        channel_index: (N, O) int32.
        expert_index: (B,) int64.

    Returns:
        (B, *, O) in the dtype of `hidden_states`.
    """
    outputs = []
    for row, expert in zip(hidden_states, expert_index.tolist(), strict=True):
        index = channel_index[expert].long()
        rows = index.clamp(min=0)
        output = F.linear(row, weight[rows], None if bias is None else bias[rows])
        outputs.append(fill_missing(output, index < 0))
    return torch.stack(outputs)


def run_linear(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, runs: ExpertRuns
) -> torch.Tensor:
    """One expert's product: one matrix product per run on a view of `weight`, then the gather into channel order.

    - One run is one plain product, bit-equal to that of the expert's dense layer.
    - Many tokens pay for copying the expert's rows (O * I values) rather than moving outputs (tokens * O).
    - Few tokens also read short gaps between runs, where that is cheaper than one more product.

    Args:
        hidden_states: (*, I).
        weight: (R, I); bias: (R,) or None.

    Returns:
        (*, O).
    """
    num_tokens = hidden_states.shape[:-1].numel()
    one_run = len(runs.exact.slices) == 1
    if copies_rows(num_tokens, hidden_states, runs) and not (one_run and runs.exact.gather is None):
        own_bias = None if bias is None else bias.index_select(0, runs.rows)
        output = F.linear(hidden_states, weight.index_select(0, runs.rows), own_bias)
    elif one_run:
        output = choose(F.linear(hidden_states, *rows_between(weight, bias, *runs.exact.slices[0])), runs.exact.gather)
    else:
        read = runs.few if num_tokens <= FEW_TOKENS else runs.exact
        output = choose(rows_linear(hidden_states, weight, bias, read.slices), read.gather)
    return fill_missing(output, runs.missing)


def copies_rows(num_tokens: int, hidden_states: torch.Tensor, runs: ExpertRuns) -> bool:
    """Whether one product with a copy of the expert's rows is the faster way."""
    if len(runs.exact.slices) > MAX_RUNS:
        return num_tokens > FEW_TOKENS
    if hidden_states.device.type != "cpu":
        return False
    if hidden_states.dtype in MKL_DTYPES:
        return num_tokens >= 8 * COPY_MIN_TOKENS
    return num_tokens >= max(COPY_MIN_TOKENS, hidden_states.shape[-1] // 4)


def choose(outputs: torch.Tensor, gather: torch.LongTensor | None) -> torch.Tensor:
    """(*, rows) -> (*, O): the outputs at places `gather` (O,), or all as they are."""
    return outputs if gather is None else pick(outputs, gather.expand(*outputs.shape[:-1], -1))


def pick(outputs: torch.Tensor, index: torch.LongTensor) -> torch.Tensor:
    """`outputs.gather(-1, index)`; 16-bit floats are moved as integers, which takes half the time on a CPU."""
    if outputs.element_size() != 2 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return outputs.gather(-1, index)
    return outputs.view(torch.int16).gather(-1, index).view(outputs.dtype)


def rows_between(
    weight: torch.Tensor, bias: torch.Tensor | None, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Views of weight (last - first, I) and bias (last - first,) of consecutive rows."""
    return weight[first:last], None if bias is None else bias[first:last]


def rows_linear(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    slices: tuple[tuple[int, int], ...],
) -> torch.Tensor:
    """Outputs of some slices of the rows, one after the other: (*, I) -> (*, rows), in the strides of the product."""
    num_tokens = hidden_states.shape[:-1].numel()
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
    weight_first = not plain and weight_comes_first(num_tokens, hidden_states)
    if plain or (len(slices) == 1 and not weight_first):
        parts = [F.linear(hidden_states, *rows_between(weight, bias, *edges)) for edges in slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    inputs = hidden_states.reshape(num_tokens, hidden_states.shape[-1])
    num_rows = sum(last - first for first, last in slices)
    outputs = inputs.new_empty((num_rows, num_tokens) if weight_first else (num_tokens, num_rows))
    place = 0
    for first, last in slices:
        rows, own_bias = rows_between(weight, bias, first, last)
        if weight_first:
            multiply_rows(rows, own_bias, inputs.t(), outputs[place : place + last - first])
        else:
            multiply(inputs, own_bias, rows.t(), outputs[:, place : place + last - first])
        place += last - first
    outputs = outputs.t() if weight_first else outputs
    return outputs.view(*hidden_states.shape[:-1], num_rows)


def weight_comes_first(num_tokens: int, hidden_states: torch.Tensor) -> bool:
    """Whether `weight @ inputs.T` is the faster product, as measured with MKL (float32) and oneDNN on AVX-512 CPUs."""
    if hidden_states.device.type != "cpu":
        return False
    if hidden_states.dtype in MKL_DTYPES:
        return num_tokens <= HALVES_MAX_TOKENS or 16 <= num_tokens <= 512
    return num_tokens == 1 or 32 <= num_tokens < 256


def multiply_rows(rows: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor, out: torch.Tensor):
    """out (S, T) = rows (S, I) @ inputs (I, T) + bias (S,)."""
    num_rows, num_tokens = len(rows), inputs.shape[1]
    column = None if bias is None else bias[:, None]
    if rows.dtype in MKL_DTYPES and num_tokens <= HALVES_MAX_TOKENS:
        # MKL reads the rows of a product with few columns with one thread, but a batch of two with two threads.
        if num_rows % 2:
            multiply(rows[-1:], None if bias is None else column[-1:], inputs, out[-1:])
        half = num_rows // 2
        halves, out = rows[: 2 * half].unflatten(0, (2, half)), out[: 2 * half].view(2, half, num_tokens)
        if bias is None:
            torch.bmm(halves, inputs.expand(2, -1, -1), out=out)
        else:
            torch.baddbmm(column[: 2 * half].view(2, half, 1), halves, inputs.expand(2, -1, -1), out=out)
    elif rows.dtype == torch.bfloat16 and num_tokens == 1:
        with without_onednn():
            multiply(rows, column, inputs, out)
    else:
        multiply(rows, column, inputs, out)


@contextmanager
def without_onednn() -> Iterator[None]:
    """PyTorch's own matrix-vector product, which in bfloat16 reads its rows about twice as fast as oneDNN's.

    The switch is the whole process's, and for many tokens oneDNN is far faster: where another thread might be
    multiplying, too, nothing is switched.
    """
    here = threading.current_thread()
    alone = all(thread is here or thread.daemon for thread in threading.enumerate())
    if not alone or not torch.backends.mkldnn.enabled:
        yield
        return
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True


def multiply(left: torch.Tensor, bias: torch.Tensor | None, right: torch.Tensor, out: torch.Tensor):
    """out = left @ right, plus a bias that broadcasts."""
    if bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)


def grouped_linear(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    runs: tuple[ExpertRuns, ...],
    counts: tuple[tuple[int, int], ...],
    order: torch.LongTensor,
) -> torch.Tensor:
    """Mixed batch of many tokens: each expert multiplies its own batch rows.

    Args:
        hidden_states: (B, *, I).
        weight: (R, I); bias: (R,) or None.
        counts: (expert, number of its batch rows), in the order of `order`.
        order: (B,) batch rows sorted by expert.

    Returns:
        (B, *, O).
    """
    outputs = None
    for (expert, _), batch_rows in zip(counts, order.split([count for _, count in counts]), strict=True):
        output = run_linear(hidden_states[batch_rows], weight, bias, runs[expert])
        if outputs is None:
            outputs = output.new_empty(len(hidden_states), *output.shape[1:])
        outputs[batch_rows] = output
    return outputs


def gather_channels(
    row_outputs: torch.Tensor, channel_index: torch.Tensor, expert_index: torch.Tensor, may_miss: bool = True
) -> torch.Tensor:
    """Outputs of all rows to the channels of each batch row's expert.

    Args:
        row_outputs: (B, *, R).
        channel_index: (N, O) int32.
        expert_index: (B,) int64.
        may_miss: whether `channel_index` may hold -1.

    Returns:
        (B, *, O).
    """
    index = channel_index[expert_index].long()  # (B, O)
    index = index.view(index.shape[0], *[1] * (row_outputs.dim() - 2), index.shape[1])
    index = index.expand(*row_outputs.shape[:-1], index.shape[-1])
    if not may_miss:
        return pick(row_outputs, index)
    return fill_missing(pick(row_outputs, index.clamp(min=0)), index < 0)
