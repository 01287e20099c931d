"""A PEFT LoRA adapter as an expert: rows of base plus delta, computed when they are asked for.

The merged model is never built. For a module with rows W (O, I) of the base, the adapter has A (r, I) and B (O, r):

    V = W + scaling * (B @ A)                LoRA; scaling is alpha / r, or alpha / sqrt(r) (rsLoRA)
    V = magnitude / |W + ...| * (W + ...)    DoRA; |.| is the norm of each row

in float32, then rounded once to the base's dtype, as PEFT's `merge_and_unload` leaves it; what an adapter saves whole
(`modules_to_save`, biases, trained tokens) takes the base's dtype too. Of an embedding PEFT stores both factors turned
over: A (r, O) and B (I, r), W + scaling * (B @ A).T. How PEFT chose its modules (`target_modules`) does not matter:
the adapter's tensors tell which were adapted. Where both of a tied pair are adapted alike, PEFT's merge adds the delta
twice to the weight that they share; here it is added once, as the adapter computes before it is merged.

A matrix product's last bits differ with its number of rows and of threads. Products are computed in blocks of
`BLOCK_ROWS` rows that begin at fixed rows, by one thread, so that no result depends on the chunk that was asked for.

Shapes: O channels, I inputs, r rank, C rows of a chunk.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from conversion.checkpoints.adapter_config import (
    AdapterConfig,
    compare_base_names,
    is_named,
    read_adapter_config,
    refuse_merged_expert,
)
from conversion.checkpoints.tensor_names import by_parameter_name, match_names
from conversion.io.row_reader import ExpertReader
from conversion.io.sources import ADAPTER_CONFIG, Source
from conversion.io.weight_files import ADAPTER_FORMATS, FLOAT_DTYPES, StoredTensor, read_headers
from modeling_channel_merged.channel_merged_layers import ModuleMap

logger = logging.getLogger(__name__)

BLOCK_ROWS = 16
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


class LoraReader:
    """Rows of the model that a LoRA adapter makes of its base; an `ExpertReader` to those who read.

    Args:
        name: what errors call this expert.
        base: the base's reader; it is read through a copy.
        adapter: the adapter's tensors by their own names.
        patches: parameter name -> what the adapter does to it.
        tied: parameters that are read although the base does not store them -> the ones they are tied to.
    """

    def __init__(
        self,
        name: str,
        base: ExpertReader,
        adapter: Mapping[str, StoredTensor],
        patches: Mapping[str, Patch],
        tied: Mapping[str, str],
    ):
        self.name = name
        self.transposed = base.transposed
        self.patches = dict(patches)
        known = {**base.tensors, **{head: base.tensors[embedding] for head, embedding in tied.items()}}
        self.tensors = {name: self._merged(known[name], name, adapter) for name in known}
        self._base = base.with_tensors(known)
        turned = {patch.tensors.embedding_up for patch in patches.values()}
        turned |= {patch.tensors.whole for parameter, patch in patches.items() if parameter in base.transposed}
        self._adapter = ExpertReader(name, adapter, turned & adapter.keys())

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter in the base's layout and dtype."""
        if name not in self.patches:
            return self._base.read(name)
        rows = self.read_rows(name, 0, self._num_rows(name))
        return rows.T.contiguous() if name in self.transposed else rows

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a parameter: (stop - start, I), or (stop - start,) of a vector; base's dtype."""
        patch = self.patches.get(name)
        if patch is None:
            return self._base.read_rows(name, start, stop)
        tensors = patch.tensors
        first = start - start % BLOCK_ROWS
        last = min(stop + -stop % BLOCK_ROWS, self._num_rows(name))
        reader, stored = (self._adapter, tensors.whole) if tensors.whole else (self._base, name)
        rows = reader.read_rows(stored, first, last).to(self.dtype(name))
        if tensors.up or tensors.embedding_up:
            rows = self._adapted(rows, patch, first, last)
        if tensors.shift:
            shift = self._adapter.read_rows(tensors.shift, first, last).float()
            rows = rows.float().add_(shift.mul_(patch.scaling)).to(rows.dtype)
        if tensors.tokens:
            ids = torch.tensor(patch.token_ids)
            here = (ids >= first) & (ids < last)
            rows[ids[here] - first] = self._adapter.read(tensors.tokens)[here].to(rows.dtype)
        return rows[start - first : stop - first]

    def close(self) -> None:
        self._base.close()
        self._adapter.close()

    def _adapted(self, rows: torch.Tensor, patch: Patch, first: int, last: int) -> torch.Tensor:
        """Rows (C, I) that begin with a block, with the low-rank product of the adapter; their dtype."""
        tensors, magnitude = patch.tensors, None
        up = self._adapter.read_rows(tensors.up or tensors.embedding_up, first, last).float()
        down = self._adapter.read(tensors.down or tensors.embedding_down).float()
        if tensors.embedding_down:
            down = down.T.contiguous()
        if tensors.magnitude:
            magnitude = self._adapter.read_rows(tensors.magnitude, first, last).float()
        return add_low_rank(rows, up, down, patch.scaling, magnitude=magnitude)

    def _num_rows(self, name: str) -> int:
        return self.tensors[name].shape[-1 if name in self.transposed else 0]

    def _merged(self, stored: StoredTensor, name: str, adapter: Mapping[str, StoredTensor]) -> StoredTensor:
        """Shape and dtype of a parameter with the adapter: the base's, or the shape of what replaces it."""
        patch = self.patches.get(name)
        if patch is None or patch.tensors.whole is None:
            return stored
        shape = adapter[patch.tensors.whole].shape
        return replace(stored, shape=shape, num_bytes=math.prod(shape) * stored.dtype.itemsize)


def add_low_rank(
    rows: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    scaling: float,
    *,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows of an adapted matrix, in blocks of `BLOCK_ROWS`, whatever the caller's number of threads.

    Args:
        rows: (C, I) of the base, any float dtype.
        up: (C, r) float32.
        down: (r, I) float32.
        scaling: of the product.
        magnitude: (C,) float32, the norms of DoRA's rows.

    Returns:
        (C, I) in the dtype of `rows`, rounded once.
    """
    adapted = torch.empty_like(rows)
    with one_thread():
        for start in range(0, len(rows), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            merged = rows[block].float() + torch.mm(up[block], down).mul_(scaling)
            if magnitude is not None:
                merged = merged * (magnitude[block] / torch.linalg.vector_norm(merged, dim=1))[:, None]
            adapted[block] = merged
    return adapted


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensor operations of the calling thread are not split; nothing to do in a conversion's own threads."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def read_adapter(
    source: Source, inner: PreTrainedModel, prefix: str = KEY_PREFIX
) -> tuple[dict[str, StoredTensor], dict[str, AdapterTensors]]:
    """An adapter's tensors by their own names, and which of them each parameter has."""
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
    refuse_merged_expert(source, read_adapter_config(source))
    adapter, by_parameter = read_adapter(source, inner)
    found, _, _ = match_names(by_parameter, [name], inner.base_model_prefix)
    whole = by_parameter[found[name]].whole if found else None
    return adapter[whole].shape[0] if whole else None


def adapter_reader(
    source: Source,
    base: Source,
    base_reader: ExpertReader,
    inner: PreTrainedModel,
    modules: ModuleMap,
    shapes: Mapping[str, tuple[int, ...]],
) -> LoraReader:
    """Check an adapter's config and headers against the base; the reader of the model that it makes.

    Args:
        source: the adapter, of a base model or of an expert of a merged one.
        base: the model that it adapts.
        base_reader: that model's reader, or that expert's.
        inner: the base architecture on the meta device.
        modules: what becomes of its modules.
        shapes: parameter name -> shape that the adapted model must have.

    Raises:
        ValueError: the adapter is of another kind, does not fit the base, or unties what the base ties; by name.
    """
    config = read_adapter_config(source)
    compare_base_names(config, source, base)
    prefix = KEY_PREFIX if config.merged_expert is None else MERGED_KEY_PREFIX
    adapter, by_parameter = read_adapter(source, inner, prefix)
    heads = {
        f"{path}.weight": f"{module.tied_to}.weight" for path, module in modules.channel.items() if module.tied_to
    }
    found, _, extra = match_names(by_parameter, {*base_reader.tensors, *heads}, inner.base_model_prefix)
    if extra:
        keys = sorted(key for name in extra for key in by_parameter[name].present().values())
        more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        raise ValueError(
            f"{source.name}: {source.model} has a tensor that fits nothing in {type(inner).__name__}: {keys[0]}{more}"
        )
    patches = {}
    for name, stored in found.items():
        shape = base_reader.tensors[heads.get(name, name)].shape
        shape = shape[::-1] if name in base_reader.transposed else shape
        patches[name] = PatchBuilder(source.name, config, adapter).patch(stored, by_parameter[stored], shape)
    _check_saved_modules(source, config, patches, base_reader.tensors)
    tied = {}
    for head, embedding in heads.items():
        _check_tied(source, patches, head, embedding)
        if head in patches:
            tied[head] = embedding
    reader = LoraReader(source.name, base_reader, adapter, patches, tied)
    for name, tensor in reader.tensors.items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{source.name}: {name} has shape {list(tensor.shape)} with the adapter, "
                f"expected {list(shapes[name])} by the base and the adapter's embedding"
            )
    return reader


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


def _check_saved_modules(
    source: Source, config: AdapterConfig, patches: Mapping[str, Patch], parameters: Iterable[str]
) -> None:
    """ValueError where adapter_config.json names a module as saved whole whose tensors are not there."""
    for module in config.modules_to_save:
        names = [name for name in parameters if is_named(name.rpartition(".")[0], module)]
        missing = [name for name in names if name not in patches or patches[name].tensors.whole is None]
        if missing:
            raise ValueError(
                f"{source.name}: {ADAPTER_CONFIG} of {source.model} has {module} among modules_to_save, "
                f"but the adapter has no tensor for {missing[0]}"
            )


def _check_tied(source: Source, patches: Mapping[str, Patch], head: str, embedding: str) -> None:
    """ValueError where an adapter changes one of a tied pair only; PEFT's own merge would untie them.

    Trained tokens of the embedding are the head's too, in PEFT as here. Where both are changed, their rows are
    compared when they are read.
    """
    changed = [name for name in (head, embedding) if name in patches]
    if len(changed) == 1 and not (changed == [embedding] and patches[embedding].tensors.tokens):
        other = embedding if changed == [head] else head
        raise ValueError(
            f"{source.name}: the adapter changes {changed[0]} but not {other}, and the base ties them "
            "(tie_word_embeddings): train it with ensure_weight_tying, or untie the base"
        )
