"""The merged model as a student: loaded to train its stored rows, and what is kept per expert if asked for.

Shapes: N experts, R rows.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.io.foreign_files import foreign
from conversion.refinement.arguments import RefineArguments
from conversion.refinement.padding import batches, pad
from modeling_channel_merged.channel_merged_layers import ChannelIndexed, PerExpert


def load_student(merged: MergedCheckpoint, args: RefineArguments) -> PreTrainedModel:
    """The model of a checkpoint in `args.dtype`, of which only what the arguments say trains."""
    config = copy.deepcopy(merged.config)
    without_dropout(config.text_config)
    with foreign(str(merged.folder)):
        model = AutoModelForCausalLM.from_pretrained(merged.folder, config=config, dtype=getattr(torch, args.dtype))
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, ChannelIndexed):
            module.rows.requires_grad_(True)
        elif isinstance(module, PerExpert) and args.train_per_expert:
            module.requires_grad_(True)
    if args.freeze_single_owner_rows:
        for name, rows in single_owner_rows(model).items():
            model.get_parameter(name).register_hook(_without(rows))
    return model


def without_dropout(config: PreTrainedConfig) -> None:
    """Turn a config's dropout off, in place: a student with noise cannot say what its teacher says."""
    for name, value in vars(config).items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)


def single_owner_rows(model: PreTrainedModel) -> dict[str, torch.BoolTensor]:
    """Rows that at most one expert reads, in all of the modules that share them: parameter name -> (R,)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    readers: dict[str, torch.Tensor] = {}
    for module in model.channel_modules().values():
        read = torch.zeros(module.num_experts, module.num_rows, dtype=torch.bool)
        for expert, index in enumerate(module.channel_index.cpu().long()):
            read[expert, index[index >= 0]] = True
        for parameter in module.rows.parameters():
            name = names[id(parameter)]
            readers[name] = readers[name] | read if name in readers else read
    return {name: read.sum(0) <= 1 for name, read in readers.items()}


def _without(rows: torch.BoolTensor):
    """A gradient of (R, *) with zeros at some rows: without weight decay these stay bit for bit."""

    def mask(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.masked_fill(rows.to(gradient.device).view(-1, *[1] * (gradient.dim() - 1)), 0.0)

    return mask


@torch.no_grad()
def round_to_stored(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round what trained to the dtypes that it will be stored in, in place."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.to(dtypes[name]))


def route(model: PreTrainedModel, prompts: Sequence[Sequence[int]], batch_size: int) -> list[int]:
    """The expert that the model's router picks for each prompt."""
    model.eval()
    experts = [0] * len(prompts)
    for numbers in batches(prompts, batch_size):
        input_ids, mask = (tensor.to(model.device) for tensor in pad([prompts[number] for number in numbers]))
        for number, expert in zip(numbers, model.route(input_ids, mask).expert_index.tolist()):
            experts[number] = expert
    return experts
