"""The plan of a conversion: everything that configs and safetensors headers can tell, checked before data is read.

`make_plan` finds the checkpoints (folders or Hub repositories), compares every expert's config and tensors with the
base's, and knows the sizes. Errors name the expert, the field or tensor, and both values.
"""

import copy
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from conversion.checkpoints.architecture import base_architecture, make_reader, parameter_shapes, vocabulary_paths
from conversion.checkpoints.configs import BASE, adapted_config, compare_configs, load_config
from conversion.checkpoints.lora_reader import LoraReader, adapter_reader
from conversion.io.foreign_files import foreign
from conversion.io.row_reader import ExpertReader
from conversion.io.sources import Source, find_source, with_weights
from conversion.io.staged_folder import check_target
from conversion.merging.recipe import Recipe
from conversion.vocabulary.merged_vocabulary import MergedVocabulary, inverse, merge_vocabularies
from conversion.vocabulary.own_vocabulary import read_vocabulary
from conversion.vocabulary.vocabulary_reader import VocabularyReader
from modeling_channel_merged import ChannelMergedConfig, ChannelMergedForCausalLM
from modeling_channel_merged.channel_merged_layers import ModuleMap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A checked conversion: nothing but its data is unknown."""

    recipe: Recipe  # resolved
    base: Source
    experts: tuple[Source, ...]
    text_config: PreTrainedConfig
    modules: ModuleMap
    shapes: dict[str, tuple[int, ...]]  # parameter name -> shape in the base architecture
    readers: tuple[ExpertReader | LoraReader, ...]  # one per expert
    base_reader: ExpertReader
    dtype: torch.dtype  # of the output
    vocabulary: MergedVocabulary
    vocabulary_paths: tuple[str, ...]  # the embedding and the head: modules whose channels are tokens

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def expert_names(self) -> list[str]:
        return [expert.name for expert in self.experts]

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts as separate models, each with its own vocabulary."""
        untied = [self.modules.channel[path] for path in self.vocabulary_paths]
        token_size = sum(module.in_features + module.bias for module in untied if module.tied_to is None)
        return self.num_experts * self._num_parameters() - sum(self.vocabulary.missing) * token_size

    @property
    def per_expert_parameters(self) -> int:
        """Parameters of one expert that have no channels and are kept per expert."""
        names = [f"{path}.{name}" for path, names in self.modules.per_expert.items() for name in names]
        return sum(self._numel(name) for name in names)

    @property
    def max_bytes(self) -> int:
        """Upper bound of the output's size: no two experts agree and no row is merged."""
        groups = min(self.num_experts, self.recipe.grouping.num_groups)
        channels = sum(module.out_features for module in self.modules.channel.values())
        merged = self._num_parameters() - self.per_expert_parameters
        parameters = groups * merged + self.num_experts * self.per_expert_parameters
        return parameters * self.dtype.itemsize + self.num_experts * channels * 4

    @property
    def bytes_to_read(self) -> int:
        """Bytes of the base and of all experts, tied heads left out."""
        heads = {f"{path}.weight" for path, module in self.modules.channel.items() if module.tied_to}
        readers = (self.base_reader, *self.readers)
        return sum(part.num_bytes for reader in readers for name, part in reader.tensors.items() if name not in heads)

    def present(self, path: str) -> torch.Tensor | None:
        """Which experts have which channels of a module: (N, O) bool; None where all have all."""
        if path not in self.vocabulary_paths or self.vocabulary.present.all():
            return None
        return self.vocabulary.present

    def _num_parameters(self) -> int:
        tied = {f"{path}.weight" for path, module in self.modules.channel.items() if module.tied_to}
        return sum(self._numel(name) for name in self.shapes if name not in tied)

    def _numel(self, name: str) -> int:
        return math.prod(self.shapes[name])


def make_plan(recipe: Recipe, out: Path | str | None = None, *, overwrite: bool = False) -> Plan:
    """Find and check everything a conversion needs. Downloads Hub checkpoints, reads configs and headers only.

    Args:
        recipe: the recipe, resolved or not.
        out: the folder to write; None: only look.
        overwrite: `out` may hold a model, which will be replaced.

    Raises:
        ValueError: the checkpoints do not fit each other or this program, or the output may not be written there.
    """
    recipe = recipe.resolved()
    if out is not None:
        check_target(Path(out), overwrite)
    models = [(BASE, recipe.base_model), *((expert.name, expert.model) for expert in recipe.experts)]
    base, *experts = (find_source(name, model, recipe.folder) for name, model in models)
    if out is not None:
        _check_not_a_source(Path(out), (base, *experts))
    text_config = load_config(base)
    experts = [with_weights(expert) if expert.is_adapter else expert for expert in experts]
    configs = [adapted_config(expert, text_config) if expert.is_adapter else load_config(expert) for expert in experts]
    for expert, config in zip(experts, configs, strict=True):
        compare_configs(text_config, config, expert.name)
    vocabulary = plan_vocabulary(recipe.tokenizer_source, base, text_config, experts, configs)
    text_config = with_vocabulary(text_config, vocabulary)
    with foreign(f"{base.name}: the config of {base.model}"):
        inner, modules = base_architecture(text_config)
        check_merged_class(text_config, [expert.name for expert in experts])
    shapes = parameter_shapes(inner, modules)
    base, *experts = (with_weights(source) for source in (base, *experts))
    base_shapes, *own = (own_shapes(shapes, inner, vocabulary, number) for number in range(-1, len(experts)))
    base_reader = make_reader(base, inner, modules, base_shapes)
    readers = [
        adapter_reader(expert, base, base_reader, inner, modules, expert_shapes)
        if expert.is_adapter
        else make_reader(expert, inner, modules, expert_shapes)
        for expert, expert_shapes in zip(experts, own, strict=True)
    ]
    dtype = output_dtype(recipe, [base_reader, *readers])
    base_reader, *readers = by_merged_channels([base_reader, *readers], inner, vocabulary)
    return Plan(
        recipe=recipe.with_dtype(str(dtype).removeprefix("torch.")),
        base=base,
        experts=tuple(experts),
        text_config=text_config,
        modules=modules,
        shapes=shapes,
        readers=tuple(readers),
        base_reader=base_reader,
        dtype=dtype,
        vocabulary=vocabulary,
        vocabulary_paths=vocabulary_paths(inner),
    )


def plan_vocabulary(
    tokenizer_source: str,
    base: Source,
    base_config: PreTrainedConfig,
    experts: list[Source],
    configs: list[PreTrainedConfig],
) -> MergedVocabulary:
    """The merged vocabulary of a base and its experts, from their tokenizers and configs."""
    own = read_vocabulary(base.name, base.folder, base_config, base_config.vocab_size)
    return merge_vocabularies(
        tokenizer_source,
        own,
        [
            read_vocabulary(
                expert.name, expert.folder, config, config.vocab_size, base=own if expert.is_adapter else None
            )
            for expert, config in zip(experts, configs, strict=True)
        ],
    )


def with_vocabulary(base_config: PreTrainedConfig, vocabulary: MergedVocabulary) -> PreTrainedConfig:
    """The base's config with the merged vocabulary's size and the places of its special tokens there."""
    config = copy.deepcopy(base_config)
    for key, value in vocabulary.base.special_ids.items():
        setattr(config, key, vocabulary.base_channel(value))
    config.vocab_size = vocabulary.size
    return config


def own_shapes(
    shapes: dict[str, tuple[int, ...]], inner: torch.nn.Module, vocabulary: MergedVocabulary, expert: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of one expert's parameters (-1: the base's), with its own vocabulary."""
    size = (vocabulary.base if expert < 0 else vocabulary.experts[expert]).size
    paths = vocabulary_paths(inner)
    return {name: (size, *shape[1:]) if name.rpartition(".")[0] in paths else shape for name, shape in shapes.items()}


def by_merged_channels(
    readers: list[ExpertReader], inner: torch.nn.Module, vocabulary: MergedVocabulary
) -> list[ExpertReader | VocabularyReader]:
    """The base's reader and the experts', their embeddings and heads read by the merged vocabulary's channels."""
    if vocabulary.is_identity:
        return readers
    parameters = [f"{path}.{name}" for path in vocabulary_paths(inner) for name in ("weight", "bias")]
    channels = (vocabulary.base_channels, *vocabulary.channels)
    own_ids = [inverse(numbers, vocabulary.size) for numbers in channels]
    base, *experts = readers
    return [
        VocabularyReader(base, parameters, own_ids[0], vocabulary.base.token_ids),
        *(VocabularyReader(reader, parameters, own) for reader, own in zip(experts, own_ids[1:], strict=True)),
    ]


def check_merged_class(text_config: PreTrainedConfig, expert_names: list[str]) -> None:
    """ValueError where the merged model could not be built from what a conversion would write."""
    config = ChannelMergedConfig(text_config=text_config.to_dict(), expert_names=expert_names)
    with torch.device("meta"):
        ChannelMergedForCausalLM(config)


def output_dtype(recipe: Recipe, readers: list[ExpertReader]) -> torch.dtype:
    """The recipe's dtype, else the narrowest that holds every checkpoint exactly."""
    if recipe.dtype is not None:
        return getattr(torch, recipe.dtype)
    dtypes = {tensor.dtype for reader in readers for tensor in reader.tensors.values()}
    dtype = dtypes.pop()
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _check_not_a_source(out: Path, sources: tuple[Source, ...]) -> None:
    """The output must not replace a checkpoint that is read, nor a folder around it."""
    for source in sources:
        folder = source.folder.resolve()
        if out.resolve() == folder or out.resolve() in folder.parents:
            raise ValueError(f"the output folder {out} holds the checkpoint of {source.name} ({source.model})")
