"""A channel-merged checkpoint read from its files alone: config, tensor headers and channel indices, all checked.

Shapes: N experts, O channels, I inputs, R rows.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from conversion.checkpoints.architecture import base_architecture
from conversion.checkpoints.checkpoint_place import read_plain_config, refuse_adapter
from conversion.io.foreign_files import foreign
from conversion.io.model_files import check_file_name, drop_code_references
from conversion.io.row_reader import CheckpointReader
from conversion.io.sources import Source, find_source, with_weights
from conversion.io.weight_files import FLOAT_DTYPES, read_headers
from conversion.io.wording import first_names
from modeling_channel_merged.configuration_channel_merged import AUTO_MAP, FORMAT_VERSION, ChannelMergedConfig
from modeling_channel_merged.expert_router import make_router
from modeling_channel_merged.stored_tensors import check_index_values, may_miss_tokens

ROUTER_TENSORS = ("router.head.weight", "router.head.bias")
TRAINED_ROUTER_TENSORS = ("router.ngrams.weight", "router.plain_tokens")


def read_merged_config(folder: Path) -> ChannelMergedConfig:
    """The config of a channel-merged checkpoint; ValueError where the folder holds something else."""
    file = folder / "config.json"
    version = read_plain_config(folder).get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(f"{file}: format_version is {version!r}, expected 1 to {FORMAT_VERSION}")
    with foreign(str(file)):
        config = ChannelMergedConfig.from_pretrained(folder)
    for name in config.expert_names:
        check_file_name(name, f"{file}: expert name")
    drop_code_references(config.text_config)
    drop_code_references(config)
    config.auto_map = dict(AUTO_MAP)
    return config


def find_checkpoint(checkpoint: str | Path) -> Source:
    """A checkpoint given as a folder or as a Hub id (with an optional @revision), fetched if need be."""
    source = find_source("checkpoint", str(checkpoint), Path())
    refuse_adapter(source)
    return with_weights(source)


def whole_checkpoint(checkpoint: str | Path) -> tuple[Source, ChannelMergedConfig]:
    """A checkpoint, a folder or a Hub id, whose headers and channel indices were all checked, and its config."""
    with MergedCheckpoint(checkpoint) as merged:
        merged.check_channel_indices()
        return merged.source, merged.config


class MergedCheckpoint:
    """The files of one channel-merged checkpoint, found or to be found; reads a tensor only when asked for it.

    `base_model` is the base architecture on the meta device.

    Raises:
        ValueError: config, tensor names or row counts do not make a channel-merged checkpoint.
    """

    def __init__(self, checkpoint: str | Path | Source):
        self.source = checkpoint if isinstance(checkpoint, Source) else find_checkpoint(checkpoint)
        self.folder = self.source.folder
        self.config = read_merged_config(self.folder)
        self._check_not_quantized()
        with foreign(f"{self.folder / 'config.json'}"):
            self.base_model, self.modules = base_architecture(self.config.text_config)
        self.tensors = read_headers(self.folder)
        self.reader = CheckpointReader(str(self.folder), self.tensors)
        self._check_names()
        for path in self.modules.channel:
            self._check_rows(path)
        self._check_copies()

    def __enter__(self) -> "MergedCheckpoint":
        return self

    def __exit__(self, *exception) -> None:
        self.reader.close()

    def tensor_names(self) -> Iterator[str]:
        """Names of all tensors that a checkpoint of this config stores."""
        for path, module in self.modules.channel.items():
            yield f"model.{path}.channel_index"
            if module.tied_to is None:
                yield f"model.{path}.rows.weight"
            if module.bias:
                yield f"model.{path}.rows.bias"
        for path, parameters in self.modules.per_expert.items():
            for expert in range(self.config.num_experts):
                yield from (f"model.{path}.experts.{expert}.{parameter}" for parameter in parameters)
        yield from self.router_names()

    def router_names(self) -> Iterator[str]:
        """Names of the router's tensors."""
        yield from ROUTER_TENSORS
        # An untrained router leaves them out: missing ones are zeros.
        yield from (name for name in TRAINED_ROUTER_TENSORS if name in self.tensors)

    def rows_name(self, path: str) -> str:
        """Name of the tensor with the rows of a channel module; for a tied head it is the embedding's."""
        return f"model.{self.modules.channel[path].tied_to or path}.rows.weight"

    def num_rows(self, path: str) -> int:
        """R of a channel module."""
        return self.tensors[self.rows_name(path)].shape[0]

    def channel_index(self, path: str) -> torch.Tensor:
        """Rows that the channels of a module read: int32 (N, O), -1 where an expert has no such channel (token).

        Raises:
            ValueError: an entry names no stored row.
        """
        index = self.reader.read(f"model.{path}.channel_index")
        is_head = self._module(path) is self.base_model.get_output_embeddings()
        try:
            check_index_values(path, index, self.num_rows(path), may_miss_tokens(self.config) if is_head else None)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from None
        return index

    def has_token(self, expert: int) -> torch.Tensor:
        """Whether an expert has each token of the merged vocabulary: bool (vocab_size,)."""
        head = next(
            path for path in self.modules.channel if self._module(path) is self.base_model.get_output_embeddings()
        )
        return self.channel_index(head)[expert] >= 0

    def is_vocabulary(self, path: str) -> bool:
        """Whether the channels of a module are tokens."""
        return self._module(path) in (self.base_model.get_input_embeddings(), self.base_model.get_output_embeddings())

    def check_channel_indices(self) -> None:
        """ValueError if any module's channel_index names a row that is not stored."""
        for path in self.modules.channel:
            self.channel_index(path)

    def _module(self, path: str) -> torch.nn.Module:
        return self.base_model.get_submodule(path)

    def _check_not_quantized(self) -> None:
        quantization = getattr(self.config, "quantization_config", None)
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise ValueError(
                f"{self.folder} is quantized ({method or 'unknown method'}), expected rows in floats: give the "
                "checkpoint that it was made from, or load it with AutoModelForCausalLM.from_pretrained"
            )

    def _check_names(self) -> None:
        if unknown := sorted(self.config.rows.keys() - self.modules.channel.keys()):
            raise ValueError(
                f"{self.folder}: rows of config.json names no module of the model: {first_names(unknown, 3)}"
            )
        expected = set(self.tensor_names())
        for path in self.modules.channel:
            if f"model.{path}.channel_index" not in self.tensors:
                raise ValueError(f"{self.folder}: {path} has no channel_index; the checkpoint is damaged")
        if missing := sorted(expected - self.tensors.keys()):
            raise ValueError(f"{self.folder} lacks {first_names(missing, 3)}; the checkpoint is damaged")
        if unknown := sorted(self.tensors.keys() - expected):
            raise ValueError(
                f"{self.folder} holds tensors that its config.json does not explain: {first_names(unknown, 3)}"
            )

    def _check_rows(self, path: str) -> None:
        module = self.modules.channel[path]
        num_rows = self.config.rows.get(module.tied_to or path, module.out_features)
        expected = {
            self.rows_name(path): ((num_rows, module.in_features), FLOAT_DTYPES),
            f"model.{path}.channel_index": ((self.config.num_experts, module.out_features), ("I32",)),
        }
        if module.bias:
            expected[f"model.{path}.rows.bias"] = ((num_rows,), FLOAT_DTYPES)
        for name, (shape, dtypes) in expected.items():
            self._check_tensor(name, shape, dtypes)

    def _check_copies(self) -> None:
        """The experts' copies of what has no channels, and the router."""
        for path, parameters in self.modules.per_expert.items():
            for parameter in parameters:
                shape = self.base_model.get_parameter(f"{path}.{parameter}").shape
                for expert in range(self.config.num_experts):
                    self._check_tensor(f"model.{path}.experts.{expert}.{parameter}", shape)
        config = self.config
        with torch.device("meta"):
            router = make_router(config)
        expected = {f"router.{name}": tensor for name, tensor in router.state_dict().items()}
        for name in self.router_names():
            if name not in expected:
                raise ValueError(f"{self.folder} holds {name}, which a router of {config.router['features']} has not")
            self._check_tensor(
                name, expected[name].shape, FLOAT_DTYPES if expected[name].is_floating_point() else ("I32",)
            )

    def _check_tensor(self, name: str, shape: Iterable[int], dtypes: Iterable[str] = FLOAT_DTYPES) -> None:
        stored, shape = self.tensors[name], tuple(shape)
        if stored.shape != shape or stored.dtype_name not in dtypes:
            raise ValueError(
                f"{self.folder}: {name} is {stored.dtype_name} {list(stored.shape)}, expected "
                f"{' or '.join(dtypes)} {list(shape)} by config.json"
            )


def stored_name(path: str, parameter: str) -> str:
    """What a merged checkpoint calls the rows of one of a module's parameters."""
    return f"model.{path}.rows.{parameter.removeprefix(f'{path}.')}"
