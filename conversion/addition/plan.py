"""The plan of adding an expert to a merged checkpoint: all that configs and headers tell, checked before data is read.

Shapes: N experts, V tokens of the merged vocabulary.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch

from conversion.checkpoints.adapter_config import read_adapter_config
from conversion.checkpoints.architecture import make_reader, parameter_shapes, vocabulary_paths
from conversion.checkpoints.configs import BASE, adapted_config, compare_configs, load_config
from conversion.checkpoints.lora_reader import LoraReader, adapter_reader
from conversion.checkpoints.merged_checkpoint import MergedCheckpoint, find_checkpoint, read_merged_config
from conversion.checkpoints.stored_expert import StoredExpertReader
from conversion.io.model_files import check_file_name, same_file
from conversion.io.row_reader import BaseReader, RowReader
from conversion.io.sources import Source, find_source, with_weights
from conversion.io.weight_files import ADAPTER_FORMATS, read_headers
from conversion.io.wording import first_names
from conversion.merging.recipe import EXPERT_NAME
from conversion.vocabulary.merged_vocabulary import MergedVocabulary, inverse, merge_vocabularies
from conversion.vocabulary.own_vocabulary import OwnVocabulary, named_templates, read_vocabulary
from conversion.vocabulary.union_tokenizer import PIECE_MARK
from conversion.vocabulary.vocabulary_reader import VocabularyReader
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
        """All that is read."""
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
    found = find_checkpoint(checkpoint)
    old = read_merged_config(found.folder)
    check_name(name, old, replace)
    source = find_source(name, str(expert), Path())
    adapted = None
    if source.is_adapter:
        source = with_weights(source)
        adapted = read_adapter_config(source).merged_expert
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
    merged = MergedCheckpoint(found)
    if base_source is not None:
        base_source = with_weights(base_source)
    place = old.expert_names.index(name) if replace else old.num_experts
    readers = NewReaders(merged, name, base_source)
    if adapted is not None:
        readers.check_template(name, adapted)
        reader, vocabulary = readers.adapter_of_expert(source, adapted, str(checkpoint)), None
        present = merged.has_token(merged.config.expert_id(adapted))
    else:
        source = with_weights(source)
        reader, vocabulary = readers.expert(source)
        present = vocabulary.present[0]
    return Addition(
        merged=merged,
        name=name,
        source=source,
        base=base_source,
        place=place,
        kept=tuple(number for number in range(old.num_experts) if not (replace and number == place)),
        reader=reader,
        base_reader=readers.base_by_channels,
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


def check_out(out: Path, addition: Addition) -> None:
    """The output must not replace what is read, nor a folder around it."""
    sources = {"the checkpoint": addition.merged.folder, "the expert": addition.source.folder}
    if addition.base is not None:
        sources["the base"] = addition.base.folder
    for what, folder in sources.items():
        if out.resolve() == folder.resolve() or out.resolve() in folder.resolve().parents:
            raise ValueError(f"the output folder {out} holds {what} that is read: choose another")


@dataclass(frozen=True)
class CheckpointVocabulary(OwnVocabulary):
    """The merged checkpoint's vocabulary, its tokens under the names that their own tokenizers gave them."""

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token.removeprefix(PIECE_MARK): number for token, number in super().ids.items()}


class NewReaders:
    """Readers of checkpoints by the merged checkpoint's channels, their configs and headers checked.

    Args:
        merged: the checkpoint.
        name: of the new expert.
        base: the base model where it is at hand; `base_by_channels` reads it, the mean of its tokens for those that
            it does not have.
    """

    def __init__(self, merged: MergedCheckpoint, name: str, base: Source | None):
        self._merged = merged
        self._name = name
        self._shapes = parameter_shapes(merged.base_model, merged.modules)
        self._paths = vocabulary_paths(merged.base_model)
        config = merged.config.text_config
        own = read_vocabulary("the checkpoint", merged.folder, config, config.vocab_size)
        names = merged.config.expert_names
        if name in names and (templates := named_templates(own.tokenizer)):
            # Those of the expert that is exchanged.
            kept = {key: text for key, text in templates.items() if template_owner(key, names) != name}
            own.tokenizer.chat_template = kept
        self._vocabulary = CheckpointVocabulary(**{field.name: getattr(own, field.name) for field in fields(own)})
        self._base, self.base_by_channels = base, None
        if base is not None:
            self._base_reader, self._base_own = self._whole(base)
            in_merged = merge_vocabularies("base", self._vocabulary, [self._base_own])
            self.base_by_channels = self._by_channels(self._base_reader, in_merged, self._base_own.token_ids)

    def expert(self, source: Source) -> tuple[RowReader, MergedVocabulary]:
        """A checkpoint of the base architecture or an adapter of the base, and its vocabulary in the merged one."""
        if source.is_adapter:
            config = adapted_config(source, load_config(self._base), self._merged.base_model)
            own = read_vocabulary(source.name, source.folder, config, config.vocab_size, base=self._base_own)
            inner, shapes = self._merged.base_model, self._own_shapes(own.size)
            reader = adapter_reader(source, self._base, self._base_reader, inner, self._merged.modules, shapes)
        else:
            reader, own = self._whole(source)
        vocabulary = merge_vocabularies("base", self._vocabulary, [own])
        self._check_vocabulary(vocabulary)
        return self._by_channels(reader, vocabulary), vocabulary

    def adapter_of_expert(self, source: Source, expert: str, checkpoint: str) -> LoraReader:
        """An adapter of an expert of the merged checkpoint; its channels are the merged ones already."""
        stored = StoredExpertReader(self._merged, expert)
        shapes = {name: tensor.shape for name, tensor in stored.tensors.items()}
        origin = Source("checkpoint", checkpoint, None, self._merged.folder)
        return adapter_reader(source, origin, stored, self._merged.base_model, self._merged.modules, shapes)

    def check_template(self, name: str, adapted: str) -> None:
        """ValueError where the chat template that a new expert takes from `adapted` has another one's file."""
        templates = named_templates(self._vocabulary.tokenizer)
        if adapted != name and adapted in templates and (other := same_file(name, templates)) is not None:
            raise ValueError(f"the checkpoint has a chat template {other!r}: give the expert {name!r} another name")

    def _whole(self, source: Source) -> tuple[BaseReader, OwnVocabulary]:
        """A whole model's reader by its own ids, and its vocabulary."""
        config = load_config(source)
        own = read_vocabulary(source.name, source.folder, config, config.vocab_size)
        shapes = self._own_shapes(own.size)
        return make_reader(source, self._merged.base_model, self._merged.modules, shapes), own

    def _own_shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a checkpoint's parameters that has a vocabulary of its own."""
        return {
            name: (size, *shape[1:]) if name.rpartition(".")[0] in self._paths else shape
            for name, shape in self._shapes.items()
        }

    def _by_channels(
        self, reader: RowReader, vocabulary: MergedVocabulary, tokens: torch.LongTensor | None = None
    ) -> RowReader:
        if vocabulary.is_identity:
            return reader
        names = [f"{path}.{name}" for path in self._paths for name in ("weight", "bias")]
        return VocabularyReader(reader, names, inverse(vocabulary.channels[0], vocabulary.size), tokens)

    def _check_vocabulary(self, vocabulary: MergedVocabulary) -> None:
        """What was merged to keep all tokens keeps them all; elsewhere `merge_vocabularies` has warned."""
        recipe = self._merged.config.merge.get("recipe") or {}
        tokens = vocabulary.dropped(0)[0] + vocabulary.renamed(0)
        if tokens and recipe.get("tokenizer_source") == "union":
            raise ValueError(
                f"{self._name}: the merged vocabulary (tokenizer_source: union) lacks {len(tokens)} of its tokens, "
                f"{first_names(tokens, 5, repr)}: an expert with tokens of its own needs a new conversion"
            )


def template_owner(template: str, names: list[str]) -> str | None:
    """The expert that a chat template is of: it has the expert's name, or begins with it; None where there is none."""
    owners = [name for name in names if template == name or template.startswith(f"{name}-")]
    return max(owners, key=len, default=None)
