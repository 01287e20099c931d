"""Which channel modules read the same inputs, and in which order they run."""

import copy

import torch
from torch import nn

from conversion.checkpoints.architecture import base_architecture
from conversion.merging.plan import Plan

NUM_TOKENS = 8


def shared_inputs(plan: Plan) -> dict[str, str]:
    """The first module that reads the same tensor as each linear module does, in the order in which these run.

    Found by a forward pass of the base architecture without data: queries, keys and values read one tensor, and so
    do blocks whose attention and feed-forward run side by side.

    Returns:
        Module path -> path of the first; the embedding, which reads token ids, is not in it.

    Raises:
        ValueError: a module does not run exactly once in a forward pass, with one input per token.
    """
    config = copy.deepcopy(plan.text_config)
    config._attn_implementation = "eager"  # the others look at the mask's values
    inner, _ = base_architecture(config)
    first: dict[tuple, str] = {}
    found: dict[str, str] = {}
    held = []  # so that no other tensor gets their place

    def note(path: str, inputs: torch.Tensor) -> None:
        if path in found or inputs.shape[:-1].numel() != NUM_TOKENS:
            raise ValueError(
                f"{type(inner).__name__} cannot be calibrated: {path} does not run once with one input for each token"
            )
        whole = inputs if inputs._base is None else inputs._base
        held.append(whole)
        place = (id(whole), inputs.storage_offset(), inputs.shape[-1], inputs._version)
        found[path] = first.setdefault(place, path)

    paths = [path for path, module in plan.modules.channel.items() if module.kind != "embedding"]
    for path in paths:
        on_inputs(inner.get_submodule(path), lambda inputs, path=path: note(path, inputs))
    ids = torch.zeros(1, NUM_TOKENS, dtype=torch.int64, device="meta")
    with torch.no_grad():
        inner.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    if missing := [path for path in paths if path not in found]:
        raise ValueError(f"{type(inner).__name__} cannot be calibrated: {missing[0]} does not run in a forward pass")
    return found


def on_inputs(module: nn.Module, function) -> torch.utils.hooks.RemovableHandle:
    """Call `function` with what a module is about to read."""

    def hook(module, args, kwargs):
        function(args[0] if args else next(iter(kwargs.values())))

    return module.register_forward_pre_hook(hook, with_kwargs=True)
