"""What a calibration needs: threads, memory, disk, from configs and headers alone.

Everything is an upper bound from shapes; no result of a calibration depends on it.

Shapes: N experts, O channels, I inputs, P values of a packed (I, I) matrix, V tokens of the vocabulary.
"""

import math
from dataclasses import dataclass

import torch

from conversion.channels.packed_symmetric import BLOCK_ROWS, packed_size
from conversion.io.options import format_bytes
from conversion.merging.plan import Plan
from conversion.merging.shared_inputs import shared_inputs

MAX_MEMORY = "7GB"  # unless another is given: a 7B in bfloat16 stays below 24 GiB with it
BATCH_TOKENS = 512  # of several texts together; a longer text is a batch of its own
MAX_THREADS = 8
# Libraries that load on first use, names and places of all tensors, the texts.
HELD_BYTES = 256 * 2**20
# What a block computes and what its gradients need, for each value of its modules' inputs and outputs.
BLOCK_COPIES = 3
ATTENTION_COPIES = 4


@dataclass(frozen=True)
class CalibrationMemory:
    """How a calibration spends its memory, and what of the disk it takes."""

    inputs: dict[str, str]  # module path -> the first that reads the same inputs, in the order in which they run
    sum_bytes: dict[str, int]  # of those first ones -> bytes of the sum of x x^T
    threads: int
    weight_bytes: int  # of the largest expert's model
    reading_bytes: int  # beside them, while they are read
    activation_bytes: int  # of one batch, at most
    covariance_bytes: int  # of the sums at a time, at most
    written_bytes: int  # of the mean that is being written
    max_memory: int
    disk_bytes: int  # what is measured of all experts

    @property
    def sources(self) -> list[str]:
        """The modules whose inputs are measured, in the order in which they run."""
        return list(self.sum_bytes)

    @property
    def expected_peak(self) -> int:
        """Bytes above the interpreter's own, at most."""
        measuring = self.threads * self.activation_bytes + self.covariance_bytes + self.written_bytes
        return HELD_BYTES + self.weight_bytes + max(self.reading_bytes, measuring)

    def groups(self, paths: list[str]) -> list[list[str]]:
        """Modules whose sums are in memory together, in the order given."""
        groups: list[list[str]] = []
        left = 0
        for path in paths:
            if not groups or self.sum_bytes[path] > left:
                groups.append([])
                left = self.covariance_bytes
            groups[-1].append(path)
            left -= self.sum_bytes[path]
        return groups


def plan_calibration(plan: Plan, max_memory: int, threads: int, longest: int) -> CalibrationMemory:
    """The most threads, up to `threads`, that leave half of the memory to covariances, and these.

    Args:
        max_memory: bytes beside one expert's weights.
        longest: tokens of the longest text.

    Raises:
        ValueError: the memory is too small for one batch and the widest module's covariance, or the architecture
            cannot be calibrated (see `shared_inputs`).
    """
    inputs = shared_inputs(plan)
    modules = plan.modules.channel
    sum_bytes = {path: 8 * packed_size(modules[path].in_features) for path in dict.fromkeys(inputs.values())}
    dtypes = [run_dtype(plan, number) for number in range(plan.num_experts)]
    activations = max(activation_bytes(plan, dtype, longest) for dtype in set(dtypes))
    written = max(sum_bytes.values()) // 2  # the mean of one in float32
    least = max(sum_bytes.values()) + written
    if activations + least > max_memory:
        raise ValueError(
            f"max_memory is {format_bytes(max_memory)}, expected at least {format_bytes(activations + least)} beside "
            f"one expert's weights, to calibrate with texts of up to {longest:,} tokens"
        )
    most = min(max_memory // 2, max_memory - least) // activations
    count = max(1, min(threads, MAX_THREADS, most))
    heads = {f"{path}.weight" for path, module in modules.items() if module.tied_to}
    sizes = [math.prod(shape) for name, shape in plan.shapes.items() if name not in heads]
    gradients = 8 * sum(module.out_features for module in modules.values())
    return CalibrationMemory(
        inputs=inputs,
        sum_bytes=sum_bytes,
        threads=count,
        weight_bytes=sum(sizes) * max(dtype.itemsize for dtype in dtypes),
        reading_bytes=2 * 4 * max(sizes),  # as stored, or in float32 with what an adapter adds
        activation_bytes=activations,
        covariance_bytes=min(sum(sum_bytes.values()), max_memory - count * activations - written),
        written_bytes=written,
        max_memory=max_memory,
        disk_bytes=plan.num_experts * (sum(sum_bytes.values()) // 2 + gradients),
    )


def run_dtype(plan: Plan, number: int) -> torch.dtype:
    """The dtype in which an expert's model runs: its own; bfloat16 for float16, whose range gradients do not fit."""
    dtypes = {tensor.dtype for tensor in plan.readers[number].tensors.values()}
    widest = max(dtypes, key=lambda dtype: (dtype.itemsize, dtype == torch.bfloat16))
    return torch.bfloat16 if widest == torch.float16 else widest


def activation_bytes(plan: Plan, dtype: torch.dtype, longest: int) -> int:
    """What one batch's forward and backward pass hold: the blocks' inputs, one block, the logits."""
    tokens, config = max(longest, BATCH_TOKENS), plan.text_config
    vocabulary = [plan.modules.channel[path] for path in plan.vocabulary_paths]
    size, hidden = max(module.out_features for module in vocabulary), max(module.in_features for module in vocabulary)
    inner = [module for path, module in plan.modules.channel.items() if path not in plan.vocabulary_paths]
    layers = config.num_hidden_layers
    values = layers * hidden  # inputs of the blocks
    values += BLOCK_COPIES * sum(module.in_features + module.out_features for module in inner) // layers
    values += ATTENTION_COPIES * config.num_attention_heads * min(longest, tokens)
    values += 2 * size
    # In float32: the answers' logits with their gradients, and the inputs of a module that are squared.
    floats = 3 * size + max(module.in_features for module in plan.modules.channel.values())
    block = BLOCK_ROWS * max(module.in_features for module in plan.modules.channel.values())
    return tokens * (values * dtype.itemsize + floats * 4) + 4 * block
