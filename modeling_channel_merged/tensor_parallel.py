"""Tensor parallel: each process of a group holds the rows of its own channels, or its own inputs of all rows.

Transformers splits the weights while it reads them, but not by channels: which rows a channel reads only
`channel_index` says. So each module is put together once all is read, and cut anew:

| module, by its style in the base's plan | a process holds               | and gives                                |
|-----------------------------------------|-------------------------------|------------------------------------------|
| `colwise`                               | the rows of its channels      | its channels                             |
| `colwise_gather_output`, and the head   | the same                      | its channels, which are gathered         |
| `rowwise`                               | its inputs of all rows        | a part of each channel's sum, added up   |
| `rowwise_split_input`                   | the same                      | the same, after a cut of whole inputs    |
| the token embedding                     | the rows of its tokens        | zeros for others' tokens, added up       |

Rows keep their order, so an expert's still form few runs. What travels is one value a channel, not one a row. Norms
and the router are whole everywhere. Attention whose heads cannot be shared out evenly gathers, whatever its plan says.

Shapes: N experts, O channels, R rows, I inputs.
"""

import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from .channel_merged_layers import ChannelIndexed, ChannelMergedEmbedding, ChannelMergedLinear, PerExpert, read_rows

EMBEDDING = "embedding_rowwise"
GATHERED = {"colwise": "colwise_gather_output", "rowwise": "rowwise_split_input"}
STYLES = (EMBEDDING, *GATHERED, *GATHERED.values())
READ = {GATHERED[style]: style for style in GATHERED}
# For modules that each process holds whole; they say how gradients are added up.
WHOLE = ("replicated_with_grad_allreduce", "replicate")
# Modules, by their last name, whose inner channels do not depend on each other, as those of a head do.
ELEMENTWISE = ("mlp", "feed_forward", "ffn")


def channel_styles(inner: nn.Module) -> dict[str, str]:
    """The style of each channel-merged module of a base model with a tensor-parallel plan, by its path; else empty.

    The plan's rules for other modules, or of unknown styles, are there by their names for `check_styles` to refuse.
    """
    plan = getattr(inner, "_tp_plan", None) or {}
    modules = {path: module for path, module in inner.named_modules() if isinstance(module, ChannelIndexed)}
    styles = {path: plan[wildcard(path)] for path in modules if wildcard(path) in plan}
    if not styles:
        return {}
    for path, module in modules.items():
        if module in (inner.get_input_embeddings(), inner.get_output_embeddings()):
            styles[path] = EMBEDDING if isinstance(module, ChannelMergedEmbedding) else "colwise_gather_output"
    paths = {wildcard(path) for path in modules}
    return styles | {name: plan[name] for name in plan if name not in paths and plan[name] not in (*STYLES, *WHOLE)}


def wildcard(path: str) -> str:
    """The name of a module in a plan: layer numbers are `*`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def reading_plan(inner: nn.Module, styles: dict[str, str]) -> dict[str, str]:
    """The plan by which Transformers reads the rows: it names tensors, no modules, so that it hooks none."""
    return {
        f"{wildcard(path)}.rows.{name}": READ.get(style, style)
        for path, style in styles.items()
        if style in STYLES
        for name, _ in inner.get_submodule(path).rows.named_parameters()
    }


@dataclass(frozen=True)
class Part:
    """One process of a group of `size`, and what is its own."""

    group: "dist.ProcessGroup"  # not there where PyTorch is built without
    rank: int
    size: int

    def bounds(self, count: int) -> tuple[int, int]:
        """First and one past the last of this process's own of `count` channels or inputs, as `torch.chunk` has it."""
        step = -(-count // self.size)
        return min(self.rank * step, count), min((self.rank + 1) * step, count)

    def add_up(self, output: torch.Tensor) -> torch.Tensor:
        """The sum of what all processes have there."""
        return _AddUp.apply(output, self.group)

    def gather(self, output: torch.Tensor, count: int) -> torch.Tensor:
        """(*, own channels) -> (*, count): those of all processes."""
        step = -(-count // self.size)
        return _Gather.apply(F.pad(output, (0, step - output.shape[-1])), self.group, self.size)[..., :count]


class _AnswersOnly(torch.autograd.Function):
    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "a channel-merged model that is split by tp_size answers and routes, but does not train: leave tp_size out"
        )


class _AddUp(_AnswersOnly):
    @staticmethod
    def forward(ctx, output, group):
        total = output.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total


class _Gather(_AnswersOnly):
    @staticmethod
    def forward(ctx, output, group, size):
        parts = [torch.empty_like(output, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, output.contiguous(), group=group)
        return torch.cat(parts, dim=-1)


def check_styles(model: nn.Module, styles: dict[str, str], size: int):
    """Raise ValueError for a model that cannot be split among `size` processes; its weights need not be there."""
    base, instead = model.config.text_config.model_type, 'leave it out, or split the model with device_map="auto"'
    if not styles:
        raise ValueError(f"tp_size is {size}, but Transformers has no tensor-parallel plan for {base!r}: {instead}")
    if getattr(model, "is_quantized", False):
        raise ValueError(f"tp_size is {size}, but quantized rows cannot be split by channels: {instead}")
    for path, style in styles.items():
        if style not in STYLES:
            raise ValueError(
                f"tp_size is {size}, but the plan of {base!r} for {path} is {style!r}, expected one of {STYLES}: "
                f"{instead}"
            )
        module = model.model.get_submodule(path)
        count = module.in_features if READ.get(style, style) == "rowwise" else module.channel_index.shape[1]
        if (size - 1) * -(-count // size) >= count:
            raise ValueError(f"tp_size is {size}, but {path} cannot give each process some of its {count} channels")


def _needs_whole(model: nn.Module, path: str, size: int) -> bool:
    """Whether what is between the linear maps of an attention or MLP must see all channels."""
    parent, config = path.rpartition(".")[0], model.config.text_config
    norms = [module for module in model.model.get_submodule(parent).modules() if isinstance(module, PerExpert)]
    if parent.rpartition(".")[2] in ELEMENTWISE:
        return bool(norms)
    heads = config.num_attention_heads
    counts = (heads, getattr(config, "num_key_value_heads", None) or heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    of_a_head = all(parameter.shape == (head_dim,) for norm in norms for parameter in norm.parameters())
    return not of_a_head or any(count % size for count in counts)


@torch.no_grad()
def split_channels(model: nn.Module, styles: dict[str, str]) -> dict[str, str]:
    """Cut the modules of a loaded model to what is this process's own, in place; all processes do so together.

    Args:
        model: the channel-merged model, whose stored rows are DTensors, as `reading_plan` has them.

    Returns:
        The styles that the modules run: gathered ones also where the plan's would not do.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    mesh = embedding.rows.weight.device_mesh
    part = Part(mesh.get_group(), mesh.get_local_rank(), mesh.size())
    run = {}
    for path, style in styles.items():
        module = model.model.get_submodule(path)
        if style in GATHERED and _needs_whole(model, path, part.size):
            style = GATHERED[style]
        run[path] = style
        if module in (embedding, head):
            continue
        if READ.get(style, style) == "rowwise":
            _split_inputs(module, part, cuts=style in READ)
        else:
            _split_outputs(module, part, gathers=style in READ)
    capping = getattr(model.config.text_config, "final_logit_softcapping", None)
    if capping is not None and head is not None and head.derived.may_miss:
        _keep_vocabulary(embedding, head)  # logits of missing tokens are found again by the whole index
    else:
        _split_vocabulary(embedding, head, part)
    return run


def _split_outputs(module: ChannelMergedLinear, part: Part, gathers: bool):
    count = module.out_features
    first, last = part.bounds(count)
    kept, index = read_rows(module.channel_index[:, first:last])
    for name, tensor in list(module.rows.named_parameters()):
        _replace(module.rows, name, tensor.full_tensor()[kept])
    _renumber(module, index)
    if gathers:
        module.register_forward_hook(lambda module, args, output: part.gather(output, count))


def _split_inputs(module: ChannelMergedLinear, part: Part, cuts: bool):
    first, last = part.bounds(module.in_features)
    weight, bias = module.rows.weight.to_local(), module.rows.bias
    _replace(module.rows, "weight", weight.contiguous())
    if bias is not None:  # is in the sum once
        _replace(module.rows, "bias", bias.to_local() if part.rank == 0 else torch.zeros_like(bias.to_local()))
    module.in_features = module.rows.in_features = last - first
    if cuts:
        module.register_forward_pre_hook(lambda module, args: (args[0][..., first:last],))
    module.register_forward_hook(lambda module, args, output: part.add_up(output))


def _split_vocabulary(embedding: ChannelMergedEmbedding, head: ChannelMergedLinear | None, part: Part):
    """Tokens and head, which may be tied: then its rows are those that either reads."""
    count = embedding.num_embeddings
    first, last = part.bounds(count)
    own = embedding.channel_index[:, first:last]
    tied = head is not None and head.rows.weight is embedding.rows.weight
    if head is not None and not tied:
        _split_outputs(head, part, gathers=True)
    kept, index = read_rows(torch.cat([own, head.channel_index[:, first:last]], dim=1) if tied else own)
    own = index[:, : last - first]
    # Others' tokens read one more row, of zeros.
    _replace(embedding.rows, "weight", F.pad(embedding.rows.weight.full_tensor()[kept], (0, 0, 0, 1)))
    _renumber(embedding, torch.cat([own, own.new_full((len(own), 1), len(kept))], dim=1))
    if tied:
        head.rows.weight = embedding.rows.weight
        if head.rows.bias is not None:
            _replace(head.rows, "bias", F.pad(head.rows.bias.full_tensor()[kept], (0, 1)))
        _renumber(head, index[:, last - first :])
        head.register_forward_hook(lambda module, args, output: part.gather(output, count))

    def own_tokens(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        tokens = args[0] - first
        return (torch.where((tokens >= 0) & (tokens < last - first), tokens, last - first),)

    embedding.register_forward_pre_hook(own_tokens)
    embedding.register_forward_hook(lambda module, args, output: part.add_up(output))


def _keep_vocabulary(embedding: ChannelMergedEmbedding, head: ChannelMergedLinear):
    tied = head.rows.weight is embedding.rows.weight
    for rows in (embedding.rows, head.rows):
        for name, tensor in list(rows.named_parameters()):
            _replace(rows, name, tensor.full_tensor())
    if tied:
        head.rows.weight = embedding.rows.weight


def _replace(rows: nn.Module, name: str, tensor: torch.Tensor):
    setattr(rows, name, nn.Parameter(tensor, requires_grad=getattr(rows, name).requires_grad))


def _renumber(module: ChannelIndexed, index: torch.Tensor):
    """Let the module read its new rows by this `index`."""
    module.channel_index, num_rows = index, len(module.rows.weight)
    if isinstance(module, ChannelMergedLinear):
        module.out_features, module.rows.out_features = index.shape[1], num_rows
        module.derive()
    else:
        module.rows.num_embeddings = num_rows


class TensorParallelMixin:
    """Loading by `DistributedConfig(tp_size=...)`, for a model with a `config` and the wrapped `model`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in Transformers.

        Raises:
            ValueError: a tensor-parallel plan of the caller's, or a model that cannot be split.
        """
        distributed = kwargs.get("distributed_config")
        plan = distributed.get("tp_plan") if isinstance(distributed, dict) else getattr(distributed, "tp_plan", None)
        plan = plan if kwargs.get("tp_plan") is None else kwargs["tp_plan"]
        if plan not in (None, "auto"):
            raise ValueError(
                f"tp_plan is {plan!r:.100}, expected 'auto': it follows from the base architecture's plan"
            )
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.is_split:
            styles = split_channels(model, model.channel_styles)
            model._tp_plan = {f"model.{wildcard(path)}": style for path, style in styles.items()}
        return loaded

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *args, **kwargs):
        """Part of loading: what cannot be split is refused before any weights are read."""
        # Transformers before 5.20 gives None where nothing is to be split, and has no pp_size.
        tp_size, pp_size = (getattr(distributed_config, name, None) or 1 for name in ("tp_size", "pp_size"))
        if pp_size > 1:
            raise ValueError(f'pp_size is {pp_size}, expected 1: split the blocks with device_map="auto"')
        if tp_size > 1:
            for name in ("fsdp_size", "dp_replicate_size"):
                if (value := getattr(distributed_config, name, None) or 1) > 1:
                    raise ValueError(f"{name} is {value} beside tp_size, expected one way to split the model")
            check_styles(model, model.channel_styles, tp_size)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def plan_channels(self):
        """What each channel-merged module does if the model is split, and how Transformers then reads its tensors."""
        self.channel_styles = channel_styles(self.model)
        self.model._tp_plan = reading_plan(self.model, self.channel_styles)

    @property
    def is_split(self) -> bool:
        """Whether this process holds only its part of the stored rows, by tensor parallelism."""
        return (self._tp_size or 1) > 1

    def check_whole(self, done: str):
        """Raise ValueError if this process holds only a part of the model, which then cannot be `done`."""
        if self.is_split:
            raise ValueError(
                f"the model is split among {self._tp_size} processes and cannot be {done}: load it without tp_size"
            )

    def save_pretrained(self, *args, **kwargs):
        """As in Transformers; ValueError, before anything is written, for a model that is split."""
        self.check_whole("saved")
        return super().save_pretrained(*args, **kwargs)

    def push_to_hub(self, *args, **kwargs):
        """As in Transformers; ValueError, before anything is sent, for a model that is split."""
        self.check_whole("pushed")
        return super().push_to_hub(*args, **kwargs)
