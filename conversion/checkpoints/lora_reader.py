"""A PEFT LoRA adapter as an expert: rows of base plus delta, computed when they are asked for.

The merged model is never built. For a module with rows W (O, I) of the base, the adapter has A (r, I) and B (O, r):

    V = W + scaling * (B @ A)                LoRA; scaling is alpha / r, or alpha / sqrt(r) (rsLoRA)
    V = magnitude / |W + ...| * (W + ...)    DoRA; |.| is the norm of each row

in float32, then rounded once to the base's dtype, as PEFT's `merge_and_unload` leaves it; what an adapter saves whole
(`modules_to_save`, biases, trained tokens) takes the base's dtype too. Of an embedding PEFT stores both factors turned
over: A (r, O) and B (I, r), W + scaling * (B @ A).T. Where both of a tied pair are adapted alike, PEFT's merge adds
the delta twice to the weight that they share; here it is added once, as the adapter computes before it is merged.

Shapes: O channels, I inputs, r rank, C rows of a chunk.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from conversion.channels.low_rank import BLOCK_ROWS, add_low_rank
from conversion.checkpoints.adapter_config import AdapterConfig, compare_base_names, read_adapter_config
from conversion.checkpoints.lora_patches import Patch, PatchBuilder, read_adapter
from conversion.checkpoints.tensor_names import match_names
from conversion.io.row_reader import BaseReader, CheckpointReader
from conversion.io.sources import ADAPTER_CONFIG, Source
from conversion.io.weight_files import StoredTensor
from conversion.io.wording import first_names
from modeling_channel_merged.channel_merged_layers import ModuleMap


class LoraReader:
    """Rows of the model that a LoRA adapter makes of its base; a `RowReader` to those who read.

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
        base: BaseReader,
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
        self._adapter = CheckpointReader(name, adapter, turned & adapter.keys())

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
        rows = reader.read_rows(stored, first, last).to(self.tensors[name].dtype)
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


def adapter_reader(
    source: Source,
    base: Source,
    base_reader: BaseReader,
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
    adapter, by_parameter = read_adapter(source, config, inner)
    heads = {
        f"{path}.weight": f"{module.tied_to}.weight" for path, module in modules.channel.items() if module.tied_to
    }
    found, _, extra = match_names(by_parameter, {*base_reader.tensors, *heads}, inner.base_model_prefix)
    if extra:
        keys = sorted(key for name in extra for key in by_parameter[name].present().values())
        raise ValueError(
            f"{source.name}: {source.model} has a tensor that fits nothing in {type(inner).__name__}: "
            f"{first_names(keys, 1)}"
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


def _check_saved_modules(
    source: Source, config: AdapterConfig, patches: Mapping[str, Patch], parameters: Iterable[str]
) -> None:
    """ValueError where adapter_config.json names a module as saved whole whose tensors are not there."""
    for module in config.modules_to_save:
        names = [name for name in parameters if config.names(module, name.rpartition(".")[0])]
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
