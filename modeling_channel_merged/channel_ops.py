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

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

# A mixed batch of at most this many tokens multiplies all R rows once; above it each expert multiplies its own tokens.
ALL_ROWS_MAX_TOKENS = 64

# On a CPU, from so many tokens on copying an expert's rows can cost less than moving its outputs into channel order.
COPY_MIN_TOKENS = 256
MKL_DTYPES = (torch.float32, torch.float64)

# An expert with more runs is multiplied by all rows up to FEW_TOKENS, and above by one copy of its own.
MAX_RUNS = 32
FEW_TOKENS = 16

# Where an expert has several runs, each is widened to multiples of so many rows: libraries prepare a product anew for
# each of its sizes (oneDNN keeps 1,024), and the runs of a model would have as many as it has runs.
RUN_STEP = 16


class ExpertRuns(NamedTuple):
    """How one expert reads its matrix: views of the weight, then a gather of the outputs."""

    slices: tuple[tuple[int, int], ...]  # first row and one past the last of each, ascending; one run as it is
    gather: torch.LongTensor | None  # (O,) place of each channel in the concatenated slices; None: already in order
    rows: torch.LongTensor  # (O,) row of each channel; of a missing channel, row 0
    missing: torch.BoolTensor | None  # (O,) channels that this expert does not have; None: it has all


def expert_runs(channel_index: torch.Tensor, num_rows: int) -> tuple[ExpertRuns, ...]:
    """Derive every expert's runs from `channel_index` (N, O) of R rows. Copies the index to the host once."""
    device = channel_index.device
    runs = []
    for index in channel_index.cpu().long():
        missing = index < 0
        read = torch.zeros(num_rows, dtype=torch.bool).index_fill_(0, index[~missing], True)
        rows = read.nonzero()[:, 0]  # ascending
        slices = runs_of(rows) or [(0, 1)]  # an expert without channels reads what it then fills with -inf
        if len(slices) > 1:
            slices = widen(slices, num_rows)
        first, last = torch.tensor(slices).T.contiguous()
        before = (last - first).cumsum(0) - (last - first)  # rows in the slices before
        own = torch.searchsorted(last, index.clamp(min=0), right=True).clamp(max=len(slices) - 1)
        gather = (index - first[own] + before[own]).masked_fill(missing, 0)
        in_order = int((last - first).sum()) == len(index) and torch.equal(gather, torch.arange(len(index)))
        runs.append(
            ExpertRuns(
                tuple(slices),
                None if in_order else gather.to(device),
                index.clamp(min=0).to(device),
                missing.to(device) if missing.any() else None,
            )
        )
    return tuple(runs)


def runs_of(rows: torch.LongTensor) -> list[tuple[int, int]]:
    """First and one past the last of each run of consecutive numbers in the ascending `rows`."""
    breaks = (rows.diff() > 1).nonzero()[:, 0] + 1
    edges = [0, *breaks.tolist(), len(rows)]
    return [(int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise(edges) if b > a]


def widen(slices: list[tuple[int, int]], num_rows: int) -> list[tuple[int, int]]:
    """Slices that begin and end at multiples of RUN_STEP, or at the last of `num_rows`; those that meet become one."""
    wide: list[tuple[int, int]] = []
    for first, last in slices:
        first, last = first // RUN_STEP * RUN_STEP, min(-(-last // RUN_STEP) * RUN_STEP, num_rows)
        if wide and first <= wide[-1][1]:
            first = wide.pop()[0]
        wide.append((first, last))
    return wide


def tensor_version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written to; None for one made in inference mode, which does not count that."""
    return None if tensor.is_inference() else tensor._version


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

    The tokens of a packed batch are B rows of one token.

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

    One run is one plain product, bit-equal to that of the expert's dense layer.

    Args:
        hidden_states: (*, I).
        weight: (R, I); bias: (R,) or None.

    Returns:
        (*, O).
    """
    num_tokens = hidden_states.shape[:-1].numel()
    if copies_rows(num_tokens, hidden_states, runs):
        own_bias = None if bias is None else bias.index_select(0, runs.rows)
        output = F.linear(hidden_states, weight.index_select(0, runs.rows), own_bias)
    elif len(runs.slices) > MAX_RUNS:
        output = choose(F.linear(hidden_states, weight, bias), runs.rows)
    else:
        parts = [
            F.linear(hidden_states, weight[first:last], None if bias is None else bias[first:last])
            for first, last in runs.slices
        ]
        output = choose(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1), runs.gather)
    return fill_missing(output, runs.missing)


def copies_rows(num_tokens: int, hidden_states: torch.Tensor, runs: ExpertRuns) -> bool:
    """Whether one product with a copy of the expert's rows (O * I values) is the faster way."""
    if len(runs.slices) > MAX_RUNS:
        return num_tokens > FEW_TOKENS
    if hidden_states.device.type != "cpu" or runs.gather is None:
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


def map_experts(
    call: Callable[[int, torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    counts: tuple[tuple[int, int], ...],
    order: torch.LongTensor,
) -> torch.Tensor:
    """Mixed batch of many tokens: each expert works on its own batch rows.

    Args:
        call: `call(expert, rows)` gives the outputs (b, *, O) of the b batch rows of one expert, (b, *, I).
        hidden_states: (B, *, I).
        counts: (expert, number of its batch rows), in the order of `order`.
        order: (B,) batch rows sorted by expert.

    Returns:
        (B, *, O).
    """
    outputs = None
    for (expert, _), batch_rows in zip(counts, order.split([count for _, count in counts]), strict=True):
        output = call(expert, hidden_states[batch_rows])
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
