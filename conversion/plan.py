"""The plan of a conversion: everything that configs and safetensors headers can tell, checked before data is read.

`make_plan` finds the checkpoints (folders or Hub repositories), compares every expert's config and tensors with the
base's, and knows the sizes. Errors name the expert, the field or tensor, and both values.
"""

import json
import logging
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from conversion.expert_reader import (
    FLOAT_DTYPES,
    ExpertReader,
    StoredTensor,
    match_names,
    read_headers,
    weight_files,
)
from conversion.recipe import Recipe
from conversion.shard_writer import check_target
from modeling_channel_merged.channel_merged_layers import ModuleMap, find_modules

logger = logging.getLogger(__name__)

BASE = "base_model"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "tokenizer*")

# Config fields that no output of the model depends on. Every other field must be the base's, also one unknown here.
FREE_CONFIG_FIELDS = frozenset(
    """
    _name_or_path name_or_path architectures dtype torch_dtype transformers_version model_max_length
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


@dataclass(frozen=True)
class Source:
    """One checkpoint: where it is, and what is written down about it."""

    name: str  # the expert's name, or "base_model"
    model: str  # as the recipe has it
    revision: str | None  # commit of a Hub repository
    folder: Path

    def record(self) -> dict[str, str]:
        record = {"name": self.name, "model": self.model}
        return record | ({"revision": self.revision} if self.revision else {})


@dataclass(frozen=True)
class Plan:
    """A checked conversion: nothing but its data is unknown."""

    recipe: Recipe  # resolved
    base: Source
    experts: tuple[Source, ...]
    text_config: PreTrainedConfig
    modules: ModuleMap
    shapes: dict[str, tuple[int, ...]]  # parameter name -> shape in the base architecture
    readers: tuple[ExpertReader, ...]  # one per expert
    base_reader: ExpertReader
    dtype: torch.dtype  # of the output

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def expert_names(self) -> list[str]:
        return [expert.name for expert in self.experts]

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts as separate models."""
        return self.num_experts * self._num_parameters()

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
        ValueError: the checkpoints do not fit each other or this program, or there is no room for the output.
    """
    recipe = recipe.resolved()
    if out is not None:
        check_target(Path(out), overwrite)
    models = [(BASE, recipe.base_model), *((expert.name, expert.model) for expert in recipe.experts)]
    base, *experts = (find_source(name, model, recipe.folder) for name, model in models)
    if out is not None:
        _check_not_a_source(Path(out), (base, *experts))
    text_config = load_config(base)
    for expert in experts:
        compare_configs(text_config, load_config(expert), expert.name)
    compare_tokenizers(base, experts)
    inner, modules = base_architecture(text_config)
    shapes = parameter_shapes(inner, modules)
    base, *experts = (with_weights(source) for source in (base, *experts))
    base_reader, *readers = (make_reader(source, inner, modules, shapes) for source in (base, *experts))
    dtype = output_dtype(recipe, [base_reader, *readers])
    plan = Plan(
        recipe=recipe.with_dtype(str(dtype).removeprefix("torch.")),
        base=base,
        experts=tuple(experts),
        text_config=text_config,
        modules=modules,
        shapes=shapes,
        readers=tuple(readers),
        base_reader=base_reader,
        dtype=dtype,
    )
    if out is not None:
        check_disk_space(Path(out), plan.max_bytes)
    return plan


def find_source(name: str, model: str, folder: Path) -> Source:
    """Where a model of the recipe is: a folder (relative to the recipe's), or a Hub repository.

    Of a repository only the small files are fetched yet.
    """
    local = Path(model).expanduser()
    local = local if local.is_absolute() else folder / local
    if local.is_dir():
        source = Source(name, model, None, local)
    elif local.exists():
        raise ValueError(f"{name}: {model} is a file, expected a folder with a checkpoint or a Hub id")
    else:
        repo, _, revision = model.partition("@")
        if not HUB_ID.fullmatch(repo) or repo.startswith("."):
            raise ValueError(f"{name}: there is no folder {model}")
        snapshot = _fetch(name, repo, revision or None, SMALL_FILES)
        source = Source(name, model, snapshot.name, snapshot)
    if not (source.folder / "config.json").exists():
        if (source.folder / "adapter_config.json").exists():
            raise ValueError(f"{name}: {model} is a PEFT adapter; LoRA adapters are not supported yet, merge it first")
        raise ValueError(f"{name}: {model} has no config.json")
    return source


def with_weights(source: Source) -> Source:
    """The same source with its safetensors files at hand."""
    if source.revision is not None:
        try:
            files = weight_files(source.folder)
        except ValueError:
            files = ["model.safetensors"]
        _fetch(source.name, source.model.partition("@")[0], source.revision, files)
    return source


def load_config(source: Source) -> PreTrainedConfig:
    """The config of one checkpoint; refuses quantized and multimodal ones."""
    try:
        values = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{source.name}: the config of {source.model} cannot be read: {_one_line(error)}") from None
    if "quantization_config" in values:
        method = values["quantization_config"].get("quant_method", "unknown method")
        raise ValueError(f"{source.name}: {source.model} is quantized ({method}), expected float weights")
    if config.get_text_config() is not config:
        raise ValueError(
            f"{source.name}: {source.model} ({config.model_type}) nests its language model in a larger one, "
            "which is not supported; save the language model alone"
        )
    return config


def compare_configs(base: PreTrainedConfig, expert: PreTrainedConfig, name: str) -> None:
    """Refuse an expert that computes differently from the base, by field name and both values."""
    if expert.model_type != base.model_type:
        raise ValueError(f"expert {name!r} is a {expert.model_type!r} model, the base is {base.model_type!r}")
    base_fields, expert_fields = base.to_dict(), expert.to_dict()
    base_size, expert_size = base_fields.get("vocab_size"), expert_fields.get("vocab_size")
    if base_size != expert_size:
        raise ValueError(
            f"expert {name!r} has vocab_size {expert_size}, the base has {base_size}: "
            "vocabularies of different size are not supported yet"
        )
    absent = object()
    for field in sorted(base_fields.keys() | expert_fields.keys()):
        ours, theirs = base_fields.get(field, absent), expert_fields.get(field, absent)
        if field in FREE_CONFIG_FIELDS or ours == theirs:
            continue
        shown = ["nothing" if value is absent else repr(value) for value in (theirs, ours)]
        message = f"expert {name!r} has {field} {shown[0]}, the base has {shown[1]}"
        if field == "max_position_embeddings" and _positions_are_unbounded(base_fields):
            logger.warning("%s; the base's value is kept", message)
            continue
        raise ValueError(f"{message}: they would compute differently")


def compare_tokenizers(base: Source, experts: list[Source]) -> None:
    """Warn of experts that know other tokens than the base: the merged model reads with the base's tokenizer."""
    known = token_ids(base.folder)
    for expert in experts:
        theirs = token_ids(expert.folder)
        changed = sorted(number for number in known.keys() & theirs.keys() if known[number] != theirs[number])
        if changed:
            logger.warning(
                "expert %r has other tokens than the base at %d places, the first is %d (%r, the base has %r); "
                "the base's tokenizer is kept",
                expert.name,
                len(changed),
                changed[0],
                theirs[changed[0]],
                known[changed[0]],
            )


def token_ids(folder: Path) -> dict[int, str]:
    """Tokens by number, of a fast tokenizer's file; nothing where there is none that can be read."""
    try:
        values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocab = values["model"]["vocab"]
        if isinstance(vocab, dict):
            tokens = {number: token for token, number in vocab.items()}
        else:  # pieces and their scores, in order
            tokens = {number: piece[0] for number, piece in enumerate(vocab)}
        return tokens | {token["id"]: token["content"] for token in values.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}


def base_architecture(text_config: PreTrainedConfig) -> tuple[torch.nn.Module, ModuleMap]:
    """The base model without data, and what becomes of its modules."""
    with torch.device("meta"):
        inner = AutoModelForCausalLM.from_config(text_config)
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
        stored = read_headers(source.folder)
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


def check_disk_space(out: Path, max_bytes: int) -> None:
    """ValueError where the output might not fit."""
    folder = out.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
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
        raise ValueError(f"{source.name}: {name} has shape {list(tensor.shape)}, the base has {list(shape)}")


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


def _fetch(name: str, repo: str, revision: str | None, patterns: tuple[str, ...] | list[str]) -> Path:
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        place = repo + (f"@{revision}" if revision else "")
        raise ValueError(
            f"{name}: there is no folder {place} and the Hub did not give it: {_one_line(error)}"
        ) from None


def _first(names: list[str]) -> str:
    """The first of several names, and how many more there are."""
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
