"""The base architecture without data, and the headers of plain checkpoints checked against it."""

import inspect
import re

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from conversion.checkpoints.tensor_names import by_parameter_name, match_names
from conversion.io.row_reader import CheckpointReader
from conversion.io.sources import Source
from conversion.io.weight_files import FLOAT_DTYPES, StoredTensor, read_headers
from conversion.io.wording import first_names
from modeling_channel_merged.channel_merged_layers import ModuleMap, find_modules


def vocabulary_paths(inner: PreTrainedModel) -> tuple[str, ...]:
    """Paths of the embedding and of the head, tied or not."""
    modules = (inner.get_input_embeddings(), inner.get_output_embeddings())
    return tuple(path for path, module in inner.named_modules() if module in modules)


def base_architecture(text_config: PreTrainedConfig) -> tuple[PreTrainedModel, ModuleMap]:
    """The base model without data, and what becomes of its modules."""
    with torch.device("meta"):
        inner = AutoModelForCausalLM.from_config(text_config)
    if "past_key_values" not in inspect.signature(inner.forward).parameters:
        raise ValueError(
            f"{type(inner).__name__} is not supported: it has no key-value cache (past_key_values); "
            "state-space and recurrent models cannot be merged by channels"
        )
    modules = find_modules(inner)
    for path, module in modules.channel.items():
        if module.tied_to and module.bias:
            raise ValueError(
                f"{type(inner).__name__} is not supported: {path} is tied to {module.tied_to}, has a bias"
            )
    parameters = {name for name, _ in inner.named_parameters(remove_duplicate=False)}
    for name in inner.state_dict():
        if name not in parameters:
            raise ValueError(f"{type(inner).__name__} is not supported: it saves {name}, which is no parameter")
    return inner, modules


def channel_parameters(modules: ModuleMap, path: str) -> list[str]:
    """Names of the parameters of a channel module in the base architecture."""
    return [f"{path}.weight"] + ([f"{path}.bias"] if modules.channel[path].bias else [])


def parameter_shapes(inner: PreTrainedModel, modules: ModuleMap) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the base architecture that has a place in the merged one."""
    names = [f"{path}.weight" for path in modules.channel]
    names += [f"{path}.bias" for path, module in modules.channel.items() if module.bias]
    names += [f"{path}.{name}" for path, names_of in modules.per_expert.items() for name in names_of]
    known = {name: tuple(value.shape) for name, value in inner.named_parameters(remove_duplicate=False)}
    left = sorted(known.keys() - set(names))
    if left:
        raise ValueError(f"{type(inner).__name__} is not supported: there is no place for {left[0]}")
    return {name: known[name] for name in names}


def with_rows(shapes: dict[str, tuple[int, ...]], paths: tuple[str, ...], size: int) -> dict[str, tuple[int, ...]]:
    """The same shapes, with `size` rows in the parameters of the modules at `paths`."""
    return {name: (size, *shape[1:]) if name.rpartition(".")[0] in paths else shape for name, shape in shapes.items()}


def make_reader(
    source: Source, inner: PreTrainedModel, modules: ModuleMap, shapes: dict[str, tuple[int, ...]]
) -> CheckpointReader:
    """Check one checkpoint's headers against the base architecture; the reader of its tensors."""
    try:
        stored = by_parameter_name(inner, read_headers(source.folder))
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from None
    heads = {f"{path}.weight" for path, module in modules.channel.items() if module.tied_to}
    ignored = [*(inner._keys_to_ignore_on_load_unexpected or ())]
    ignored += [re.escape(name) + "$" for name, _ in inner.named_buffers()]
    found, missing, extra = match_names(stored, shapes, inner.base_model_prefix, ignored)
    missing = [name for name in missing if name not in heads]
    if missing:
        raise ValueError(f"{source.name}: {source.model} has no tensor {first_names(missing, 1)}")
    if extra:
        raise ValueError(
            f"{source.name}: {source.model} has a tensor that {type(inner).__name__} does not have: "
            f"{first_names(extra, 1)}"
        )
    tensors = {name: stored[key] for name, key in found.items()}
    for name, tensor in tensors.items():
        _check_tensor(source, name, tensor, shapes[name])
    transposed = [f"{path}.weight" for path, module in modules.channel.items() if module.kind == "conv1d"]
    return CheckpointReader(source.name, tensors, transposed)


def _check_tensor(source: Source, name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype_name not in FLOAT_DTYPES:
        raise ValueError(
            f"{source.name}: {name} is stored as {tensor.dtype_name}, expected {', '.join(FLOAT_DTYPES)} "
            "(quantized checkpoints cannot be merged)"
        )
    if tensor.shape != shape:
        raise ValueError(f"{source.name}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
