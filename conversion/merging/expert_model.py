"""One expert of a plan as a model of the base architecture, with the merged vocabulary, before anything is merged."""

import copy

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from conversion.merging.plan import Plan


def load_expert_model(
    plan: Plan, number: int, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """An expert's model, read tensor by tensor: memory is that of its weights and of the largest tensor once more.

    Its input ids and logits are of the merged vocabulary; tokens that the expert does not have get the logit -inf, as
    in the merged model.

    Args:
        plan: the checked conversion.
        number: of the expert.
        dtype: of the weights; None: that of the plan.

    Returns:
        The model in evaluation mode; no parameter requires a gradient.
    """
    dtype = dtype or plan.dtype
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(plan.text_config), dtype=dtype)
    heads = {f"{path}.weight": module for path, module in plan.modules.channel.items() if module.tied_to}
    for name in plan.shapes:
        if name not in heads:
            _assign(model, name, plan.readers[number].read(name).to(device, dtype))
    for name, module in heads.items():
        _assign(model, name, model.get_parameter(f"{module.tied_to}.weight"))
    present = plan.vocabulary.present[number]
    if not present.all():
        missing = (~present).to(device)
        model.register_forward_hook(lambda model, inputs, output: _without_missing(output, missing))
    return model.to(device).eval().requires_grad_(False)


def _assign(model: PreTrainedModel, name: str, values: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    parameter = values if isinstance(values, nn.Parameter) else nn.Parameter(values, requires_grad=False)
    setattr(model.get_submodule(path), leaf, parameter)


def _without_missing(output: ModelOutput, missing: torch.BoolTensor) -> ModelOutput:
    """The output with -inf at the tokens (V,) that the expert does not have."""
    output["logits"] = output["logits"].masked_fill(missing, float("-inf"))
    return output
