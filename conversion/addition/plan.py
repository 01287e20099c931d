"""The plan of adding an expert to a merged checkpoint: all that configs and headers tell, checked before data is read.

Shapes: N experts, V tokens of the merged vocabulary.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from conversion.checkpoints.adapter_config import check_adapted_expert, read_adapter_config
from conversion.checkpoints.architecture import make_reader, parameter_shapes, vocabulary_paths, with_rows
from conversion.checkpoints.configs import adapted_config, compare_configs, load_config
from conversion.checkpoints.lora_reader import LoraReader, adapter_reader
from conversion.checkpoints.merged_checkpoint import MergedCheckpoint, find_checkpoint, read_merged_config
from conversion.checkpoints.stored_expert import StoredExpertReader
from conversion.io.model_files import check_file_name, same_file
from conversion.io.row_reader import BaseReader, RowReader
from conversion.io.sources import BASE, Source, find_source, with_weights
from conversion.io.weight_files import read_headers
from conversion.io.weight_formats import ADAPTER_FORMATS
from conversion.io.wording import first_names
from conversion.merging.recipe import EXPERT_NAME
from conversion.vocabulary.merged_vocabulary import MergedVocabulary, merge_vocabularies
from conversion.vocabulary.own_vocabulary import DEFAULT_TEMPLATE, OwnVocabulary, named_templates, read_vocabulary
from conversion.vocabulary.union_tokenizer import PIECE_MARK
from conversion.vocabulary.vocabulary_reader import by_channels
from modeling_channel_merged import ChannelMergedConfig
from modeling_channel_merged.configuration_channel_merged import MAX_EXPERTS


@dataclass(frozen=True)
class Addition:
    """Everything about a new expert that configs and headers tell."""

    merged: MergedCheckpoint
    name: str
    source: Source
    base: Source | None
    place: int  # the new expert's number
    kept: tuple[int, ...]  # the experts that stay, by their number before
    reader: RowReader
    base_reader: RowReader | None
    present: torch.BoolTensor  # (V,) tokens that the new expert has
    vocabulary: MergedVocabulary | None  # its own one in the merged one; None: that of the expert that was adapted
    adapted: str | None  # the expert of the checkpoint that the new one is an adapter of
    tolerance: float

    @property
    def sources(self) -> list[Source]:
        """All that is read: the checkpoint, the new expert and, where it is needed, the base."""
        return [self.merged.source, self.source, *([self.base] if self.base is not None else [])]

    @property
    def num_experts(self) -> int:
        return len(self.kept) + 1

    @property
    def replaces(self) -> bool:
        return len(self.kept) < self.merged.config.num_experts

    @property
    def expert_names(self) -> list[str]:
        names = list(self.merged.config.expert_names)
        return names if self.replaces else [*names, self.name]

    def is_vocabulary(self, path: str) -> bool:
        return self.merged.is_vocabulary(path)

    def stored_dtype(self, path: str) -> torch.dtype:
        return self.merged.tensors[self.merged.rows_name(path)].dtype


def plan_addition(
    checkpoint: str | Path, expert: str | Path, name: str, *, base: str | Path | None, tolerance: float, replace: bool
) -> Addition:
    """Find and check the checkpoint, the new expert and, where it is needed, the base: configs and headers only."""
    checkpoint_source = find_checkpoint(checkpoint)
    old = read_merged_config(checkpoint_source.folder)
    check_name(name, old, replace)
    source = find_source(name, str(expert), Path())
    adapted = made_for = None
    if source.is_adapter:
        source = with_weights(source)
        config = read_adapter_config(source)
        adapted, made_for = config.merged_expert, config.merged_expert_hash
        check_not_of_rows(source)
        if adapted is not None and adapted not in old.expert_names:
            raise ValueError(
                f"{name}: {expert} adapts the expert {adapted!r}, but {checkpoint} has {old.expert_names}"
            )
        if replace and adapted is not None and adapted != name:
            raise ValueError(
                f"{expert} adapts the expert {adapted!r}, expected one of {name!r}, which it is to replace: give "
                f"--name {adapted}, or a new name without --replace"
            )
    base_source = None
    if base is not None or tolerance > 0 or (source.is_adapter and adapted is None):
        base_source = find_base(old, base)
        try:
            compare_configs(old.text_config, load_config(base_source), BASE)
        except ValueError as error:
            raise ValueError(f"{base_source.model} is not the base of {checkpoint}: {error}") from None
    if not source.is_adapter:
        compare_configs(old.text_config, load_config(source), name)
    merged = MergedCheckpoint(checkpoint_source)
    place = old.expert_names.index(name) if replace else old.num_experts
    own_vocabulary = checkpoint_vocabulary(merged, name)
    base_model = base_reader = None
    if base_source is not None:
        base_model = open_model(merged, with_weights(base_source))
        in_merged = merge_vocabularies("base", own_vocabulary, [base_model.vocabulary])
        base_reader = read_by_channels(merged, base_model, in_merged, mean_of=base_model.vocabulary.token_ids)
    if adapted is not None:
        check_template(own_vocabulary, name, adapted)
        found = StoredExpertReader(merged, adapted).hash()
        check_adapted_expert(expert, adapted, made_for, found, str(checkpoint))
        reader, vocabulary = adapter_of_expert(merged, source, adapted, str(checkpoint)), None
        present = merged.has_token(merged.config.expert_id(adapted))
    else:
        if source.is_adapter:
            model = open_adapter(merged, source, base_model)
        else:
            model = open_model(merged, with_weights(source))
        source, vocabulary = model.source, merge_vocabularies("base", own_vocabulary, [model.vocabulary])
        check_tokens_are_kept(merged, name, vocabulary)
        reader, present = read_by_channels(merged, model, vocabulary), vocabulary.present[0]
    return Addition(
        merged=merged,
        name=name,
        source=source,
        base=base_model.source if base_model is not None else None,
        place=place,
        kept=tuple(number for number in range(old.num_experts) if not (replace and number == place)),
        reader=reader,
        base_reader=base_reader,
        present=present,
        vocabulary=vocabulary,
        adapted=adapted,
        tolerance=tolerance,
    )


def check_name(name: str, config: ChannelMergedConfig, replace: bool) -> None:
    """ValueError unless `name` can be added, or exchanged."""
    names = config.expert_names
    if not EXPERT_NAME.fullmatch(name):
        raise ValueError(f"expert name {name!r} must be letters, digits, '_' or '-' and not begin with a digit")
    check_file_name(name, "expert name")
    if replace:
        config.expert_id(name)
    elif name in names:
        raise ValueError(f"the checkpoint has an expert {name!r}: give another name, or exchange it (--replace)")
    elif (other := same_file(name, names)) is not None:
        raise ValueError(
            f"the checkpoint has an expert {other!r}, which differs from {name!r} only in case, and their files would "
            "be the same on some systems: give another name"
        )
    elif len(names) >= MAX_EXPERTS:
        raise ValueError(f"the checkpoint has {len(names)} experts, at most {MAX_EXPERTS} are possible")


def check_not_of_rows(source: Source) -> None:
    """ValueError for an adapter of a merged model's stored rows, which is none of a single expert."""
    rows = [key for key in read_headers(source.folder, ADAPTER_FORMATS) if ".rows." in key]
    if rows:
        raise ValueError(
            f"{source.name}: {source.model} adapts rows that experts share ({rows[0]}): train it with "
            "conversion.expert_lora.adapt_expert, which adapts one expert"
        )


def find_base(config: ChannelMergedConfig, base: str | Path | None) -> Source:
    """The base model: as given, else the Hub repository (or, in old checkpoints, the folder) that was recorded."""
    if base is not None:
        return find_source(BASE, str(base), Path())
    record = config.merge.get("base_model") or {}
    needed = "the base model is needed (by an adapter of it and by a tolerance)"
    if "model" not in record:
        raise ValueError(f"{needed}, and the checkpoint does not say which it is: name it with --base")
    model = record["model"].partition("@")[0] + (f"@{record['revision']}" if record.get("revision") else "")
    if not record.get("revision") and not Path(model).expanduser().is_absolute():
        raise ValueError(f"{needed}, and of {model!r} the checkpoint does not say where it is: name it with --base")
    try:
        return find_source(BASE, model, Path())
    except ValueError as error:
        raise ValueError(f"{needed}, and where the checkpoint says it is not: {error}; name it with --base") from None


@dataclass(frozen=True)
class CheckpointVocabulary(OwnVocabulary):
    """The merged checkpoint's vocabulary, its tokens under the names that their own tokenizers gave them."""

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token.removeprefix(PIECE_MARK): number for token, number in super().ids.items()}


def checkpoint_vocabulary(merged: MergedCheckpoint, name: str) -> CheckpointVocabulary:
    """The merged checkpoint's vocabulary, without the chat templates of an expert `name` that is exchanged.

    Every other expert has one there, also where it is the default: its name is taken.
    """
    config = merged.config.text_config
    own = read_vocabulary("the checkpoint", merged.folder, config, config.vocab_size)
    names = merged.config.expert_names
    if templates := named_templates(own.tokenizer):
        if DEFAULT_TEMPLATE in templates:
            templates = {**dict.fromkeys(names, templates[DEFAULT_TEMPLATE]), **templates}
        own.tokenizer.chat_template = {
            key: text for key, text in templates.items() if template_owner(key, names) != name
        }
    return CheckpointVocabulary(**{field.name: getattr(own, field.name) for field in fields(own)})


def check_template(vocabulary: CheckpointVocabulary, name: str, adapted: str) -> None:
    """ValueError where the chat template that a new expert takes from `adapted` has another one's file."""
    templates = named_templates(vocabulary.tokenizer)
    if adapted != name and adapted in templates and (other := same_file(name, templates)) is not None:
        raise ValueError(f"the checkpoint has a chat template {other!r}: give the expert {name!r} another name")


@dataclass(frozen=True)
class OpenModel:
    """A model of the base architecture by its own ids, its config and headers checked."""

    source: Source  # its weights at hand
    config: PreTrainedConfig
    vocabulary: OwnVocabulary
    reader: BaseReader | LoraReader


def open_model(merged: MergedCheckpoint, source: Source) -> OpenModel:
    """A whole model."""
    config = load_config(source)
    own = read_vocabulary(source.name, source.folder, config, config.vocab_size)
    return OpenModel(
        source, config, own, make_reader(source, merged.base_model, merged.modules, shapes_of(merged, own))
    )


def open_adapter(merged: MergedCheckpoint, source: Source, base: OpenModel) -> OpenModel:
    """The model that an adapter makes of the base."""
    inner, modules = merged.base_model, merged.modules
    config = adapted_config(source, base.config, inner)
    own = read_vocabulary(source.name, source.folder, config, config.vocab_size, base=base.vocabulary)
    reader = adapter_reader(source, base.source, base.reader, inner, modules, shapes_of(merged, own))
    return OpenModel(source, config, own, reader)


def adapter_of_expert(merged: MergedCheckpoint, source: Source, expert: str, checkpoint: str) -> LoraReader:
    """An adapter of an expert of the merged checkpoint; its channels are the merged ones already."""
    stored = StoredExpertReader(merged, expert)
    shapes = {name: tensor.shape for name, tensor in stored.tensors.items()}
    origin = Source("checkpoint", checkpoint, None, merged.folder)
    return adapter_reader(source, origin, stored, merged.base_model, merged.modules, shapes)


def shapes_of(merged: MergedCheckpoint, own: OwnVocabulary) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a model of the base architecture that has a vocabulary of its own."""
    shapes = parameter_shapes(merged.base_model, merged.modules)
    return with_rows(shapes, vocabulary_paths(merged.base_model), own.size)


def read_by_channels(
    merged: MergedCheckpoint,
    model: OpenModel,
    vocabulary: MergedVocabulary,
    mean_of: torch.LongTensor | None = None,
) -> RowReader:
    """A model read by the merged checkpoint's channels, see `by_channels`."""
    paths = vocabulary_paths(merged.base_model)
    return by_channels(model.reader, paths, vocabulary, vocabulary.channels[0], mean_of=mean_of)


def check_tokens_are_kept(merged: MergedCheckpoint, name: str, vocabulary: MergedVocabulary) -> None:
    """What was merged to keep all tokens keeps them all; elsewhere `merge_vocabularies` has warned."""
    recipe = merged.config.merge.get("recipe") or {}
    tokens = vocabulary.dropped(0)[0] + vocabulary.renamed(0)
    if tokens and recipe.get("tokenizer_source") == "union":
        raise ValueError(
            f"{name}: the merged vocabulary (tokenizer_source: union) lacks {len(tokens)} of its tokens, "
            f"{first_names(tokens, 5, repr)}: an expert with tokens of its own needs a new conversion"
        )


def template_owner(template: str, names: list[str]) -> str | None:
    """The expert that a chat template is of: it has the expert's name, or begins with it; None where there is none."""
    owners = [name for name in names if template == name or template.startswith(f"{name}-")]
    return max(owners, key=len, default=None)
