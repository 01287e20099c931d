"""Few tokens on a GPU: the product of a channel-merged matrix in one Triton kernel, for any mix of experts.

Decoding is bound by the bytes of the weight, so the kernel walks over stored rows and reads each row that an expert
of the batch owns once, and no other. A program multiplies BLOCK_R rows with all tokens of the batch (at most 64, hence
one block of tokens and no second read) and stores each product at the channel of its row, for the tokens whose expert
owns it: the gather into channel order is the address of the store. Rows are sorted by owner set, so nearly every
program has rows of one owner set, and either works at full width or leaves before it reads.

    rows of owner set  {0} {0,1} {1}      N = 2, O = 3, channel 1 shared
    weight (R, I)      a0  a2 | m1 | b0 b2
    channel (R,)       0   2  | 1  | 0  2
    owners (R,)        01  01 | 11 | 10 10
    tokens of experts 0, 1: y[0, 0] = a0 x[0], y[0, 2] = a2 x[0], y[:, 1] = m1 x, y[1, 0] = b0 x[1], y[1, 2] = b2 x[1]

`kernel_applies` says where the kernel stands in for the plain products of channel_ops.py, which are its reference.

Shapes: N experts, O channels, I inputs, R rows, B batch, T tokens; `*` is any number of leading dimensions.
"""

from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the plain products do
    triton = None

# Where the kernel runs; the interpreter of Triton, which the tests use, runs it on "cpu" too.
KERNEL_DEVICES = ("cuda",)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The first with hardware for bfloat16 and asynchronous copies.
MINIMUM_CAPABILITY = (8, 0)

# Most tokens of a batch -> rows of a program. A matrix instruction takes at least 16 tokens and 16 rows; one token
# needs none and leaves the choice to the number of programs. More tokens take more rows, so that the inputs, which
# every program reads from the cache, stay no more than the weights.
BLOCK_ROWS = {1: 4, 16: 16, 32: 32, 64: 64}
KERNEL_MAX_TOKENS = max(BLOCK_ROWS)
# Bytes of the weight that a program reads in one step.
STEP_BYTES = 8192


class RowOwners(NamedTuple):
    """What each stored row is: derived from `channel_index`, on its device."""

    channel: torch.IntTensor  # (R,) the channel that the row belongs to
    owners: torch.LongTensor  # (R,) bit mask of the experts that read the row
    experts: tuple[torch.LongTensor, ...]  # N times the expert's own number, (1,)
    num_channels: int
    complete: bool  # whether every expert has all channels


def row_owners(channel_index: torch.Tensor, num_rows: int) -> RowOwners | None:
    """Derive every row's channel and owners from `channel_index` (N, O). Waits for the device.

    Returns:
        None where a row has no one channel (legal, but no conversion makes it), or with more than 62 experts.
    """
    num_experts, num_channels = channel_index.shape
    if num_experts > 62:
        return None
    device = channel_index.device
    index, present = channel_index.long(), channel_index >= 0
    channels = torch.arange(num_channels, dtype=torch.int32, device=device).expand_as(index)
    experts = torch.arange(num_experts, device=device)
    bits = (torch.ones_like(experts) << experts)[:, None].expand_as(index)
    row_channel = torch.zeros(num_rows, dtype=torch.int32, device=device)
    row_channel[index[present]] = channels[present]
    # Of two channels that read one row, one finds the other's number there.
    if (row_channel[index.clamp(min=0)] != channels)[present].any():
        return None
    owners = torch.zeros(num_rows, dtype=torch.int64, device=device)
    owners.index_put_((index[present],), bits[present], accumulate=True)
    return RowOwners(row_channel, owners, experts.split(1), num_channels, bool(present.all()))


def kernels_run_on(device: torch.device) -> bool:
    """Whether this process can run the kernel on tensors of `device`."""
    if triton is None or device.type not in KERNEL_DEVICES:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= MINIMUM_CAPABILITY


def kernel_applies(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """The one place that chooses between the kernel and the plain products, on a device where the kernel runs.

    Args:
        hidden_states: (*, I).
        weight: (R, I); bias: (R,) or None.
    """
    if not 0 < hidden_states.shape[:-1].numel() <= KERNEL_MAX_TOKENS:
        return False
    tensors = [hidden_states, weight] if bias is None else [hidden_states, weight, bias]
    device, dtype = weight.device, weight.dtype
    return (
        dtype in KERNEL_DTYPES
        and all(tensor.dtype == dtype and tensor.device == device for tensor in tensors)
        and weight.stride(1) == 1
        and (bias is None or bias.stride(0) == 1)
        and not torch.is_autocast_enabled(device.type)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def kernel_linear(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: RowOwners,
    expert_index: torch.LongTensor,
) -> torch.Tensor:
    """`reference_linear` in one kernel, where `kernel_applies`. Waits for nothing: CUDA graphs can capture it.

    Args:
        hidden_states: (B, *, I), or flattened (B * T, I), with at most 64 tokens.
        weight: (R, I); bias: (R,) or None.
        expert_index: (B,) int64 on the same device, or (1,) for a whole batch of one expert.

    Returns:
        the leading dimensions of `hidden_states` and O channels, in its dtype; sums are float32.
    """
    num_rows, num_inputs = weight.shape
    shape = (*hidden_states.shape[:-1], rows.num_channels)
    num_tokens = hidden_states.shape[:-1].numel()
    num_sequences = expert_index.shape[0]
    if num_tokens % num_sequences:
        raise RuntimeError(f"a mixed batch of {num_sequences} rows reached a layer as {tuple(hidden_states.shape)}")
    if rows.complete:
        output = hidden_states.new_empty(shape)
    else:
        output = hidden_states.new_full(shape, float("-inf"))
    block_tokens = next(size for size in BLOCK_ROWS if num_tokens <= size)
    block_rows = BLOCK_ROWS[block_tokens]
    arguments = (
        hidden_states.contiguous(),
        weight,
        weight if bias is None else bias,  # never read without HAS_BIAS
        rows.channel,
        rows.owners,
        expert_index.contiguous(),
        output,
        num_rows,
        num_inputs,
        rows.num_channels,
        num_tokens,
        num_tokens // num_sequences,
        weight.stride(0),
    )
    sizes = dict(
        HAS_BIAS=bias is not None,
        BLOCK_R=block_rows,
        BLOCK_T=block_tokens,
        BLOCK_I=STEP_BYTES // (block_rows * weight.element_size()),
    )
    grid = (-(-num_rows // block_rows),)
    if torch.compiler.is_compiling():  # the compiler launches on the device of the tensors
        row_products[grid](*arguments, **sizes)
    else:
        with torch.cuda.device_of(weight):
            row_products[grid](*arguments, **sizes)
    return output


if triton is not None:

    @triton.jit(do_not_specialize=["num_rows", "num_channels", "num_tokens", "tokens_per_sequence"])
    def row_products(
        hidden_states,  # (num_tokens, I)
        weight,  # (R, I)
        bias,  # (R,)
        row_channel,  # (R,)
        row_owners,  # (R,)
        expert_index,  # (num_tokens / tokens_per_sequence,)
        output,  # (num_tokens, O)
        num_rows,
        num_inputs,
        num_channels,
        num_tokens,
        tokens_per_sequence,
        weight_stride,
        HAS_BIAS: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_I: tl.constexpr,
    ):
        """BLOCK_R rows times all tokens; each product goes to its row's channel, for the owners' tokens."""
        rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        tokens = tl.arange(0, BLOCK_T)
        in_batch = tokens < num_tokens
        experts = tl.load(expert_index + tokens // tokens_per_sequence, mask=in_batch, other=0)
        owners = tl.load(row_owners + rows, mask=rows < num_rows, other=0)
        owned = (((owners[:, None] >> experts[None, :]) & 1) != 0) & in_batch[None, :]  # [BLOCK_R, BLOCK_T]
        is_read = tl.max(owned.to(tl.int32), axis=1) != 0  # [BLOCK_R]
        if tl.max(is_read.to(tl.int32), axis=0) == 0:
            return

        row_starts = weight + rows.to(tl.int64)[:, None] * weight_stride
        if BLOCK_T == 1:
            partial = tl.zeros([BLOCK_R, BLOCK_I], dtype=tl.float32)
            for start in range(0, num_inputs, BLOCK_I):
                inputs = start + tl.arange(0, BLOCK_I)
                inside = inputs < num_inputs
                w = tl.load(row_starts + inputs[None, :], mask=is_read[:, None] & inside[None, :], other=0.0)
                x = tl.load(hidden_states + inputs, mask=inside, other=0.0)
                partial += w.to(tl.float32) * x.to(tl.float32)[None, :]
            products = tl.sum(partial, axis=1)[:, None]
        else:
            token_starts = hidden_states + tokens[None, :] * num_inputs
            products = tl.zeros([BLOCK_R, BLOCK_T], dtype=tl.float32)
            for start in range(0, num_inputs, BLOCK_I):
                inputs = start + tl.arange(0, BLOCK_I)
                inside = inputs < num_inputs
                w = tl.load(row_starts + inputs[None, :], mask=is_read[:, None] & inside[None, :], other=0.0)
                x = tl.load(token_starts + inputs[:, None], mask=in_batch[None, :] & inside[:, None], other=0.0)
                products = tl.dot(w, x, products, input_precision="ieee")  # [BLOCK_R, BLOCK_I] @ [BLOCK_I, BLOCK_T]

        if HAS_BIAS:
            products += tl.load(bias + rows, mask=is_read, other=0.0).to(tl.float32)[:, None]
        channels = tl.load(row_channel + rows, mask=is_read, other=0)
        places = output + tokens[None, :] * num_channels + channels[:, None]
        tl.store(places, products.to(output.dtype.element_ty), mask=owned)
