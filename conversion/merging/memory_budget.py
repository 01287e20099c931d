"""How many modules are worked on at once, and in how large chunks: a conversion stays inside its memory budget.

Everything is an upper bound from shapes alone; no result of a conversion depends on it. Counted is what the process
needs above the interpreter with its libraries.

Shapes: N experts, O channels, I inputs, R rows.
"""

import math
from dataclasses import dataclass

from conversion.channels.grouping import MAX_ENUMERATED
from conversion.channels.magnitude_threshold import threshold_bytes
from conversion.checkpoints.architecture import channel_parameters
from conversion.io.options import parse_size
from conversion.merging.calibration_memory import MAX_MEMORY as CALIBRATED_MAX_MEMORY
from conversion.merging.plan import Plan
from conversion.merging.recipe import Recipe

MAX_MEMORY = "2GB"  # without a calibration, unless another is given
CHUNK_BYTES = 32 * 2**20  # more makes nothing faster
SMALL_CHUNK_BYTES = 2 * 2**20  # less makes it slower than one thread with a larger chunk
MAX_THREADS = 8

# Libraries that load on first use, the base model without data, names and places of all tensors, the report.
HELD_BYTES = 160 * 2**20
# Working blocks of the grouping and of a merge, which are of fixed size, and what the allocator keeps.
THREAD_BYTES = 96 * 2**20
# A chunk's rows as they are stored, their deltas, the gathered rows of a group, masks and the merged rows.
CHUNK_COPIES = 6
# Gram matrix of a channel, that of its similarities and its links, float64.
GRAM_COPIES = 3
# Factors of owner sets that are kept at a time, if one alone is not larger.
FACTOR_BYTES = 128 * 2**20
# Channels of a chunk in a conversion with a calibration, whatever the memory.
CALIBRATED_CHANNELS = 256


@dataclass(frozen=True)
class MemoryPlan:
    """How a conversion spends its memory."""

    threads: int
    chunk_bytes: int  # float32 rows of base and experts in one chunk
    expected_peak: int  # bytes above the interpreter's own, at most
    max_memory: int


def memory_limit(recipe: Recipe, max_memory: int | str | None) -> int:
    """Bytes of a `max_memory`; of None those that suit a 7B, for which a calibration needs more."""
    default = MAX_MEMORY if recipe.calibration is None else CALIBRATED_MAX_MEMORY
    return parse_size(default if max_memory is None else max_memory, "max_memory")


def plan_memory(plan: Plan, max_memory: int, threads: int, chunk_bytes: int = CHUNK_BYTES) -> MemoryPlan:
    """The most threads, up to `threads`, and with them the largest chunk, up to `chunk_bytes`, inside the budget.

    Raises:
        ValueError: the budget is too small for the smallest chunk of the widest matrix at a time.
    """
    held = HELD_BYTES + 8 * budgeted_channels(plan)  # and the number of groups of each
    spending = HELD_BYTES + spending_bytes(plan)  # while no thread works
    fixed = THREAD_BYTES + max(held_bytes(plan, path) + metric_bytes(plan, path) for path in plan.own_modules)
    factor = CHUNK_COPIES + gram_share(plan)
    least = max(row_bytes(plan, path) for path in plan.own_modules)
    if plan.recipe.calibration is not None:
        least = chunk_bytes = least * CALIBRATED_CHANNELS
    for count in range(max(1, min(threads, MAX_THREADS)), 0, -1):
        room = int(((max_memory - held) / count - fixed) / factor)
        if room >= least and (room >= min(chunk_bytes, SMALL_CHUNK_BYTES) or count == 1) and spending <= max_memory:
            chunk = min(room, max(chunk_bytes, least))
            peak = max(held + count * int(fixed + factor * chunk), spending)
            return MemoryPlan(count, chunk, peak, max_memory)
    needed = max(held + fixed + math.ceil(factor * least), spending)
    raise ValueError(
        f"max_memory is {max_memory / 1e9:.2f} GB, expected at least {needed / 1e9:.2f} GB for "
        f"{plan.num_experts} experts of this size"
    )


def budgeted_channels(plan: Plan) -> int:
    """Channels that a budget is shared by; none without one."""
    if plan.budget_parameters is None:
        return 0
    return sum(plan.modules.channel[path].out_features for path in plan.own_modules)


def spending_bytes(plan: Plan) -> int:
    """What sharing a budget takes: costs by number of groups, edges with their sort, sizes and bounds."""
    most = max(plan.row_bounds(path)[1] for path in plan.own_modules)
    return budgeted_channels(plan) * (4 * 8 * most + 64 * (most - 1) + 64)


def metric_bytes(plan: Plan, path: str) -> int:
    """What a thread holds of a calibration: the costs of all groups, covariances, and while one is factored its sum,
    factor and a copy; products and merged rows of one chunk in float64, of two uses."""
    module = plan.modules.channel[path]
    if plan.recipe.calibration is None:
        return 0
    groups = 2 << plan.num_experts if plan.num_experts <= MAX_ENUMERATED else 0
    numbers = module.out_features * (groups + 6 * plan.num_experts)
    numbers += CALIBRATED_CHANNELS * module.in_features * (5 * plan.num_experts + 4)
    if module.kind == "embedding" and path not in {other.tied_to for other in plan.modules.channel.values()}:
        return 8 * numbers
    square = module.in_features**2
    return 8 * numbers + square * (4 * plan.num_experts + 3 * 8) + FACTOR_BYTES


def row_bytes(plan: Plan, path: str) -> int:
    """One channel of the base and all experts in float32."""
    return 4 * plan.modules.channel[path].in_features * (plan.num_experts + 1)


def gram_share(plan: Plan) -> float:
    """Bytes of Gram matrices per byte of a chunk, where rows are narrowest."""
    gram = GRAM_COPIES * 8 * plan.num_experts**2
    return max(gram / row_bytes(plan, path) for path in plan.own_modules)


def held_bytes(plan: Plan, path: str) -> int:
    """What a thread holds for the whole of one module: groups, layout and trim thresholds."""
    module = plan.modules.channel[path]
    most = plan.row_bounds(path)[1]
    rows = module.out_features * most
    groups = module.out_features * plan.num_experts * (2 + 4 + 3 * 8)  # labels, index, owners with their sort
    size = groups + rows * 8 * 8  # channel and owners of each row, before, during and after sorts
    if plan.budget_parameters is not None:
        size += module.out_features * (most * (plan.num_experts + 8) + 8 * plan.num_experts)  # labels, costs, squares
    if plan.recipe.method().needs_threshold:
        names = channel_parameters(plan.modules, path)
        size += plan.num_experts * sum(threshold_bytes(math.prod(plan.shapes[name])) for name in names)
    return size
