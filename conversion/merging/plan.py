"""The plan of a conversion: everything that configs and safetensors headers can tell, checked before data is read.

`make_plan` locates the checkpoints (folders or Hub repositories), checks their configs and vocabularies against the
base's, and opens their weights, whose headers it checks too: nothing large is fetched before all configs agree. Errors
name the expert, the field or tensor, and both values.
"""

import copy
import logging
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from conversion.channels.grouping import MAX_ENUMERATED
from conversion.checkpoints.architecture import (
    base_architecture,
    make_reader,
    parameter_shapes,
    vocabulary_paths,
    with_rows,
)
from conversion.checkpoints.configs import adapted_config, compare_configs, load_config
from conversion.checkpoints.lora_reader import adapter_reader
from conversion.io.foreign_files import foreign
from conversion.io.row_reader import RowReader
from conversion.io.sources import Source, with_weights
from conversion.io.weight_files import dtype_text
from conversion.merging.places import locate
from conversion.merging.recipe import Recipe
from conversion.vocabulary.merged_vocabulary import MergedVocabulary, merge_vocabularies
from conversion.vocabulary.own_vocabulary import read_vocabulary
from conversion.vocabulary.vocabulary_reader import VocabularyReader, by_channels
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
    readers: tuple[RowReader, ...]  # one per expert
    base_reader: RowReader
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
    def budget_parameters(self) -> int | None:
        """The most parameters that may be stored; None without a budget."""
        budget = self.recipe.grouping.budget
        # As it was written: 0.29 of 100 is 29, which a product of floats misses.
        return None if budget is None else math.floor(Fraction(str(budget)) * self.expert_parameters)

    @property
    def fixed_parameters(self) -> int:
        """Stored parameters that are no channels' rows: those kept per expert, an embedding's fallback row."""
        fallbacks = sum(self.row_size(path) for path in self.own_modules if self.has_fallback(path))
        return self.num_experts * self.per_expert_parameters + fallbacks

    @property
    def least_parameters(self) -> int:
        """The fewest parameters that may be stored, if all rows differ."""
        return self.fixed_parameters + sum(self.least_rows(path) * self.row_size(path) for path in self.own_modules)

    @property
    def max_bytes(self) -> int:
        """Upper bound of the output's size: no two experts agree, and of a budget nothing is left."""
        channels = sum(module.out_features for module in self.modules.channel.values())
        rows = sum(self.most_rows(path) * self.row_size(path) for path in self.own_modules)
        parameters = rows + self.fixed_parameters
        if self.budget_parameters is not None:
            parameters = min(parameters, self.budget_parameters)
        return parameters * self.dtype.itemsize + self.num_experts * channels * 4

    @property
    def own_modules(self) -> list[str]:
        """Paths of the channel modules that store rows of their own."""
        return [path for path, module in self.modules.channel.items() if module.tied_to is None]

    def row_size(self, path: str) -> int:
        """Parameters of one row of a module, its bias included."""
        module = self.modules.channel[path]
        return module.in_features + module.bias

    def has_fallback(self, path: str) -> bool:
        """Whether a module stores one more row, which is read for tokens that an expert does not have."""
        return self.modules.channel[path].kind == "embedding" and self.present(path) is not None

    def row_bounds(self, path: str) -> tuple[int, int]:
        """The least and the most rows of a channel of a module, if so many differ."""
        grouping = self.recipe.grouping
        if grouping.budget is None:
            groups = min(self.num_experts, grouping.num_groups)
            return groups, groups
        least, most = 1, self.num_experts
        for bounds in grouping.bounds or ():
            if fnmatchcase(path, bounds.modules):
                least, most = bounds.min_rows, bounds.max_rows or self.num_experts
        return min(least, self.num_experts), min(most, self.num_experts)

    def least_rows(self, path: str) -> int:
        """The fewest rows of a module, if all rows differ."""
        return self._bounded_rows(path, self.row_bounds(path)[0])

    def most_rows(self, path: str) -> int:
        """The most rows of a module, if all rows differ."""
        return self._bounded_rows(path, self.row_bounds(path)[1])

    def _bounded_rows(self, path: str, bound: int) -> int:
        """Rows of a module with `bound` rows a channel, or as many as there are experts that have the channel."""
        present = self.present(path)
        if present is None:
            return bound * self.modules.channel[path].out_features
        return int(present.sum(0).clamp(max=bound).sum())

    @property
    def bytes_to_read(self) -> int:
        """Bytes of the base and of all experts, tied heads left out."""
        heads = {f"{path}.weight" for path, module in self.modules.channel.items() if module.tied_to}
        readers = (self.base_reader, *self.readers)
        return sum(part.num_bytes for reader in readers for name, part in reader.tensors.items() if name not in heads)

    @property
    def times_read(self) -> int:
        """How often that is read: to compare, to merge, and before that where a calibration weighs every group."""
        return 3 if self.recipe.calibration is not None and self.num_experts <= MAX_ENUMERATED else 2

    def present(self, path: str) -> torch.Tensor | None:
        """Which experts have which channels of a module: (N, O) bool; None where all have all."""
        if path not in self.vocabulary_paths or self.vocabulary.present.all():
            return None
        return self.vocabulary.present

    def fallback_row(self, name: str) -> torch.Tensor:
        """What stands for tokens that an expert does not have, the mean of the base's: (1, I); the base's dtype."""
        assert isinstance(self.base_reader, VocabularyReader), "all experts have all tokens"
        return self.base_reader.mean_row(name)

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
    base, *experts = locate(recipe, out, overwrite)
    return open_readers(recipe, check(recipe, base, experts))


@dataclass(frozen=True)
class Checked:
    """Checkpoints whose configs and vocabularies fit each other, and what will be made of them."""

    base: Source
    experts: tuple[Source, ...]
    text_config: PreTrainedConfig  # the base's, with the merged vocabulary
    inner: PreTrainedModel  # of that config, on the meta device
    modules: ModuleMap
    vocabulary: MergedVocabulary


def check(recipe: Recipe, base: Source, experts: list[Source]) -> Checked:
    """Compare all configs, merge the vocabularies, and see that the merged model can be built; reads small files."""
    base_config = load_config(base)
    base_inner = None
    if any(expert.is_adapter for expert in experts):
        with foreign("the base's config"):
            base_inner, _ = base_architecture(base_config)
    own = read_vocabulary(base.name, base.folder, base_config, base_config.vocab_size)
    vocabularies = []
    for expert in experts:
        config = adapted_config(expert, base_config, base_inner) if expert.is_adapter else load_config(expert)
        compare_configs(base_config, config, expert.name)
        base_vocabulary = own if expert.is_adapter else None
        vocabularies.append(
            read_vocabulary(expert.name, expert.folder, config, config.vocab_size, base=base_vocabulary)
        )
    vocabulary = merge_vocabularies(recipe.tokenizer_source, own, vocabularies)
    text_config = with_vocabulary(base_config, vocabulary)
    with foreign(f"{base.name}: the config of {base.model}"):
        inner, modules = base_architecture(text_config)
        check_merged_class(text_config, [expert.name for expert in experts])
    return Checked(base, tuple(experts), text_config, inner, modules, vocabulary)


def open_readers(recipe: Recipe, checked: Checked) -> Plan:
    """Fetch the weights, check their headers, and read them by the merged vocabulary's channels."""
    inner, modules, vocabulary = checked.inner, checked.modules, checked.vocabulary
    shapes, paths = parameter_shapes(inner, modules), vocabulary_paths(inner)
    base = with_weights(checked.base)
    own_base_reader = make_reader(base, inner, modules, with_rows(shapes, paths, vocabulary.base.size))
    base_channels, base_tokens = vocabulary.base_channels, vocabulary.base.token_ids
    base_reader = by_channels(own_base_reader, paths, vocabulary, base_channels, mean_of=base_tokens)
    experts, readers = [], []
    for expert, own, channels in zip(checked.experts, vocabulary.experts, vocabulary.channels, strict=True):
        own_shapes = with_rows(shapes, paths, own.size)
        if expert.is_adapter:
            reader = adapter_reader(expert, base, own_base_reader, inner, modules, own_shapes)
        else:
            expert = with_weights(expert)
            reader = make_reader(expert, inner, modules, own_shapes)
        experts.append(expert)
        readers.append(by_channels(reader, paths, vocabulary, channels))
    dtype = output_dtype(recipe, [base_reader, *readers])
    plan = Plan(
        recipe=recipe.with_dtype(dtype_text(dtype)),
        base=base,
        experts=tuple(experts),
        text_config=checked.text_config,
        modules=modules,
        shapes=shapes,
        readers=tuple(readers),
        base_reader=base_reader,
        dtype=dtype,
        vocabulary=vocabulary,
        vocabulary_paths=paths,
    )
    check_budget(plan)
    return plan


def check_budget(plan: Plan) -> None:
    """ValueError where the recipe's bounds fit no module or its budget is too small; the least possible is told."""
    kinds = list(dict.fromkeys(path.rpartition(".")[2] for path in plan.own_modules))
    for bounds in plan.recipe.grouping.bounds or ():
        if not any(fnmatchcase(path, bounds.modules) for path in plan.own_modules):
            raise ValueError(
                f"grouping.bounds: no module that stores rows has a path like {bounds.modules!r}; "
                f"their kinds are {', '.join(kinds)}, one of the paths is {plan.own_modules[0]}"
            )
    if plan.budget_parameters is None:
        return
    least = plan.least_parameters
    if plan.budget_parameters < least:
        share = math.ceil(Fraction(least, plan.expert_parameters) * 10**4) / 10**4
        raise ValueError(
            f"grouping.budget is {plan.recipe.grouping.budget:g}, expected at least {share:g}: "
            f"{'the bounds ask for' if plan.recipe.grouping.bounds else 'one row per channel takes'} {least:,} of the "
            f"experts' {plan.expert_parameters:,} parameters, what is kept per expert included"
        )


def with_vocabulary(base_config: PreTrainedConfig, vocabulary: MergedVocabulary) -> PreTrainedConfig:
    """The base's config with the merged vocabulary's size and the places of its special tokens there."""
    config = copy.deepcopy(base_config)
    for key, value in vocabulary.base.special_ids.items():
        setattr(config, key, vocabulary.base_channel(value))
    config.vocab_size = vocabulary.size
    return config


def check_merged_class(text_config: PreTrainedConfig, expert_names: list[str]) -> None:
    """ValueError where the merged model could not be built from what a conversion would write."""
    config = ChannelMergedConfig(text_config=text_config.to_dict(), expert_names=expert_names)
    with torch.device("meta"):
        ChannelMergedForCausalLM(config)


def output_dtype(recipe: Recipe, readers: list[RowReader]) -> torch.dtype:
    """The recipe's dtype, else the narrowest that holds every checkpoint exactly."""
    if recipe.dtype is not None:
        return getattr(torch, recipe.dtype)
    dtypes = {tensor.dtype for reader in readers for tensor in reader.tensors.values()}
    dtype = dtypes.pop()
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    return dtype
