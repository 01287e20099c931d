"""Names of a plain checkpoint's tensors against names of its architecture's parameters.

Transformers renames the tensors of some families as it loads them, and back as it saves them: GPT-NeoX stores its head
as `embed_out`, its class calls it `lm_head`. This reads the same table, for names alone.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter

Tensor = TypeVar("Tensor")

# Tables that a module computes for itself and that older versions of Transformers saved beside the parameters.
COMPUTED_TABLES = (
    r"rotary_emb\.inv_freq$",
    r"\bh\.\d+\.attn\.(masked_)?bias$",
    r"\blayers\.\d+\.attention\.(masked_)?bias$",
)


def by_parameter_name(inner: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors under the names that Transformers gives them as it loads them into `inner`.

    Raises:
        ValueError: Transformers would not only rename a tensor but compute others from it, or gives a name twice.
    """
    transforms = get_model_conversion_mapping(inner)
    renamed, origins = {}, {}
    for name, tensor in tensors.items():
        parameter = name
        for transform in transforms:
            parameter, matched = transform.rename_source_key(parameter)
            if matched is not None and isinstance(transform, WeightConverter):
                raise ValueError(
                    f"{type(inner).__name__} is not supported: Transformers computes its parameters from {name}, "
                    "where a plain copy is expected"
                )
        if parameter in origins:
            raise ValueError(f"{origins[parameter]} and {name} are both {parameter} of {type(inner).__name__}")
        renamed[parameter], origins[parameter] = tensor, name
    return renamed


def stored_names(inner: PreTrainedModel, parameters: Iterable[str]) -> dict[str, str]:
    """The names under which Transformers saves parameters of `inner`."""
    transforms = [
        transform.reverse_transform()
        for transform in reversed(get_model_conversion_mapping(inner, add_legacy=False))
        if not isinstance(transform, PrefixChange | WeightConverter)
    ]
    names = {}
    for parameter in parameters:
        names[parameter] = parameter
        for transform in transforms:
            names[parameter], _ = transform.rename_source_key(names[parameter])
    return names


def match_names(
    checkpoint_names: Iterable[str], parameter_names: Iterable[str], prefix: str, ignored: Iterable[str] = ()
) -> tuple[dict[str, str], list[str], list[str]]:
    """Find every parameter's name in a checkpoint: the same, or with or without the base model's prefix.

    Args:
        checkpoint_names: names of the stored tensors.
        parameter_names: names that the architecture needs.
        prefix: `base_model_prefix` of the architecture ("model", "transformer", ...).
        ignored: regular expressions of stored tensors that are no parameters.

    Returns:
        parameter name -> checkpoint name; the parameters that are missing; the stored tensors that nobody asked for.
    """
    stored = set(checkpoint_names)
    patterns = [re.compile(pattern) for pattern in (*COMPUTED_TABLES, *ignored)]
    found, missing = {}, []
    for name in parameter_names:
        for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if candidate in stored:
                found[name] = candidate
                break
        else:
            missing.append(name)
    extra = sorted(stored - set(found.values()))
    return found, missing, [name for name in extra if not any(pattern.search(name) for pattern in patterns)]
