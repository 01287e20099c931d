"""What a calibration measured, in files: one safetensors file, or the finished parts of a run.

Of every expert, raw, neither scaled nor damped:

    <expert>.gradients.<module>    float64 (O,)   mean squares of the gradient at the module's outputs
    <expert>.covariance.<module>   float32 (P,)   mean of x x^T over the tokens, x its inputs, packed

Modules that read the same inputs share one covariance, under the name of the first. The metadata say whose they are:
names and hashes of the experts, how many texts and tokens, whose covariance each module has.

Shapes: N experts, O channels, I inputs, P values of a packed (I, I) matrix.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from conversion.channels.packed_symmetric import packed_size, unpack_symmetric
from conversion.io.foreign_files import foreign, parse_json
from conversion.io.journal import file_hash
from conversion.io.row_reader import CheckpointReader
from conversion.io.sources import ADAPTER_CONFIG
from conversion.io.weight_files import StoredTensor, read_header
from conversion.io.weights_hash import weights_hash
from conversion.merging.plan import Plan

FORMAT_VERSION = 1
METADATA_KEY = "channel_merge_calibration"
COPY_BYTES = 16 << 20


def gradients_name(expert: str, path: str) -> str:
    return f"{expert}.gradients.{path}"


def covariance_name(expert: str, path: str) -> str:
    return f"{expert}.covariance.{path}"


def expert_record(plan: Plan, number: int) -> dict[str, str]:
    """What tells an expert from another, by content: its weights, and where its tokens are in the vocabulary."""
    source = plan.experts[number]
    record = {"weights": weights_hash(source)}
    if source.is_adapter:
        record |= {"adapter": file_hash(source.folder / ADAPTER_CONFIG), "base": weights_hash(plan.base)}
    channels = plan.vocabulary.channels[number]
    record["vocabulary"] = hashlib.sha256(channels.numpy().tobytes()).hexdigest()
    return record


@dataclass(frozen=True)
class Measured:
    """What is known of a calibration beside its tensors; plain values."""

    experts: dict[str, dict[str, str]]  # name -> `expert_record`
    texts: dict[str, int]  # name -> how many
    tokens: dict[str, int]
    inputs: dict[str, str]  # module path -> the module under whose name its covariance is
    data: str  # where the texts are from, without its folder
    texts_hash: str


class Calibration:
    """What was measured on the experts of a plan, read when it is asked for. Several threads may read.

    Args:
        place: what errors call it.
        measured: whose it is.
        tensors: what it holds, by name.
        plan: the experts, in its order; what was measured of others is not read.

    Raises:
        ValueError: it is of other experts, or something is missing, of another shape or not finite.
    """

    def __init__(self, place: str, measured: Measured, tensors: Mapping[str, StoredTensor], plan: Plan):
        self.measured = measured
        self._place = place
        self._names = plan.expert_names
        self._modules = plan.modules.channel
        self._reader = CheckpointReader(place, tensors)
        self._check_experts(plan)
        self._check_tensors()

    @property
    def texts(self) -> dict[str, int]:
        """How many texts each expert was measured on."""
        return {name: self.measured.texts[name] for name in self._names}

    def inputs_of(self, path: str) -> str | None:
        """The module under whose name a module's covariance is stored; None of the embedding, which has none."""
        return self.measured.inputs.get(path)

    def covariance(self, path: str) -> torch.Tensor | None:
        """Mean of x x^T over each expert's tokens, x the inputs of a module: (N, I, I) float32; None of an embedding.

        Raises:
            ValueError: a value is not finite.
        """
        stored = self.inputs_of(path)
        if stored is None:
            return None
        size = self._modules[path].in_features
        matrices = torch.empty(len(self._names), size, size)
        for matrix, name in zip(matrices, self._names, strict=True):
            packed = self._reader.read(covariance_name(name, stored))
            if not packed.isfinite().all():
                raise ValueError(f"{self._place}: the covariance of {path} of expert {name!r} holds NaN or infinity")
            unpack_symmetric(packed, matrix)
        return matrices

    def gradient_squares(self, path: str) -> torch.Tensor:
        """Mean over each expert's tokens of the squared gradient at each channel's output: (N, O) float64.

        Of the embedding: the squares at the tokens that have a channel's id, mean over the hidden size, divided by all
        tokens.
        """
        return torch.stack([self._reader.read(gradients_name(name, path)) for name in self._names])

    def stored(self) -> dict[str, StoredTensor]:
        """Where everything lies that was measured of the plan's experts."""
        names = [gradients_name(name, path) for name in self._names for path in self._modules]
        sources = dict.fromkeys(self.measured.inputs.values())
        names += [covariance_name(name, path) for name in self._names for path in sources]
        return {name: self._reader.tensors[name] for name in names}

    def close(self) -> None:
        self._reader.close()

    def _check_experts(self, plan: Plan) -> None:
        for number, name in enumerate(self._names):
            if name not in self.measured.experts:
                known = ", ".join(self.measured.experts)
                raise ValueError(f"{self._place} was not measured on expert {name!r}, but on {known}: calibrate again")
            before, now = self.measured.experts[name], expert_record(plan, number)
            if before != now:
                what = "vocabulary" if before.get("weights") == now["weights"] else "weights"
                raise ValueError(
                    f"{self._place} was measured on another expert {name!r}: its {what} differ, calibrate again"
                )

    def _check_tensors(self) -> None:
        for path, module in self._modules.items():
            expected = {gradients_name(name, path): ("F64", module.out_features) for name in self._names}
            if module.kind != "embedding":
                stored = self.measured.inputs.get(path, path)
                size = packed_size(module.in_features)
                expected |= {covariance_name(name, stored): ("F32", size) for name in self._names}
            for name, (dtype, size) in expected.items():
                tensor = self._reader.tensors.get(name)
                if tensor is None:
                    raise ValueError(f"{self._place} has no {name}: calibrate again with these experts")
                if (tensor.dtype_name, tensor.shape) != (dtype, (size,)):
                    raise ValueError(
                        f"{self._place}: {name} is {tensor.dtype_name} of shape {list(tensor.shape)}, "
                        f"expected {dtype} of shape [{size}]"
                    )
            squares = self.gradient_squares(path)
            if not (squares.isfinite().all() and (squares >= 0).all()):
                raise ValueError(f"{self._place}: the gradient squares of {path} are negative, NaN or infinite")


def read_calibration(file: Path, plan: Plan) -> Calibration:
    """A calibration file that was measured on the plan's experts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no calibration file, damaged, or of other experts; see `Calibration`.
    """
    return Calibration(str(file), read_measured(file), read_header(file), plan)


def read_measured(file: Path) -> Measured:
    """The metadata of a calibration file; ValueError where it is none."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no calibration file {file}")
    with foreign(str(file)), safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(METADATA_KEY)
    if text is None:
        raise ValueError(f"{file} is no calibration file, expected one that channel-merge calibrate wrote")
    values = parse_json(text, f"{file}: its metadata")
    if (version := values.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"{file} has format_version {version!r}, this version reads {FORMAT_VERSION}")
    for field in fields(Measured):
        if not isinstance(values.get(field.name), str if field.type is str else dict):
            raise ValueError(f"{file}: its metadata have no {field.name}, calibrate again")
    return Measured(**{field.name: values[field.name] for field in fields(Measured)})


def is_calibration(file: Path) -> bool:
    """Whether a file is a calibration, of whatever experts and version."""
    try:
        with safe_open(file, framework="pt") as opened:
            return METADATA_KEY in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return False


def parts_of(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """What the finished parts of a run hold, by name."""
    return {name: tensor for file in files for name, tensor in read_header(file).items()}


def write_calibration(calibration: Calibration, file: Path, versions: Mapping[str, str]) -> None:
    """Write one safetensors file of all that was measured; memory is that of a few megabytes."""
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        **asdict(calibration.measured),
        "versions": dict(versions),
    }
    # Wide dtypes first, so that all of them align.
    tensors = sorted(calibration.stored().items(), key=lambda item: (item[1].dtype_name != "F64", item[0]))
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(values)}}
    place = 0
    for name, tensor in tensors:
        header[name] = {
            "dtype": tensor.dtype_name,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.num_bytes],
        }
        place += tensor.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            with tensor.file.open("rb") as part:
                part.seek(tensor.offset)
                left = tensor.num_bytes
                while left:
                    piece = part.read(min(left, COPY_BYTES))
                    stream.write(piece)
                    left -= len(piece)
