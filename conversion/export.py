"""One expert of a channel-merged checkpoint as a plain checkpoint of the base architecture.

Streams tensor by tensor: an expert's rows are read as its runs of consecutive rows and put into channel order, so that
memory holds one matrix of one expert. The result needs no code of this package.
"""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.checkpoints.tensor_names import stored_names
from conversion.hub.expert_card import write_expert_card
from conversion.io.model_files import (
    CHAT_TEMPLATE,
    COMPANION_FILES,
    EXPERT_FOLDER,
    GENERATION_CONFIG,
    TEMPLATE_FOLDER,
    TOKENIZER_CONFIG,
    copy_files,
)
from conversion.io.shard_writer import ShardWriter, TensorSpec
from conversion.io.sources import check_unchanged
from conversion.io.staged_folder import StagedFolder, check_not_a_source, check_target
from conversion.vocabulary.own_vocabulary import SPECIAL_IDS
from modeling_channel_merged.channel_ops import ExpertRuns, expert_runs

logger = logging.getLogger(__name__)


def export_expert(
    checkpoint: str | Path, expert: str, out: str | Path, overwrite: bool = False, max_shard_size: int | str = "5GB"
) -> None:
    """Write the expert named `expert` to the folder `out`, which appears only when it is complete.

    Raises:
        ValueError: no channel-merged checkpoint, no such expert, a damaged index, or an `out` that is not empty or
            holds the checkpoint.
    """
    out = Path(out)
    check_target(out, overwrite)
    with MergedCheckpoint(checkpoint) as merged:
        check_not_a_source(out, {"the checkpoint that is read": merged.folder})
        ExpertExport(merged, expert).write(out, overwrite, max_shard_size)


class ExpertExport:
    """The plain checkpoint of one expert: its config, its tensors' headers, and the tensors one by one."""

    def __init__(self, merged: MergedCheckpoint, expert: str):
        self.merged = merged
        self.expert = merged.config.expert_id(expert)
        self.name = expert
        self.channels = self._own_channels()
        self.vocab_size = len(self.channels)

    def config(self) -> PreTrainedConfig:
        """The base architecture's config, as its own class would save it."""
        config = self.merged.base_model.config
        config.architectures = [type(self.merged.base_model).__name__]
        config.vocab_size = self.vocab_size
        own = self.merged.config.expert_vocabularies.get(self.name, {})
        for key in SPECIAL_IDS if own else ():
            setattr(config, key, own.get(key))
        return config

    def specs(self) -> Iterator[TensorSpec]:
        """Headers of the plain checkpoint's tensors, in the order of `tensors`."""
        for path, module in self.merged.modules.channel.items():
            channels = self.vocab_size if self.merged.is_vocabulary(path) else module.out_features
            if module.tied_to is None:
                stored = self.merged.tensors[f"model.{path}.rows.weight"]
                shape = (channels, module.in_features)
                yield TensorSpec(f"{path}.weight", shape[::-1] if module.kind == "conv1d" else shape, stored.dtype)
            if module.bias:
                yield TensorSpec(f"{path}.bias", (channels,), self.merged.tensors[f"model.{path}.rows.bias"].dtype)
        for path, parameters in self.merged.modules.per_expert.items():
            for parameter in parameters:
                stored = self.merged.tensors[f"model.{path}.experts.{self.expert}.{parameter}"]
                yield TensorSpec(f"{path}.{parameter}", stored.shape, stored.dtype)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The plain checkpoint's tensors by name, one in memory at a time."""
        for path, module in self.merged.modules.channel.items():
            index = self.merged.channel_index(path)[[self.expert]]
            if self.merged.is_vocabulary(path):
                index = index[:, self.channels]
            (runs,) = expert_runs(index, self.merged.num_rows(path))
            if module.tied_to is None:
                weight = self._read_channels(f"model.{path}.rows.weight", runs)
                yield f"{path}.weight", weight.T.contiguous() if module.kind == "conv1d" else weight
            if module.bias:
                yield f"{path}.bias", self._read_channels(f"model.{path}.rows.bias", runs)
        for path, parameters in self.merged.modules.per_expert.items():
            for parameter in parameters:
                stored = f"model.{path}.experts.{self.expert}.{parameter}"
                yield f"{path}.{parameter}", self.merged.reader.read(stored)

    def write(self, out: Path, overwrite: bool, max_shard_size: int | str) -> None:
        self.merged.check_channel_indices()
        with StagedFolder(out, overwrite) as staged:
            specs = list(self.specs())
            names = stored_names(self.merged.base_model, [spec.name for spec in specs])
            writer = ShardWriter(staged.path, [replace(spec, name=names[spec.name]) for spec in specs], max_shard_size)
            try:
                for name, tensor in self.tensors():
                    writer.write(names[name], tensor)
                writer.finish()
            finally:
                writer.close()
            self._copy_companions(staged.path)
            write_expert_card(self.merged.folder, self.name, staged.path)
            check_unchanged([self.merged.source])
            staged.publish(self.config().to_json_string())
        logger.info("wrote expert %s (%.1f MB) to %s", self.name, writer.num_bytes / 1e6, out)

    def _read_channels(self, name: str, runs: ExpertRuns) -> torch.Tensor:
        """Rows of a stored tensor in this expert's channel order: (O, I), or (O,) of a bias."""
        rows = torch.cat([self.merged.reader.read_rows(name, first, last) for first, last in runs.slices])
        return rows if runs.gather is None else rows[runs.gather]

    def _copy_companions(self, target: Path) -> None:
        """The expert's own tokenizer and generation config; what it does not have of its own is the merged model's."""
        own = self.merged.folder / EXPERT_FOLDER / self.name
        has_tokenizer = (own / TOKENIZER_CONFIG).exists()
        copy_files(self.merged.folder, target, (GENERATION_CONFIG,) if has_tokenizer else COMPANION_FILES)
        templates = target / TEMPLATE_FOLDER
        if templates.exists():  # one for each expert that has its own
            if (template := templates / f"{self.name}.jinja").exists():
                shutil.copyfile(template, target / CHAT_TEMPLATE)
            shutil.rmtree(templates)
        copy_files(own, target, COMPANION_FILES)

    def _own_channels(self) -> torch.LongTensor:
        """The merged vocabulary's ids of the expert's own ids: (own vocabulary size,).

        Where config.json does not tell, the expert must have the first tokens of the merged vocabulary.
        """
        has_token = self.merged.has_token(self.expert)
        channels = self.merged.config.vocabulary_channels(self.expert)
        channels = torch.arange(int(has_token.sum())) if channels is None else torch.tensor(channels)
        if not has_token[channels].all():
            first = int(channels[~has_token[channels]][0])
            raise ValueError(
                f"expert {self.name!r} cannot be exported: it lacks token {first} in the middle of the merged "
                f"vocabulary of {len(has_token)}, and a plain checkpoint has no way to leave a token out"
            )
        return channels
