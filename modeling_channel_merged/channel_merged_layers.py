"""Modules that hold N experts where the base architecture holds one, and the swap that puts them in place.

| in the base architecture          | here                     | tensors                                           |
|-----------------------------------|--------------------------|---------------------------------------------------|
| nn.Linear, its subclasses, Conv1D | `ChannelMergedLinear`    | `rows.weight` (R, I), `.bias` (R,), `channel_index` |
| token embedding                   | `ChannelMergedEmbedding` | `rows.weight` (R, H), `channel_index`             |
| norms, learned positions          | `PerExpert`              | `experts.<e>.<parameter>`, exact copies           |

`channel_index` is int32 (N, O). Shapes: N experts, O channels, I inputs, H hidden size, R rows, B batch, T tokens.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from transformers.pytorch_utils import Conv1D

from .active_experts import ActiveExperts, active_experts
from .channel_kernels import RowOwners, kernel_applies, kernel_linear, kernels_run_on, row_owners
from .channel_ops import (
    ALL_ROWS_MAX_TOKENS,
    ExpertRuns,
    expert_runs,
    fill_missing,
    gather_channels,
    map_experts,
    run_linear,
    tensor_version,
)
from .stored_tensors import check_index_values

PLAIN_TENSORS = (nn.Parameter, torch.Tensor)

# Subclasses of nn.Linear whose forward is known to be the plain product plus bias.
PLAIN_LINEAR_SUBCLASSES = ("FalconLinear",)


def initial_channel_index(num_experts: int, num_channels: int, num_rows: int) -> torch.IntTensor:
    """A valid (N, O) index for a model that is not loaded: every expert reads one window of O of the R rows.

    There are fewer rows than channels where no expert has some of the tokens.
    """
    if not 1 <= num_rows <= num_channels * num_experts:
        raise ValueError(
            f"{num_rows} rows cannot hold {num_channels} channels of {num_experts} experts: "
            f"expected 1 to {num_channels * num_experts}"
        )
    index = torch.empty(num_experts, num_channels, dtype=torch.int32)
    if index.is_meta:  # while loading: the checkpoint has the values
        return index
    extra = max(0, num_rows - num_channels)
    starts = [round(expert * extra / max(1, num_experts - 1)) for expert in range(num_experts)]
    index = torch.tensor(starts, dtype=torch.int32)[:, None] + torch.arange(num_channels, dtype=torch.int32)
    return index.clamp(max=num_rows - 1)


class ChannelIndexed(nn.Module):
    """Base of the modules whose channels read stored rows: `rows` (nn.Linear or nn.Embedding) and `channel_index`."""

    rows: nn.Module
    channel_index: torch.Tensor

    def check_channel_index(self, name: str, may_miss: torch.BoolTensor | None = None):
        """Raise ValueError if an entry of `channel_index` names no stored row; see `check_index_values`."""
        check_index_values(name, self.channel_index, self.num_rows, may_miss)

    def reset_channel_index(self):
        """Back to that of a model that is not loaded, in place of whatever `to_empty` left."""
        num_channels = self.channel_index.shape[1]
        index = initial_channel_index(self.num_experts, num_channels, self.num_rows)
        self.channel_index = index.to(self.channel_index.device)

    @property
    def weight(self) -> torch.Tensor:
        """The stored rows (R, I), in row order: not in the order of channels or tokens of any expert."""
        return self.rows.weight

    @property
    def num_experts(self) -> int:
        return self.channel_index.shape[0]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(rows: nn.Module) -> bool:
    """Whether views of the weight of `rows` may stand for calling it."""
    return (
        type(rows) is nn.Linear
        and type(rows.weight) in PLAIN_TENSORS
        and "forward" not in rows.__dict__
        and not any(getattr(rows, hooks) for hooks in HOOKS)
    )


@dataclass(frozen=True, eq=False)
class DerivedIndex:
    """What a linear map derives from its `channel_index`, once."""

    runs: tuple[ExpertRuns, ...]
    may_miss: bool  # some expert lacks some channel
    row_owners: RowOwners | None  # None where the kernel cannot run
    index: torch.Tensor
    version: int | None

    @classmethod
    def of(cls, index: torch.Tensor, num_rows: int) -> "DerivedIndex":
        runs = expert_runs(index, num_rows)
        owners = row_owners(index, num_rows) if kernels_run_on(index.device) else None
        return cls(runs, any(run.missing is not None for run in runs), owners, index, tensor_version(index))


class ChannelMergedLinear(ChannelIndexed):
    """N linear maps (I -> O) that share rows.

    One expert's product is a plain matrix product per run of consecutive rows and a gather of the outputs. Where
    `rows` is anything but a plain nn.Linear with a plain weight (quantized, adapted, sharded, offloaded), it is called
    as it is and its R outputs are gathered.
    """

    def __init__(
        self, in_features: int, out_features: int, num_rows: int, num_experts: int, bias: bool, device=None, dtype=None
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rows = nn.Linear(in_features, num_rows, bias=bias, device=device, dtype=dtype)
        index = initial_channel_index(num_experts, out_features, num_rows)
        self.register_buffer("channel_index", index.to(device))
        self.is_head = False
        self._derived: DerivedIndex | None = None
        self.derive()

    @property
    def num_rows(self) -> int:
        return self.rows.out_features

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the stored rows (R,)."""
        return self.rows.bias

    @torch.compiler.assume_constant_result
    def derive(self) -> bool:
        """Derive what follows from `channel_index` again if it is another tensor or was written to since.

        torch.compile runs this while it traces, and traces anew after a change by an assignment, `load_state_dict` or
        a move. It does not see the index written to in place: the next call without it does. Nobody sees what is
        written past autograd, to `channel_index.data` or to a tensor of inference mode: assign a new tensor instead.

        Returns:
            False on the meta device, where there is nothing to derive.
        """
        index, derived = self.channel_index, self._derived
        if type(index) not in PLAIN_TENSORS and derived is not None:
            index = derived.index  # torch.export puts a stand-in without values there
        if index.is_meta:
            return False
        if derived is None or derived.index is not index or derived.version != tensor_version(index):
            with _disable_current_modes():  # those that trace
                self._derived = DerivedIndex.of(index, self.num_rows)
        return True

    @property
    def derived(self) -> DerivedIndex:
        """What follows from `channel_index` as it is now."""
        self.derive()
        return self._derived

    def __setattr__(self, name: str, value):
        super().__setattr__(name, value)
        if name == "channel_index":
            self._derived = None

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self._derived is not None and self._derived.index is not self.channel_index:
            self._derived, index = None, self.channel_index
            if not index.is_meta and -1 <= index.min() and index.max() < self.num_rows:  # after `to_empty`: anything
                self.derive()
        return self

    def _load_from_state_dict(self, *args):
        self._derived = None
        super()._load_from_state_dict(*args)

    def __getstate__(self):
        # A copy derives its own.
        return {**self.__dict__, "_derived": None}

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, *, I) or flattened (B * T, I) -> the same leading dimensions with O channels."""
        active, derived, rows = active_experts(), self.derived, self.rows
        if self.is_head and active.kept is not None:
            active = active.kept
        if not is_plain(rows):
            return self._call_rows(hidden_states, active)
        weight, bias = rows.weight, rows.bias
        if derived.row_owners is not None and kernel_applies(hidden_states, weight, bias):
            owners = derived.row_owners
            one = active.expert is not None
            experts = owners.experts[active.expert] if one else active.expert_index.to(hidden_states.device)
            return kernel_linear(hidden_states, weight, bias, owners, experts)
        if active.expert is not None:
            return run_linear(hidden_states, weight, bias, derived.runs[active.expert])
        if not active.is_grouped or hidden_states.shape[:-1].numel() <= ALL_ROWS_MAX_TOKENS:
            return split_batch(self._gather_mixed, F.linear(hidden_states, weight, bias), active)

        def own_product(expert: int, inputs: torch.Tensor) -> torch.Tensor:
            return run_linear(inputs, weight, bias, derived.runs[expert])

        return split_batch(by_expert(own_product), hidden_states, active)

    def _call_rows(self, hidden_states: torch.Tensor, active: ActiveExperts) -> torch.Tensor:
        """All R rows, whatever they are, and a gather of their outputs."""
        if active.expert is not None:
            runs = self.derived.runs[active.expert]
            return fill_missing(self.rows(hidden_states)[..., runs.rows], runs.missing)
        return split_batch(self._gather_mixed, self.rows(hidden_states), active)

    def _gather_mixed(self, row_outputs: torch.Tensor, active: ActiveExperts) -> torch.Tensor:
        expert_index = active.expert_index.to(row_outputs.device)
        return gather_channels(row_outputs, self.channel_index, expert_index, self.derived.may_miss)

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

    @property
    def infeatures(self) -> int:
        """Asked for by PEFT alone, where it is to train some tokens of an embedding or to adapt it as a whole."""
        raise ValueError(
            "trainable tokens and adapters of the token embedding (PEFT) would change stored rows, which experts "
            "share and which are not in the order of tokens: train one expert by adapt_expert, or export it"
        )

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """(B, T) token ids -> (B, T, H)."""
        active = active_experts()
        if active.expert is not None:
            return self.rows(self.channel_index[active.expert][input_ids])
        expert_index = active.expert_index.to(input_ids.device)
        expert_index = expert_index.view(active.packed or (-1, 1))
        return self.rows(self.channel_index[expert_index, input_ids])

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, num_experts={self.num_experts}"


class PerExpert(nn.Module):
    """One exact copy per expert of a small module that has parameters but no channels (norm, learned positions)."""

    def __init__(self, module: nn.Module, num_experts: int):
        super().__init__()
        self.experts = nn.ModuleList([module, *(copy.deepcopy(module) for _ in range(num_experts - 1))])

    @property
    def is_lookup(self) -> bool:
        """Whether it looks up rows (learned positions), rather than computes."""
        return isinstance(self.experts[0], nn.Embedding)

    def forward(self, *args, **kwargs) -> torch.Tensor:
        active = active_experts()
        if active.expert is not None:
            return self.experts[active.expert](*args, **kwargs)
        if active.is_grouped and len(args) == 1 and not kwargs and not self.is_lookup:
            call = by_expert(lambda expert, hidden_states: self.experts[expert](hidden_states))
            return split_batch(call, args[0], active)
        return self._select(active, *args, **kwargs)

    def _select(self, active: ActiveExperts, *args, **kwargs) -> torch.Tensor:
        """Every expert's output for the whole batch, of which each batch row keeps its own: (B, *) or (B * T, *)."""
        outputs = torch.stack([expert(*args, **kwargs) for expert in self.experts])  # (N, B or B * T or 1, *)
        expert_index = active.expert_index.to(outputs.device)
        batch = len(expert_index)
        if active.packed is not None and outputs.shape[1] != batch:
            outputs = outputs.expand(-1, active.packed[0], *outputs.shape[2:])  # positions that all batch rows share
            place = 1 if self.is_lookup else token_dimension(args[0], active.packed)
            outputs = outputs.movedim(place + 1, 2)
            own = outputs.flatten(1, 2)[expert_index, torch.arange(batch, device=outputs.device)]
            return own.unflatten(0, active.packed).movedim(1, place)
        if outputs.shape[1] == 1:  # positions that all batch rows share
            return outputs[expert_index, 0]
        expert_index = expert_index.repeat_interleave(tokens_of_row(outputs.shape[1], batch, outputs.shape[1:]))
        return outputs[expert_index, torch.arange(outputs.shape[1], device=outputs.device)]


def by_expert(call: Callable[[int, torch.Tensor], torch.Tensor]):
    """For `split_batch`: `call(expert, hidden_states)` on the batch rows of each expert."""

    def run(hidden_states: torch.Tensor, active: ActiveExperts) -> torch.Tensor:
        return map_experts(call, hidden_states, active.counts, active.order.to(hidden_states.device))

    return run


def split_batch(call, hidden_states: torch.Tensor, active: ActiveExperts) -> torch.Tensor:
    """`call(hidden_states, active)` on (B, *, I), also where an architecture flattened it to (B * T, I).

    Of a packed batch, the call is given (B * T, *, I).
    """
    leading, batch = hidden_states.shape[0], len(active.expert_index)
    if active.packed is not None and leading != batch:
        place = token_dimension(hidden_states, active.packed)
        output = call(hidden_states.movedim(place, 1).flatten(0, 1), active)
        return output.unflatten(0, active.packed).movedim(1, place)
    if leading == batch:
        return call(hidden_states, active)
    tokens = tokens_of_row(leading, batch, hidden_states.shape)
    return call(hidden_states.unflatten(0, (batch, tokens)), active).flatten(0, 1)


def token_dimension(hidden_states: torch.Tensor, packed: tuple[int, int]) -> int:
    """Which dimension of a packed (B, T, *) counts the tokens: the second, or where it counts heads, the third.

    Where there are as many tokens as heads, the one with larger steps: heads come first only in transposed views.

    Raises:
        RuntimeError: neither.
    """
    shape = hidden_states.shape
    second = shape[:2] == packed
    third = len(shape) == 4 and (shape[0], shape[2]) == packed
    if not (second or third):
        raise RuntimeError(f"a packed batch of {packed} tokens reached a layer as shape {tuple(shape)}")
    return 1 if second and not (third and hidden_states.stride(1) < hidden_states.stride(2)) else 2


def tokens_of_row(leading: int, batch: int, shape: torch.Size) -> int:
    """How many of the leading places belong to each of the batch rows; RuntimeError where that is no whole number."""
    if leading % batch:
        raise RuntimeError(f"a mixed batch of {batch} rows reached a layer as shape {tuple(shape)}")
    return leading // batch


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
    inner.get_output_embeddings().is_head = True


def read_rows(channel_index: torch.Tensor) -> tuple[torch.LongTensor, torch.Tensor]:
    """The rows that an index (N, O) reads, in their order, and the index with each row's place among them."""
    kept = torch.unique(channel_index[channel_index >= 0]).long()
    places = torch.searchsorted(kept, channel_index.long()).to(channel_index.dtype)
    return kept, torch.where(channel_index < 0, channel_index, places)


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
        kept, index = read_rows(index)
        weight, bias = weight[kept], None if bias is None else bias[kept]
    trains = module.rows.weight.requires_grad
    module.rows.weight = nn.Parameter(weight.clone(), requires_grad=trains)
    if bias is not None:
        module.rows.bias = nn.Parameter(bias.clone(), requires_grad=trains)
    module.channel_index = index.clone()
    if isinstance(module, ChannelMergedLinear):
        module.out_features, module.rows.out_features = num_channels, len(weight)
        module.derive()
    else:
        module.rows.num_embeddings = len(weight)
