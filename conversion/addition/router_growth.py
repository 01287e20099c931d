"""The router of a checkpoint that gets one more expert: until it is trained, it never picks the new one.

A trained router's other logits stay as they are, and an untrained one's zeros stay zeros.
"""

import logging
from collections.abc import Mapping

import torch

from conversion.addition.plan import Addition
from modeling_channel_merged import ChannelMergedConfig, ChannelMergedForCausalLM

logger = logging.getLogger(__name__)

ROUTER_PREFIX = "router."
ROUTER_BIAS = "router.head.bias"
# A new expert's router logit, over the temperature, starts at the mean of the others' less this much: for no query is
# it the largest one, and it takes less than 1 / 20,000 of the probability; training overcomes it in some steps.
ROUTER_MARGIN = 10.0


def extended_router(addition: Addition, config: ChannelMergedConfig) -> dict[str, torch.Tensor]:
    """The router's tensors for one more expert, see `grow_router`; as they are where one was exchanged."""
    merged = addition.merged
    tensors = {name: merged.reader.read(name) for name in merged.tensors if name.startswith(ROUTER_PREFIX)}
    if addition.replaces:
        if addition.name == merged.config.router["trunk_expert"]:
            logger.warning(
                "%r is the router's trunk expert: its features of every query change, so train the router again",
                addition.name,
            )
        return tensors
    with torch.device("meta"):
        larger = ChannelMergedForCausalLM(config).router.state_dict()
    shapes = {ROUTER_PREFIX + name: value.shape for name, value in larger.items()}
    trained = any(bool(tensor.any()) for tensor in tensors.values() if tensor.is_floating_point())
    # Probabilities are those of the logits over the temperature.
    return grow_router(tensors, shapes, ROUTER_MARGIN * config.router["temperature"] if trained else 0.0)


def grow_router(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], margin: float
) -> dict[str, torch.Tensor]:
    """A router's tensors for one more expert, which comes last; logits of the others stay as they are.

    Every tensor with a dimension of experts gets one more slice, the mean of the others, and the head's bias is less
    by `margin`: logits are linear in these tensors, so for every query the new one is that much less than the mean of
    the others.

    Args:
        tensors: by name, of N experts.
        shapes: the same of N + 1.
        margin: 0 for an untrained router, whose zeros stay zeros.
    """
    grown = {}
    for name, tensor in tensors.items():
        for dim in [dim for dim, size in enumerate(shapes[name]) if size != tensor.shape[dim]]:
            tensor = torch.cat([tensor, tensor.mean(dim, keepdim=True)], dim)
        if name == ROUTER_BIAS:
            tensor[-1] -= margin
        grown[name] = tensor
    return grown
