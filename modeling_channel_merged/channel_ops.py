"""Channel-merged matrices as plain tensor functions: stored form, row order, runs and matrix products.

A channel-merged matrix stores R rows for the O output channels of N experts; `channel_index[e, c]` is the row that
channel `c` of expert `e` reads (-1: this expert has no such channel, its output is -inf). Rows are sorted by their
owner set along a Gray code, so that the rows of one expert form few runs of consecutive rows:

    rows of owner set  {0} {0,1} {1}      N = 2, O = 3, channel 1 shared
    weight (R, I)      a0  a2 | m1 | b0 b2
    expert 0           [0 : 3]  one run, gather (0, 2, 1)
    expert 1           [2 : 5]  one run, gather (1, 0, 2)

One expert's product is then one plain matrix product per run on a view of the weight (no row is copied) and one gather
of the outputs into channel order.

Shapes: N experts, O channels, I inputs, R rows, B batch, T tokens; `*` is any number of leading dimensions.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

# For N = 4 this Gray cycle splits its 8 runs as (1, 3, 2, 2) over the experts; the reflected code gives (4, 2, 1, 1).
BALANCED_OWNER_ORDER = {4: (8, 10, 2, 6, 4, 12, 14, 15, 13, 9, 11, 3, 7, 5, 1)}

# A mixed batch of at most this many tokens multiplies all R rows once; above it each expert multiplies its own tokens.
ALL_ROWS_MAX_TOKENS = 64

# Tokens from which `run_linear` takes these paths on a CPU (see `run_path`).
TRANSPOSED_MIN_TOKENS = {torch.float32: 16, torch.float64: 16}  # other dtypes: 32
COPY_MIN_TOKENS = 256
MAX_RUNS, FEW_TOKENS = 32, 16


def owner_rank(owner_sets: torch.LongTensor, num_experts: int) -> torch.LongTensor:
    """Place of each owner set (bit mask of experts) along the row order, for any shape of `owner_sets`."""
    if num_experts in BALANCED_OWNER_ORDER:
        order = BALANCED_OWNER_ORDER[num_experts]
        rank = torch.zeros(1 << num_experts, dtype=torch.int64, device=owner_sets.device)
        rank[torch.tensor(order, device=owner_sets.device)] = torch.arange(len(order), device=owner_sets.device)
        return rank[owner_sets]
    rank = owner_sets.clone()  # inverse of the reflected Gray code: the xor of all right shifts
    shift = 1
    while shift < num_experts:
        rank = rank ^ (rank >> shift)
        shift *= 2
    return rank


class RowLayout(NamedTuple):
    """Stored form of one matrix: who owns each row, where it comes from, and which row each channel reads."""

    channel_index: torch.IntTensor  # (N, O) row numbers
    row_channel: torch.LongTensor  # (R,) the channel that each row belongs to
    row_owners: torch.LongTensor  # (R,) bit mask of the experts that read the row


def layout_rows(groups: torch.Tensor) -> RowLayout:
    """Lay out one matrix in run order from the groups of its channels.

    Args:
        groups: (N, O) integers; experts with the same value in a column share one row there.

    Returns:
        The layout: rows ordered by `owner_rank` of their owner set, then by channel.
    """
    num_experts, num_channels = groups.shape
    if num_experts > 62:
        raise ValueError(f"at most 62 experts fit the owner bit mask, got {num_experts}")
    bits = torch.ones(num_experts, dtype=torch.int64, device=groups.device) << torch.arange(
        num_experts, device=groups.device
    )
    owners = torch.zeros(groups.shape, dtype=torch.int64, device=groups.device)
    for expert, bit in enumerate(bits):  # one after the other: N x N x O would be large
        owners |= (groups == groups[expert]) * bit  # (N, O) owner set of the row that expert e reads
    # The lowest member of an owner set speaks for its row.
    leads = (owners & -owners) == bits[:, None]  # (N, O)
    row_channel = leads.nonzero()[:, 1]
    row_owners = owners[leads]
    # A stable sort by owner set keeps channels ascending only if they come in ascending.
    by_channel = torch.argsort(row_channel, stable=True)
    row_channel, row_owners = row_channel[by_channel], row_owners[by_channel]
    order = torch.argsort(owner_rank(row_owners, num_experts), stable=True)
    row_channel, row_owners = row_channel[order], row_owners[order]
    channel_index = torch.empty((num_experts, num_channels), dtype=torch.int32, device=groups.device)
    for expert in range(num_experts):
        owned = ((row_owners >> expert) & 1).nonzero()[:, 0]
        channel_index[expert, row_channel[owned]] = owned.to(torch.int32)
    return RowLayout(channel_index, row_channel, row_owners)


class ExpertRuns(NamedTuple):
    """How one expert reads its matrix: views of the weight, then a gather of the outputs."""

    slices: tuple[tuple[int, int], ...]  # runs of consecutive rows, first and one past the last
    rows: torch.LongTensor  # (O,) row of each channel; of a missing channel, row 0
    gather: torch.LongTensor | None  # (O,) place of each channel in the concatenated runs; None: already in order
    missing: torch.BoolTensor | None  # (O,) channels that this expert does not have; None: it has all


def expert_runs(channel_index: torch.Tensor) -> tuple[ExpertRuns, ...]:
    """Derive every expert's runs from `channel_index` (N, O). Copies the index to the host once."""
    device = channel_index.device
    runs = []
    for index in channel_index.cpu().long():
        missing = index < 0
        rows = torch.unique(index[~missing])  # sorted
        breaks = (rows.diff() != 1).nonzero()[:, 0] + 1
        edges = [0, *breaks.tolist(), len(rows)]
        slices = tuple((int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise(edges) if b > a)
        gather = torch.searchsorted(rows, index.clamp(min=0))
        gather[missing] = 0
        in_order = len(rows) == len(index) and torch.equal(gather, torch.arange(len(index)))
        runs.append(
            ExpertRuns(
                slices,
                index.clamp(min=0).to(device),
                None if in_order else gather.to(device),
                missing.to(device) if missing.any() else None,
            )
        )
    return tuple(runs)


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

    Args:
        hidden_states: (*, I).
        weight: (R, I); bias: (R,) or None.

    Returns:
        (*, O).
    """
    path = run_path(hidden_states, runs)
    if path == "view":
        first, last = runs.slices[0]
        output = F.linear(hidden_states, weight[first:last], None if bias is None else bias[first:last])
    elif path == "copy":
        output = F.linear(
            hidden_states, weight.index_select(0, runs.rows), None if bias is None else bias.index_select(0, runs.rows)
        )
    elif path == "all rows":
        output = F.linear(hidden_states, weight, bias)[..., runs.rows]
    elif path == "transposed":
        inputs = hidden_states.reshape(-1, hidden_states.shape[-1]).t()
        if bias is None:
            parts = [torch.mm(weight[a:b], inputs) for a, b in runs.slices]
        else:
            parts = [torch.addmm(bias[a:b, None], weight[a:b], inputs) for a, b in runs.slices]
        output = torch.cat(parts) if len(parts) > 1 else parts[0]
        output = output.index_select(0, runs.gather) if runs.gather is not None else output
        # Attention kernels want the last dimension contiguous.
        output = output.t().contiguous().unflatten(0, hidden_states.shape[:-1])
    else:
        parts = [F.linear(hidden_states, weight[a:b], None if bias is None else bias[a:b]) for a, b in runs.slices]
        output = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        output = output[..., runs.gather] if runs.gather is not None else output
    return fill_missing(output, runs.missing)


def run_path(hidden_states: torch.Tensor, runs: ExpertRuns) -> str:
    """How `run_linear` multiplies (*, I) inputs; the numbers were measured with oneDNN and MKL on AVX-512.

    - "view": one run in channel order is a plain product.
    - "copy": many tokens pay for copying the expert's rows (O * I values) rather than moving outputs (tokens * O).
    - "transposed", `weight @ x.T`: gathering channels is then a copy of whole rows of the output, which even with the
      transposition back is cheaper than picking single elements; in float32 the product itself is faster, too.
    - "all rows": so many runs (a dozen experts or more) that their calls cost more than reading every row.
    - "split": the product per run, then picking elements; for few tokens, and on accelerators, where that is cheap.
    """
    if runs.gather is None and len(runs.slices) == 1:
        return "view"
    num_tokens, in_features = hidden_states.shape[:-1].numel(), hidden_states.shape[-1]
    if len(runs.slices) > MAX_RUNS:
        return "copy" if num_tokens >= FEW_TOKENS else "all rows"
    if hidden_states.device.type != "cpu":
        return "split"
    if num_tokens >= COPY_MIN_TOKENS and 2 * num_tokens >= in_features:
        return "copy"
    if num_tokens >= TRANSPOSED_MIN_TOKENS.get(hidden_states.dtype, 32):
        return "transposed"
    return "split"


def grouped_linear(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    runs: tuple[ExpertRuns, ...],
    counts: tuple[tuple[int, int], ...],
) -> torch.Tensor:
    """Mixed batch whose rows are sorted by expert: each expert multiplies its own batch rows.

    Args:
        hidden_states: (B, *, I), batch rows sorted by expert.
        weight: (R, I); bias: (R,) or None.
        counts: (expert, number of batch rows) in the order of the batch.

    Returns:
        (B, *, O) in the same order.
    """
    parts = hidden_states.split([count for _, count in counts])
    experts = [expert for expert, _ in counts]
    outputs = [run_linear(part, weight, bias, runs[expert]) for part, expert in zip(parts, experts, strict=True)]
    return torch.cat(outputs)


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
        return row_outputs.gather(-1, index)
    return fill_missing(row_outputs.gather(-1, index.clamp(min=0)), index < 0)
