"""What the tensors of a LoRA adapter do to each parameter of its base, known from their names and shapes.

How PEFT chose its modules (`target_modules`) does not matter: the adapter's tensors tell which were adapted.

Shapes: O channels, I inputs, r rank.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from conversion.checkpoints.adapter_config import AdapterConfig, read_adapter_config
from conversion.checkpoints.tensor_names import by_parameter_name, match_names
from conversion.io.sources import Source
from conversion.io.weight_files import FLOAT_DTYPES, StoredTensor, read_headers
from conversion.io.weight_formats import ADAPTER_FORMATS

KEY_PREFIX = "base_model.model."
MERGED_KEY_PREFIX = KEY_PREFIX + "model."  # the merged model wraps the base architecture

# End of an adapter tensor's name -> which parameter of the module it belongs to, and what it is to it.
PARTS = {
    ".lora_A.weight": ("weight", "down"),
    ".lora_B.weight": ("weight", "up"),
    ".lora_B.bias": ("bias", "shift"),
    ".lora_embedding_A": ("weight", "embedding_up"),
    ".lora_embedding_B": ("weight", "embedding_down"),
    ".lora_magnitude_vector": ("weight", "magnitude"),
    ".lora_magnitude_vector.weight": ("weight", "magnitude"),
    ".token_adapter.trainable_tokens_delta": ("weight", "tokens"),
    ".base_layer.weight": ("weight", "whole"),
    ".base_layer.bias": ("bias", "whole"),
}

# Copies that PEFT saves beside a module's own tensor when an embedding was resized, and does not read again.
UNREAD_COPIES = (".modules_to_save.", ".original_module.")


@dataclass(frozen=True)
class AdapterTensors:
    """What an adapter has for one parameter: names of its tensors."""

    whole: str | None = None  # replaces the base's tensor
    up: str | None = None  # (O, r)
    down: str | None = None  # (r, I)
    embedding_up: str | None = None  # (r, O)
    embedding_down: str | None = None  # (I, r)
    magnitude: str | None = None  # (O,), DoRA
    shift: str | None = None  # (O,), added to a bias after scaling
    tokens: str | None = None  # (tokens, I), rows that are replaced

    def present(self) -> dict[str, str]:
        """The tensors that are there: what each is to the parameter -> its name."""
        return {part: name for part, name in vars(self).items() if name is not None}


@dataclass(frozen=True)
class Patch:
    """What an adapter does to one parameter: its tensors, and how they count."""

    tensors: AdapterTensors
    scaling: float = 1.0
    token_ids: tuple[int, ...] = ()


def read_adapter(
    source: Source, config: AdapterConfig, inner: PreTrainedModel
) -> tuple[dict[str, StoredTensor], dict[str, AdapterTensors]]:
    """An adapter's tensors by their own names, and which of them each parameter has."""
    prefix = KEY_PREFIX if config.merged_expert is None else MERGED_KEY_PREFIX
    try:
        adapter = read_headers(source.folder, ADAPTER_FORMATS)
        by_parameter = by_parameter_name(inner, _by_parameter(adapter, prefix))
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from None
    if not adapter:
        raise ValueError(f"{source.name}: {source.model} has no tensors")
    for key, tensor in adapter.items():
        if tensor.dtype_name not in FLOAT_DTYPES:
            raise ValueError(
                f"{source.name}: {key} is stored as {tensor.dtype_name}, expected {', '.join(FLOAT_DTYPES)}"
            )
    return adapter, by_parameter


def saved_rows(source: Source, inner: PreTrainedModel, name: str) -> int | None:
    """How many rows a matrix of the base has in the adapter that saves it whole; None where it does not."""
    config = read_adapter_config(source)
    config.check_of_base(source)
    adapter, by_parameter = read_adapter(source, config, inner)
    found, _, _ = match_names(by_parameter, [name], inner.base_model_prefix)
    whole = by_parameter[found[name]].whole if found else None
    return adapter[whole].shape[0] if whole else None


def _by_parameter(keys: Iterable[str], prefix: str) -> dict[str, AdapterTensors]:
    """Parameter name, as the adapter has it -> what the adapter has for it."""
    parts: dict[str, dict[str, str]] = {}
    for key in keys:
        if any(copy in key for copy in UNREAD_COPIES):
            continue
        path = key.removeprefix(prefix)
        ending = next((ending for ending in PARTS if path.endswith(ending)), None)
        if ending is None:
            parts.setdefault(path, {})["whole"] = key
        else:
            parameter, part = PARTS[ending]
            parts.setdefault(f"{path.removesuffix(ending)}.{parameter}", {})[part] = key
    return {parameter: AdapterTensors(**named) for parameter, named in parts.items()}


class PatchBuilder:
    """Makes the patches of one adapter, checking names, shapes and ranks."""

    def __init__(self, expert: str, config: AdapterConfig, adapter: Mapping[str, StoredTensor]):
        self._expert = expert
        self._config = config
        self._adapter = adapter

    def patch(self, name: str, tensors: AdapterTensors, shape: tuple[int, ...]) -> Patch:
        """The patch of one parameter.

        Args:
            name: the parameter's, as the adapter has it.
            tensors: what the adapter has for it.
            shape: the base's, as rows (O, I) or (O,).
        """
        module = name.rpartition(".")[0]
        if tensors.whole and not (tensors.down or tensors.embedding_down):
            self._refuse_mixture(tensors, {"whole"}, name)
            return Patch(tensors)
        if tensors.shift:
            self._refuse_mixture(tensors, {"shift"}, name)
            self._check_shape(tensors.shift, shape)
            return Patch(tensors, scaling=self._config.scaling_of(module))
        if tensors.tokens:
            self._refuse_mixture(tensors, {"tokens"}, name)
            return Patch(tensors, token_ids=self._token_ids(module, tensors.tokens, shape))
        # An embedding that is saved whole may have another size than the base's.
        self._check_low_rank(module, tensors, self._adapter[tensors.whole].shape if tensors.whole else shape)
        return Patch(tensors, scaling=self._config.scaling_of(module))

    def _check_low_rank(self, module: str, tensors: AdapterTensors, shape: tuple[int, ...]) -> None:
        """ValueError unless these are both factors of a matrix of this shape, of the rank and kind in the config."""
        embedding = tensors.embedding_up is not None or tensors.embedding_down is not None
        names = ("embedding_up", "embedding_down") if embedding else ("up", "down")
        self._refuse_mixture(tensors, {"whole", "magnitude", *names}, module)
        up, down = (getattr(tensors, name) for name in names)
        if up is None or down is None:
            there = ", ".join(tensors.present().values())
            raise ValueError(f"{self._expert}: the adapter of {module} is incomplete, it has only {there}")
        if (tensors.magnitude is not None) != self._config.use_dora:
            has = "has a" if tensors.magnitude else "has no"
            raise ValueError(
                f"{self._expert}: the adapter of {module} {has} lora_magnitude_vector, "
                f"but its config says use_dora {self._config.use_dora}"
            )
        if embedding and self._config.use_dora:
            raise ValueError(
                f"{self._expert}: DoRA of the embedding {module} is not supported: its norms are not of single rows"
            )
        if len(shape) != 2:
            raise ValueError(f"{self._expert}: {module} is no matrix, its shape is {list(shape)}")
        rank = self._config.rank_of(module)
        for key, expected in ((up, (shape[0], rank)), (down, (rank, shape[1]))):
            self._check_shape(key, expected[::-1] if embedding else expected)
        if tensors.magnitude:
            self._check_shape(tensors.magnitude, shape[:1])

    def _token_ids(self, module: str, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        ids = self._config.tokens_of(module)
        if not ids or not all(isinstance(number, int) and 0 <= number < shape[0] for number in ids):
            raise ValueError(
                f"{self._expert}: trainable_token_indices of {module} must be from 0 to {shape[0] - 1}, got {ids}"
            )
        self._check_shape(key, (len(ids), *shape[1:]))
        return tuple(ids)

    def _check_shape(self, key: str, shape: tuple[int, ...]) -> None:
        if self._adapter[key].shape != tuple(shape):
            raise ValueError(
                f"{self._expert}: {key} has shape {list(self._adapter[key].shape)}, expected {list(shape)} "
                "by the base and adapter_config.json"
            )

    def _refuse_mixture(self, tensors: AdapterTensors, known: set[str], place: str) -> None:
        unknown = sorted(key for part, key in tensors.present().items() if part not in known)
        if unknown:
            raise ValueError(
                f"{self._expert}: {unknown[0]} cannot be combined with what else the adapter has for {place}"
            )
