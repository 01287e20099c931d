"""The plan of a conversion: everything that configs and safetensors headers can tell, checked before data is read.

`make_plan` finds the checkpoints (folders or Hub repositories), compares every expert's config and tensors with the
base's, and knows the sizes. Errors name the expert, the field or tensor, and both values.
"""

import copy
import inspect
import logging
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from conversion.checkpoints.lora_reader import LoraReader, adapter_reader, saved_rows
from conversion.checkpoints.tensor_names import by_parameter_name
from conversion.io.foreign_files import foreign, read_model_config
from conversion.io.model_files import drop_code_references
from conversion.io.sources import Source, find_source, with_weights
from conversion.io.staged_folder import check_target, leftover_bytes
from conversion.io.weight_files import (
    FLOAT_DTYPES,
    ExpertReader,
    StoredTensor,
    match_names,
    read_headers,
)
from conversion.merging.recipe import Recipe
from conversion.vocabulary.merged_vocabulary import MergedVocabulary, inverse, merge_vocabularies, read_vocabulary
from conversion.vocabulary.vocabulary_reader import VocabularyReader
from modeling_channel_merged import ChannelMergedConfig, ChannelMergedForCausalLM
from modeling_channel_merged.channel_merged_layers import ModuleMap, find_modules

logger = logging.getLogger(__name__)

BASE = "base_model"

# Config fields that no output of the model depends on. Every other field must be the base's, also one unknown here.
FREE_CONFIG_FIELDS = frozenset(
    """
    _name_or_path name_or_path architectures auto_map quantization_config dtype torch_dtype transformers_version
    model_max_length
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id tokenizer_class prefix task_specific_params chunk_size_feed_forward
    use_cache output_attentions output_hidden_states output_scores return_dict return_dict_in_generate torchscript
    attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout_prob classifier_dropout
    attention_probs_dropout_prob summary_first_dropout embedding_dropout residual_dropout attn_dropout dropout
    initializer_range initializer_factor id2label label2id num_labels problem_type finetuning_task
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    suppress_tokens begin_suppress_tokens num_return_sequences remove_invalid_values
    exponential_decay_length_penalty max_new_tokens
    _attn_implementation _attn_implementation_internal attn_implementation _flash_attn_2_enabled neftune_noise_alpha
    gradient_checkpointing pretraining_tp unsloth_version unsloth_fixed use_mistral_transformers_template
    """.split()
)


# How many feed-forward networks a mixture of experts has, under its families' names.
MIXTURE_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


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

    def channel_parameters(self, path: str) -> list[str]:
        """Names of the parameters of a channel module in the base architecture."""
        return [f"{path}.weight"] + ([f"{path}.bias"] if self.modules.channel[path].bias else [])

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


def load_config(source: Source) -> PreTrainedConfig:
    """The config of one checkpoint; refuses quantized and multimodal ones."""
    if source.is_adapter:
        raise ValueError(f"{source.name}: {source.model} is a PEFT adapter, expected a whole model")
    unreadable = f"{source.name}: the config of {source.model} cannot be read"
    with foreign(unreadable):
        values = read_model_config(source.folder / "config.json")
    if (quantization := values.get("quantization_config")) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        method = method or "unknown method"
        raise ValueError(f"{source.name}: {source.model} is quantized ({method}), expected float weights")
    with foreign(unreadable):
        family = values["model_type"]
        if "auto_map" in values and family not in CONFIG_MAPPING:
            raise ValueError(f"its architecture {family!r} is code of its own (auto_map), which is never run here")
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    drop_code_references(config)
    if config.get_text_config() is not config:
        raise ValueError(
            f"{source.name}: {source.model} ({config.model_type}) nests its language model in a larger one, "
            "which is not supported; save the language model alone"
        )
    check_family(source.name, config)
    return config


def adapted_config(expert: Source, base_config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the model that an adapter makes of its base: the base's, with the adapter's embedding's size."""
    with foreign("the base's config"):
        inner, _ = base_architecture(base_config)
    embedding = next(path for path, module in inner.named_modules() if module is inner.get_input_embeddings())
    size = saved_rows(expert, inner, f"{embedding}.weight")
    config = copy.deepcopy(base_config)
    config.vocab_size = base_config.vocab_size if size is None else size
    return config


def check_family(name: str, config: PreTrainedConfig) -> None:
    """Refuse by name what is no dense decoder-only language model."""
    family = f"{name}: {config.model_type}"
    if config.is_encoder_decoder:
        raise ValueError(f"{family} is an encoder-decoder, expected a decoder-only causal language model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{family} has no causal language model in Transformers")
    for field in MIXTURE_FIELDS:
        count = getattr(config, field, None)
        if isinstance(count, int) and count > 1:
            raise ValueError(
                f"{family} is a mixture of experts ({field} is {count}), which is not supported: "
                "expected a dense causal language model"
            )


def compare_configs(base: PreTrainedConfig, expert: PreTrainedConfig, name: str) -> None:
    """Refuse an expert that computes differently from the base, by field name and both values."""
    if expert.model_type != base.model_type:
        raise ValueError(f"expert {name!r} is a {expert.model_type!r} model, the base is {base.model_type!r}")
    base_fields, expert_fields = base.to_dict(), expert.to_dict()
    absent = object()
    for field in sorted(base_fields.keys() | expert_fields.keys()):
        ours, theirs = base_fields.get(field, absent), expert_fields.get(field, absent)
        if field in FREE_CONFIG_FIELDS or field == "vocab_size" or ours == theirs:
            continue
        shown = ["nothing" if value is absent else repr(value) for value in (theirs, ours)]
        message = f"expert {name!r} has {field} {shown[0]}, the base has {shown[1]}"
        if field == "max_position_embeddings" and _positions_are_unbounded(base_fields):
            logger.warning("%s; the base's value is kept", message)
            continue
        raise ValueError(f"{message}: they would compute differently")


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


def vocabulary_paths(inner: torch.nn.Module) -> tuple[str, ...]:
    """Paths of the embedding and of the head, tied or not."""
    modules = (inner.get_input_embeddings(), inner.get_output_embeddings())
    return tuple(path for path, module in inner.named_modules() if module in modules)


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


def base_architecture(text_config: PreTrainedConfig) -> tuple[torch.nn.Module, ModuleMap]:
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


def check_merged_class(text_config: PreTrainedConfig, expert_names: list[str]) -> None:
    """ValueError where the merged model could not be built from what a conversion would write."""
    config = ChannelMergedConfig(text_config=text_config.to_dict(), expert_names=expert_names)
    with torch.device("meta"):
        ChannelMergedForCausalLM(config)


def parameter_shapes(inner: torch.nn.Module, modules: ModuleMap) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the base architecture that has a place in the merged one."""
    names = [f"{path}.weight" for path in modules.channel]
    names += [f"{path}.bias" for path, module in modules.channel.items() if module.bias]
    names += [f"{path}.{name}" for path, names_of in modules.per_expert.items() for name in names_of]
    known = {name: tuple(value.shape) for name, value in inner.named_parameters(remove_duplicate=False)}
    left = sorted(known.keys() - set(names))
    if left:
        raise ValueError(f"{type(inner).__name__} is not supported: there is no place for {left[0]}")
    return {name: known[name] for name in names}


def make_reader(
    source: Source, inner: torch.nn.Module, modules: ModuleMap, shapes: dict[str, tuple[int, ...]]
) -> ExpertReader:
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
        raise ValueError(f"{source.name}: {source.model} has no tensor {_first(missing)}")
    if extra:
        raise ValueError(
            f"{source.name}: {source.model} has a tensor that {type(inner).__name__} does not have: {_first(extra)}"
        )
    tensors = {name: stored[key] for name, key in found.items()}
    for name, tensor in tensors.items():
        _check_tensor(source, name, tensor, shapes[name])
    transposed = [f"{path}.weight" for path, module in modules.channel.items() if module.kind == "conv1d"]
    return ExpertReader(source.name, tensors, transposed)


def output_dtype(recipe: Recipe, readers: list[ExpertReader]) -> torch.dtype:
    """The recipe's dtype, else the narrowest that holds every checkpoint exactly."""
    if recipe.dtype is not None:
        return getattr(torch, recipe.dtype)
    dtypes = {tensor.dtype for reader in readers for tensor in reader.tensors.values()}
    dtype = dtypes.pop()
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    return dtype


def check_disk_space(out: Path, max_bytes: int, fingerprint: Mapping[str, Any]) -> None:
    """ValueError where the output of a run of this fingerprint might not fit."""
    folder = out.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free + leftover_bytes(out, fingerprint)
    if max_bytes > free:
        raise ValueError(
            f"{out} needs up to {max_bytes / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free there: free some space"
        )


def _check_tensor(source: Source, name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype_name not in FLOAT_DTYPES:
        raise ValueError(
            f"{source.name}: {name} is stored as {tensor.dtype_name}, expected {', '.join(FLOAT_DTYPES)} "
            "(quantized checkpoints cannot be merged)"
        )
    if tensor.shape != shape:
        raise ValueError(f"{source.name}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")


def _check_not_a_source(out: Path, sources: tuple[Source, ...]) -> None:
    """The output must not replace a checkpoint that is read, nor a folder around it."""
    for source in sources:
        folder = source.folder.resolve()
        if out.resolve() == folder or out.resolve() in folder.parents:
            raise ValueError(f"the output folder {out} holds the checkpoint of {source.name} ({source.model})")


def _positions_are_unbounded(fields: dict[str, Any]) -> bool:
    """Whether the number of positions bounds nothing but the cache: plain rotary positions."""
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict):
        return False
    per_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    return all(value.get("rope_type", "default") == "default" for value in per_layer_type or [rope])


def _first(names: list[str]) -> str:
    """The first of several names, and how many more there are."""
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
