"""Modules that hold N experts where the base architecture holds one, and the swap that puts them in place.

| in the base architecture          | here                     | tensors                                           |
|-----------------------------------|--------------------------|---------------------------------------------------|
| nn.Linear, its subclasses, Conv1D | `ChannelMergedLinear`    | `rows.weight` (R, I), `.bias` (R,), `channel_index` |
| token embedding                   | `ChannelMergedEmbedding` | `rows.weight` (R, H), `channel_index`             |
| norms, learned positions          | `PerExpert`              | `experts.<e>.<parameter>`, exact copies           |

`channel_index` is int32 (N, O). Shapes: N experts, O channels, I inputs, H hidden size, R rows, B batch, T tokens.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from .active_experts import ActiveExperts, active_experts
from .channel_ops import (
    ALL_ROWS_MAX_TOKENS,
    ExpertRuns,
    expert_runs,
    fill_missing,
    gather_channels,
    grouped_linear,
    run_linear,
)

# Subclasses of nn.Linear whose forward is known to be the plain product plus bias.
PLAIN_LINEAR_SUBCLASSES = ("FalconLinear",)


def initial_channel_index(num_experts: int, num_channels: int, num_rows: int) -> torch.IntTensor:
    """A valid (N, O) index for a model that is not loaded: every expert reads one window of O of the R rows."""
    if not num_channels <= num_rows <= num_channels * num_experts:
        raise ValueError(
            f"{num_rows} rows cannot hold {num_channels} channels of {num_experts} experts: "
            f"expected {num_channels} to {num_channels * num_experts}"
        )
    extra = num_rows - num_channels
    starts = [round(expert * extra / max(1, num_experts - 1)) for expert in range(num_experts)]
    return torch.tensor(starts, dtype=torch.int32)[:, None] + torch.arange(num_channels, dtype=torch.int32)


class ChannelIndexed(nn.Module):
    """Base of the modules whose channels read stored rows: `rows` (nn.Linear or nn.Embedding) and `channel_index`."""

    rows: nn.Module
    channel_index: torch.Tensor
    lowest_index = 0

    def check_channel_index(self, name: str):
        """Raise ValueError if an entry of `channel_index` names no stored row."""
        if self.channel_index.is_meta:
            return
        low, high = self.channel_index.min().item(), self.channel_index.max().item()
        if low < self.lowest_index or high >= self.num_rows:
            wrong = low if low < self.lowest_index else high
            raise ValueError(
                f"{name}.channel_index holds row {wrong}, but {name} stores {self.num_rows} rows "
                f"(expected {self.lowest_index} to {self.num_rows - 1}): the checkpoint is damaged"
            )

    @property
    def weight(self) -> torch.Tensor:
        """The stored rows (R, I), in row order."""
        return self.rows.weight

    @property
    def num_experts(self) -> int:
        return self.channel_index.shape[0]


class ChannelMergedLinear(ChannelIndexed):
    """N linear maps (I -> O) that share rows.

    One expert's product is a plain matrix product per run of consecutive rows and a gather of the outputs. Where
    `rows` is anything but a plain nn.Linear with a plain weight (quantized, adapted, sharded, offloaded), it is called
    as it is and its R outputs are gathered.
    """

    lowest_index = -1  # a token that an expert's vocabulary does not have

    def __init__(
        self, in_features: int, out_features: int, num_rows: int, num_experts: int, bias: bool, device=None, dtype=None
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rows = nn.Linear(in_features, num_rows, bias=bias, device=device, dtype=dtype)
        index = initial_channel_index(num_experts, out_features, num_rows)
        self.register_buffer("channel_index", index.to(device))
        self._runs: tuple[ExpertRuns, ...] | None = None
        self._runs_of: tuple[torch.Tensor, int] | None = None

    @property
    def num_rows(self) -> int:
        return self.rows.out_features

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the stored rows (R,)."""
        return self.rows.bias

    @property
    def runs(self) -> tuple[ExpertRuns, ...]:
        """Runs of every expert, derived again whenever `channel_index` is another tensor or was written to."""
        if torch.compiler.is_dynamo_compiling() and self._runs is not None:
            return self._runs
        index = self.channel_index
        if self._runs is None or self._runs_of[0] is not index or self._runs_of[1] != index._version:
            self._runs, self._runs_of = expert_runs(index), (index, index._version)
        return self._runs

    def __getstate__(self):
        # Derived from channel_index; a copy derives its own.
        return {**self.__dict__, "_runs": None, "_runs_of": None}

    def rows_are_plain(self) -> bool:
        """Whether views of the rows' weight may stand for calling `rows`."""
        rows = self.rows
        return (
            type(rows) is nn.Linear
            and type(rows.weight) in (nn.Parameter, torch.Tensor)
            and not rows._forward_hooks
            and not rows._forward_pre_hooks
            and "forward" not in rows.__dict__
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, *, I) or flattened (B * T, I) -> the same leading dimensions with O channels."""
        active = active_experts()
        if active.expert is not None:
            return self._one_expert(hidden_states, active.expert)
        return split_batch(self._mixed, hidden_states, active)

    def _one_expert(self, hidden_states: torch.Tensor, expert: int) -> torch.Tensor:
        if self.rows_are_plain():
            return run_linear(hidden_states, self.rows.weight, self.rows.bias, self.runs[expert])
        missing = self.runs[expert].missing
        return fill_missing(self.rows(hidden_states)[..., self.channel_index[expert].clamp(min=0)], missing)

    def _mixed(self, hidden_states: torch.Tensor, active: ActiveExperts) -> torch.Tensor:
        num_tokens = hidden_states[..., 0].numel()
        if num_tokens <= ALL_ROWS_MAX_TOKENS or not self.rows_are_plain():
            index = active.expert_index.to(hidden_states.device)
            may_miss = any(runs.missing is not None for runs in self.runs)
            return gather_channels(self.rows(hidden_states), self.channel_index, index, may_miss)
        order, restore = active.order.to(hidden_states.device), active.restore.to(hidden_states.device)
        return grouped_linear(hidden_states[order], self.rows.weight, self.rows.bias, self.runs, active.counts)[
            restore
        ]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, num_experts={self.num_experts}"


class ChannelMergedEmbedding(ChannelIndexed):
    """N token embeddings that share rows; `rows` keeps the class of the base's embedding, and so its scaling."""

    def __init__(self, embedding: nn.Embedding, num_rows: int, num_experts: int):
        super().__init__()
        weight = embedding.weight
        rows = copy.copy(embedding)
        rows._parameters, rows._buffers = dict(rows._parameters), dict(rows._buffers)
        rows.weight = nn.Parameter(weight.new_empty(num_rows, weight.shape[1]), requires_grad=weight.requires_grad)
        rows.num_embeddings = num_rows
        rows.padding_idx = None  # a token's number, not a row's
        rows.__dict__.pop("_is_hf_initialized", None)  # true of the weight that was replaced
        self.rows = rows
        index = initial_channel_index(num_experts, weight.shape[0], num_rows)
        self.register_buffer("channel_index", index.to(weight.device))

    @property
    def num_embeddings(self) -> int:
        return self.channel_index.shape[1]

    @property
    def embedding_dim(self) -> int:
        return self.rows.embedding_dim

    @property
    def num_rows(self) -> int:
        return self.rows.num_embeddings

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """(B, T) token ids -> (B, T, H)."""
        active = active_experts()
        if active.expert is not None:
            return self.rows(self.channel_index[active.expert][input_ids])
        expert_index = active.expert_index.to(input_ids.device)
        return self.rows(self.channel_index[expert_index[:, None], input_ids])

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, num_experts={self.num_experts}"


class PerExpert(nn.Module):
    """One exact copy per expert of a small module that has parameters but no channels (norm, learned positions)."""

    def __init__(self, module: nn.Module, num_experts: int):
        super().__init__()
        self.experts = nn.ModuleList([module, *(copy.deepcopy(module) for _ in range(num_experts - 1))])

    def forward(self, *args, **kwargs) -> torch.Tensor:
        active = active_experts()
        if active.expert is not None:
            return self.experts[active.expert](*args, **kwargs)
        if isinstance(self.experts[0], nn.Embedding):
            return self._select(active, *args, **kwargs)
        return split_batch(self._batched, args[0], active)

    def _select(self, active: ActiveExperts, *args, **kwargs) -> torch.Tensor:
        """Every expert's output for the whole batch, of which each batch row keeps its own: (B, T, H)."""
        expert_index = active.expert_index
        outputs = torch.stack([expert(*args, **kwargs) for expert in self.experts])  # (N, B or 1, T, H)
        outputs = outputs.expand(-1, len(expert_index), *[-1] * (outputs.dim() - 2))
        return outputs[expert_index, torch.arange(len(expert_index), device=outputs.device)]

    def _batched(self, hidden_states: torch.Tensor, active: ActiveExperts) -> torch.Tensor:
        """The base module's forward mapped over the batch, each batch row with its expert's parameters."""
        expert_index = active.expert_index.to(hidden_states.device)
        parameters = {
            name: torch.stack([expert.get_parameter(name) for expert in self.experts])[expert_index]
            for name, _ in self.experts[0].named_parameters()
        }

        def one(parameters: dict[str, torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
            return functional_call(self.experts[0], parameters, (hidden_states,))

        return torch.vmap(one)(parameters, hidden_states)


def split_batch(call, hidden_states: torch.Tensor, active: ActiveExperts) -> torch.Tensor:
    """`call(hidden_states, active)` on (B, *, I), also where an architecture flattened it to (B * T, I)."""
    leading, batch = hidden_states.shape[0], len(active.expert_index)
    if leading == batch:
        return call(hidden_states, active)
    if leading % batch:
        raise RuntimeError(f"a mixed batch of {batch} rows reached a layer as shape {tuple(hidden_states.shape)}")
    return call(hidden_states.unflatten(0, (batch, leading // batch)), active).flatten(0, 1)


@dataclass(frozen=True)
class ChannelModule:
    """A module of the base architecture whose output channels are merged."""

    kind: str  # "linear", "conv1d" (weight stored transposed, (I, O)) or "embedding"
    in_features: int
    out_features: int
    bias: bool
    tied_to: str | None = None  # path of the embedding whose rows this head shares


@dataclass(frozen=True)
class ModuleMap:
    """What becomes of every parameter of a base architecture, by module path."""

    channel: dict[str, ChannelModule]
    per_expert: dict[str, tuple[str, ...]]  # parameter names of the modules that are kept per expert


def find_modules(inner: nn.Module) -> ModuleMap:
    """Sort the modules of a base causal language model (meta device will do) into merged and per-expert ones.

    Raises:
        ValueError: for an architecture that cannot be merged by channels, with the module that stands in the way.
    """
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    name = type(inner).__name__
    if inner.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; channel merging needs a decoder-only causal language model")
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ValueError(f"{name} has no plain token embedding and linear head")
    tied = inner.config.get_text_config().tie_word_embeddings
    channel, per_expert = {}, {}
    embedding_path = next(path for path, module in inner.named_modules() if module is embedding)
    for path, module in inner.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters:
            continue
        if module is embedding:
            channel[path] = ChannelModule("embedding", module.embedding_dim, module.num_embeddings, False)
        elif isinstance(module, nn.Linear):
            if type(module).forward is not nn.Linear.forward and type(module).__name__ not in PLAIN_LINEAR_SUBCLASSES:
                raise ValueError(f"{name} is not supported: {path} is a {type(module).__name__} with its own forward")
            tied_to = embedding_path if module is head and tied else None
            has_bias = module.bias is not None
            channel[path] = ChannelModule("linear", module.in_features, module.out_features, has_bias, tied_to)
        elif isinstance(module, Conv1D):
            channel[path] = ChannelModule("conv1d", *module.weight.shape, True)
        elif any(True for _ in module.children()):
            raise ValueError(
                f"{name} is not supported: {path} ({type(module).__name__}) holds {sorted(parameters)} beside its "
                "submodules"
            )
        elif any(parameter.dim() > 2 for parameter in parameters.values()):
            raise ValueError(
                f"{name} is not supported: {path} ({type(module).__name__}) holds "
                f"{ {key: tuple(value.shape) for key, value in parameters.items()} }; "
                "mixture-of-experts and convolution weights cannot be merged by channels"
            )
        else:
            per_expert[path] = tuple(parameters)
    return ModuleMap(channel, per_expert)


def merged_module(module: nn.Module, spec: ChannelModule, num_rows: int, num_experts: int) -> ChannelIndexed:
    """The channel-merged stand-in of one module, on the same device and in the same dtype."""
    if spec.kind == "embedding":
        return ChannelMergedEmbedding(module, num_rows, num_experts)
    weight = module.weight
    return ChannelMergedLinear(
        spec.in_features, spec.out_features, num_rows, num_experts, spec.bias, weight.device, weight.dtype
    )


def swap_modules(inner: nn.Module, modules: ModuleMap, rows: dict[str, int], num_experts: int):
    """Replace the modules of a base model in place by their N-expert forms, `rows` giving R per module path."""
    unknown = sorted(rows.keys() - modules.channel.keys())
    if unknown:
        raise ValueError(f"rows names modules that {type(inner).__name__} does not have: {unknown}")
    for path, spec in modules.channel.items():
        num_rows = rows.get(path, spec.out_features)
        inner.set_submodule(path, merged_module(inner.get_submodule(path), spec, num_rows, num_experts))
    for path in modules.per_expert:
        inner.set_submodule(path, PerExpert(inner.get_submodule(path), num_experts))


@torch.no_grad()
def resize_channels(module: ChannelIndexed, num_channels: int, std: float | None):
    """Change the channel count of an embedding or head in place; an added channel is one row that all experts own.

    Args:
        num_channels: the new O; a smaller one drops the last channels and the rows that only they read.
        std: standard deviation of the new rows; None starts them at the mean of the stored rows.
    """
    index, weight, bias = (
        module.channel_index[:, :num_channels],
        module.rows.weight,
        getattr(module.rows, "bias", None),
    )
    added = num_channels - module.channel_index.shape[1]
    if added > 0:
        new = weight.new_empty(added, weight.shape[1])
        new = new.copy_(weight.mean(0)) if std is None else new.normal_(0.0, std)
        fresh = torch.arange(len(weight), len(weight) + added, dtype=index.dtype, device=index.device)
        index = torch.cat([index, fresh.expand(len(index), -1)], dim=1)
        weight = torch.cat([weight, new])
        bias = None if bias is None else torch.cat([bias, bias.new_zeros(added)])
    else:
        kept = torch.unique(index[index >= 0]).long()
        index = torch.where(index < 0, index, torch.searchsorted(kept, index.long()).to(index.dtype))
        weight, bias = weight[kept], None if bias is None else bias[kept]
    trains = module.rows.weight.requires_grad
    module.rows.weight = nn.Parameter(weight.clone(), requires_grad=trains)
    if bias is not None:
        module.rows.bias = nn.Parameter(bias.clone(), requires_grad=trains)
    module.channel_index = index.clone()
    if isinstance(module, ChannelMergedLinear):
        module.out_features, module.rows.out_features = num_channels, len(weight)
    else:
        module.rows.num_embeddings = len(weight)
