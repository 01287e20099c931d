"""What a channel-merged checkpoint stores, from its config, headers and channel indices alone.

Stored parameters are compared with those of the N experts as separate models, where a tied head counts once, and with
the distinct ones as the conversion counted them; bytes of the channel indices and of the router stand beside them.
How far each expert is from what it was is what the conversion measured and wrote into its report.
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from conversion.channels.delta_errors import relative_error
from conversion.channels.row_layout import owner_names
from conversion.checkpoints.merged_checkpoint import MergedCheckpoint
from conversion.io.foreign_files import read_json
from conversion.io.model_files import REPORT_FILE
from conversion.io.weight_files import dtype_text

PER_EXPERT_KIND = "kept per expert"


@dataclass(frozen=True)
class MatrixReport:
    """One channel module: its size, and how many of its rows have 1, 2, ..., N owners."""

    path: str
    channels: int
    rows: int
    parameters: int
    expert_parameters: int
    rows_by_owner_count: tuple[int, ...]
    rows_by_owners: dict[str, int]  # "math" or "math + code" -> stored rows, most rows first
    delta_norms: tuple[float, ...] | None  # of each expert, as the conversion measured them
    error_norms: tuple[float, ...] | None  # of (merged rows - expert's rows)
    losses: (
        tuple[float, float] | None
    )  # predicted for these rows and for one row per channel, where a budget was spent

    @property
    def kind(self) -> str:
        """The module's own name, which it shares with its like in the other blocks: "q_proj", "lm_head"."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def layer(self) -> int | None:
        """Number of the decoder block; None outside of the blocks."""
        number = re.search(r"\.(\d+)\.", self.path)
        return int(number[1]) if number else None


@dataclass(frozen=True)
class KindReport:
    """All modules of one kind together."""

    kind: str
    modules: int
    channels: int
    rows: int
    parameters: int
    expert_parameters: int
    relative_errors: tuple[float | None, ...] | None  # of each expert, as the conversion measured them


@dataclass(frozen=True)
class CheckpointReport:
    """The numbers of `channel-merge inspect`."""

    checkpoint: str
    architecture: str
    dtype: str
    expert_names: tuple[str, ...]
    matrices: tuple[MatrixReport, ...]
    kinds: tuple[KindReport, ...]
    rows_by_owners: dict[str, int]  # "math" or "math + code" -> stored rows, most rows first
    relative_errors: tuple[float | None, ...] | None
    parameters: int
    expert_parameters: int
    index_bytes: int
    router_bytes: int
    router_trained: bool
    router: dict[str, Any]
    merge: dict[str, Any]
    calibration_texts: dict[str, int] | None  # by expert

    @property
    def budget(self) -> float | None:
        """The share of the experts' parameters that the recipe gave; None where it gave a number of groups."""
        return self.merge.get("recipe", {}).get("grouping", {}).get("budget")

    @property
    def lost_share(self) -> float | None:
        """The loss that the conversion predicted, over that of one row per channel; None without a budget."""
        return lost_share(self.matrices)

    @property
    def share(self) -> float:
        """Stored parameters over those of the N experts."""
        return self.parameters / self.expert_parameters

    @property
    def distinct_parameters(self) -> int | None:
        """Parameters of the experts, rows that are equal bit for bit counted once; None where it was not recorded."""
        return self.merge.get("parameters", {}).get("experts_distinct")

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        more = {name: getattr(self, name) for name in ("share", "distinct_parameters", "budget", "lost_share")}
        return {**dataclasses.asdict(self), **more}


def inspect_checkpoint(checkpoint: str | Path) -> CheckpointReport:
    """Report on a checkpoint folder or Hub id; reads no weights."""
    with MergedCheckpoint(checkpoint) as merged:
        owners = {
            path: owners_of_rows(merged.channel_index(path), merged.num_rows(path)) for path in stored_paths(merged)
        }
        for path in merged.modules.channel.keys() - owners.keys():
            merged.channel_index(path)  # a tied head stores no rows, but its index must be valid too
        conversion = _read_conversion(merged)
        matrices = tuple(_matrix_report(merged, path, masks, conversion) for path, masks in owners.items())
        kinds = (*_kind_reports(matrices), _per_expert_report(merged))
        config = merged.config
        return CheckpointReport(
            checkpoint=str(checkpoint),
            architecture=type(merged.base_model).__name__,
            dtype=dtype_text(config.dtype),
            expert_names=tuple(config.expert_names),
            matrices=matrices,
            kinds=kinds,
            rows_by_owners=_rows_by_owners(owners.values(), config.expert_names),
            relative_errors=relative_errors(matrices),
            parameters=sum(kind.parameters for kind in kinds),
            expert_parameters=sum(kind.expert_parameters for kind in kinds),
            index_bytes=sum(
                merged.tensors[f"model.{path}.channel_index"].num_bytes for path in merged.modules.channel
            ),
            router_bytes=sum(merged.tensors[name].num_bytes for name in merged.router_names()),
            router_trained=any(bool(merged.reader.read(name).any()) for name in merged.router_names()),
            router=dict(config.router),
            merge=dict(config.merge),
            calibration_texts=conversion.texts,
        )


def stored_paths(merged: MergedCheckpoint) -> list[str]:
    """Channel modules that store rows of their own: all but a tied head."""
    return [path for path, module in merged.modules.channel.items() if module.tied_to is None]


def owners_of_rows(channel_index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Bit mask of the experts that read each stored row: int64 (R,), from channel_index (N, O)."""
    owners = torch.zeros(num_rows, dtype=torch.int64)
    for expert, index in enumerate(channel_index.long()):
        owners[index[index >= 0]] |= 1 << expert
    return owners


def owner_counts(owners: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Number of owners of each row: int64 (R,)."""
    return sum((owners >> expert) & 1 for expert in range(num_experts))


def _expert_channels(merged: MergedCheckpoint, path: str) -> int:
    """Channels of a module over all experts; an expert with a smaller vocabulary has fewer."""
    num_experts = merged.config.num_experts
    if merged.is_vocabulary(path):
        return sum(int(merged.has_token(expert).sum()) for expert in range(num_experts))
    return num_experts * merged.modules.channel[path].out_features


class Conversion(NamedTuple):
    """What the conversion's report says, as far as this one shows it; empty where there is none."""

    norms: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]  # module -> of each expert's deltas and errors
    losses: dict[str, tuple[float, float]]
    texts: dict[str, int] | None


def _read_conversion(merged: MergedCheckpoint) -> Conversion:
    file, names = merged.folder / REPORT_FILE, merged.config.expert_names
    if not file.is_file():
        return Conversion({}, {}, None)
    try:
        report = read_json(file)
        modules = report.get("modules", {})
        norms = {
            # Of an exact expert that was added without its base at hand, the change from the base is not known.
            path: tuple(
                tuple(float(module[key][name] or 0) for name in names) for key in ("delta_norms", "error_norms")
            )
            for path, module in modules.items()
            if "error_norms" in module
        }
        losses = {
            path: (float(module["predicted_loss"]), float(module["one_row_loss"]))
            for path, module in modules.items()
            if "predicted_loss" in module
        }
        texts = report.get("calibration_texts")
        return Conversion(norms, losses, texts and {name: int(texts[name]) for name in texts})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is no report of a conversion of {', '.join(names)}") from None


def rows_per_channel(matrices: Iterable[MatrixReport]) -> float | None:
    """Mean over the channels of several modules; None where there are none."""
    matrices = list(matrices)
    channels = sum(matrix.channels for matrix in matrices)
    return sum(matrix.rows for matrix in matrices) / channels if channels else None


def lost_share(matrices: Iterable[MatrixReport]) -> float | None:
    """Predicted loss of several modules over that of one row per channel; None where nothing was predicted or lost."""
    losses = [matrix.losses for matrix in matrices]
    if not losses or None in losses:
        return None
    predicted, one_row = map(sum, zip(*losses))
    return predicted / one_row if one_row else None


def relative_errors(matrices: Iterable[MatrixReport]) -> tuple[float | None, ...] | None:
    """Relative error of each expert over several modules; None where they were not measured."""
    matrices = list(matrices)
    if not matrices or any(matrix.error_norms is None for matrix in matrices):
        return None
    errors, deltas = (
        torch.tensor(norms, dtype=torch.float64).square().sum(0).tolist()
        for norms in zip(*((matrix.error_norms, matrix.delta_norms) for matrix in matrices))
    )
    return tuple(map(relative_error, errors, deltas))


def _matrix_report(
    merged: MergedCheckpoint,
    path: str,
    owners: torch.Tensor,
    conversion: Conversion,
) -> MatrixReport:
    module, num_experts = merged.modules.channel[path], merged.config.num_experts
    row_size = module.in_features + module.bias
    norms = conversion.norms.get(path)
    counts = torch.bincount(owner_counts(owners, num_experts), minlength=num_experts + 1)
    return MatrixReport(
        path=path,
        channels=module.out_features,
        rows=len(owners),
        parameters=len(owners) * row_size,
        expert_parameters=_expert_channels(merged, path) * row_size,
        rows_by_owner_count=tuple(counts[1:].tolist()),
        rows_by_owners=_rows_by_owners([owners], merged.config.expert_names),
        delta_norms=norms and norms[0],
        error_norms=norms and norms[1],
        losses=conversion.losses.get(path),
    )


def _kind_reports(matrices: tuple[MatrixReport, ...]) -> list[KindReport]:
    by_kind: dict[str, list[MatrixReport]] = {}
    for matrix in matrices:
        by_kind.setdefault(matrix.kind, []).append(matrix)
    return [
        KindReport(
            kind=kind,
            modules=len(members),
            channels=sum(matrix.channels for matrix in members),
            rows=sum(matrix.rows for matrix in members),
            parameters=sum(matrix.parameters for matrix in members),
            expert_parameters=sum(matrix.expert_parameters for matrix in members),
            relative_errors=relative_errors(members),
        )
        for kind, members in by_kind.items()
    ]


def _per_expert_report(merged: MergedCheckpoint) -> KindReport:
    base = merged.base_model
    per_expert = merged.modules.per_expert
    parameters = merged.config.num_experts * sum(
        base.get_parameter(f"{path}.{name}").numel() for path, names in per_expert.items() for name in names
    )
    return KindReport(PER_EXPERT_KIND, len(per_expert), 0, 0, parameters, parameters, None)


def _rows_by_owners(owners, expert_names: list[str]) -> dict[str, int]:
    masks, counts = torch.cat(list(owners)).unique(return_counts=True)
    named = {
        " + ".join(owner_names(mask, expert_names)) or "nobody": count
        for mask, count in zip(masks.tolist(), counts.tolist())
    }
    return dict(sorted(named.items(), key=lambda item: -item[1]))
