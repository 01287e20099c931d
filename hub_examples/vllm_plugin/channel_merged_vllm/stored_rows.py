"""What one tensor-parallel rank holds of a channel-merged module: the rows that its own channels read.

| module            | a rank holds                    | and gives                                     |
|-------------------|---------------------------------|-----------------------------------------------|
| q, k, v, gate, up | the rows that its channels read | its channels                                  |
| o, down           | its inputs of all rows          | a part of each channel's sum: O values add up |
| token embedding   | the rows that its tokens read   | zeros for others' tokens: all add up          |
| head              | the rows that its tokens read   | its tokens' logits, which are gathered        |
| norms             | all experts' weights            | all                                           |

Rows keep their order, so an expert's still form few runs. Modules are built without memory and get it when they are
loaded: only then is known how many rows a rank reads. Shapes: N experts, O channels, I inputs, R rows, T tokens.
"""

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce

from modeling_channel_merged.active_experts import active_experts
from modeling_channel_merged.channel_merged_layers import ChannelMergedEmbedding, ChannelMergedLinear, read_rows

ALL = slice(None)


def parameter(tensor: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    """`tensor` as a weight on the device and in the dtype of `like`."""
    return nn.Parameter(tensor.to(like.device, like.dtype).contiguous(), requires_grad=False)


class RankLinear(ChannelMergedLinear):
    """N linear maps that share rows, of which this rank holds some channels, or some inputs of all channels.

    Args:
        channels: its own of the O channels; those beyond O are never read and give -inf.
        inputs: its own of the I inputs; the ranks' outputs are parts of a sum.
        adds_up: whether to add up the outputs of all ranks, of which one holds the bias: `holds_bias`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_rows: int,
        num_experts: int,
        *,
        bias: bool = False,
        channels: slice = ALL,
        inputs: slice = ALL,
        adds_up: bool = False,
        holds_bias: bool = True,
    ):
        with torch.device("meta"):
            super().__init__(in_features, out_features, num_rows, num_experts, bias)
        self.channels, self.inputs, self.adds_up, self.holds_bias = channels, inputs, adds_up, holds_bias

    def fill(self, tensors: dict[str, torch.Tensor], like: torch.Tensor):
        """Take this rank's own of the stored `channel_index` (N, O), `weight` (R, I) and, if there, `bias` (R,)."""
        kept, index = read_rows(own_channels(tensors["channel_index"], self.channels))
        self.rows.weight = parameter(tensors["weight"][kept][:, self.inputs], like)
        if self.rows.bias is not None:
            bias = tensors["bias"][kept]
            self.rows.bias = parameter(bias if self.holds_bias else torch.zeros_like(bias), like)
        self.rows.in_features = self.in_features = self.rows.weight.shape[1]
        self.read_by(index.to(like.device))

    def read_by(self, index: torch.Tensor):
        """Let the channels read the rows by this index (N, O)."""
        self.rows.out_features, self.out_features = len(self.rows.weight), index.shape[1]
        self.channel_index = index
        self.derive()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, I) -> (T, O), of this rank's inputs and channels."""
        outputs = super().forward(hidden_states)
        return tensor_model_parallel_all_reduce(outputs) if self.adds_up else outputs


def own_channels(channel_index: torch.Tensor, channels: slice) -> torch.Tensor:
    """(N, O) -> the channels of the slice, filled up with channels that no expert has to its full length."""
    index = channel_index[:, channels]
    if channels == ALL:
        return index
    return nn.functional.pad(index, (0, channels.stop - channels.start - index.shape[1]), value=-1)


class RankEmbedding(ChannelMergedEmbedding):
    """N token embeddings that share rows, of which this rank holds the tokens `first` to `last` - 1."""

    def __init__(self, num_tokens: int, hidden_size: int, num_rows: int, num_experts: int, tokens: slice):
        with torch.device("meta"):
            super().__init__(nn.Embedding(num_tokens, hidden_size), num_rows, num_experts)
        self.tokens, self.is_whole = tokens, tokens == slice(0, num_tokens)

    def fill(self, tensors: dict[str, torch.Tensor], like: torch.Tensor, tied_head: RankLinear | None = None):
        """As `RankLinear.fill`; a tied head, whose index is `head_index`, reads the same rows."""
        own = tensors["channel_index"][:, self.tokens]
        tokens = own.shape[1]
        if tied_head is not None:
            own = torch.cat([own, own_channels(tensors["head_index"], tied_head.channels)], dim=1)
        kept, index = read_rows(own)
        self.rows.weight = parameter(tensors["weight"][kept], like)
        self.rows.num_embeddings = len(self.rows.weight)
        index = index.to(like.device)
        self.channel_index = index[:, :tokens].contiguous()
        if tied_head is not None:
            tied_head.rows.weight = self.rows.weight
            tied_head.read_by(index[:, tokens:].contiguous())

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """(T,) token ids -> (T, H)."""
        if self.is_whole:
            return super().forward(input_ids[:, None])[:, 0]
        tokens = input_ids - self.tokens.start
        others = (tokens < 0) | (tokens >= self.channel_index.shape[1])
        embedded = super().forward(tokens.masked_fill(others, 0)[:, None])[:, 0]
        return tensor_model_parallel_all_reduce(embedded.masked_fill(others[:, None], 0.0))


class ExpertNorm(nn.Module):
    """A root-mean-square norm of which each expert has its own weight: (N, H), row `e` is that of expert `e`."""

    def __init__(self, num_experts: int, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_experts, hidden_size), requires_grad=False)
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, *, H) -> the same, normed over its last dimension in float32."""
        active = active_experts()
        weight = self.weight[active.expert_index if active.expert is None else active.expert]
        if active.expert is None:
            weight = weight.view(len(weight), *[1] * (hidden_states.dim() - 2), -1)
        values = hidden_states.float()
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps)
        return weight * values.to(hidden_states.dtype)


def gather_logits(logits: torch.Tensor, vocab_size: int, size: int) -> torch.Tensor:
    """(T, own tokens) of each of `size` ranks -> (T, V)."""
    return logits if size == 1 else tensor_model_parallel_all_gather(logits)[:, :vocab_size]
