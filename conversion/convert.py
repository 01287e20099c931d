"""Conversion in two passes over the checkpoints, in row chunks.

The first pass groups the experts' rows of every channel and lays out every matrix; with that the headers of the output
are known. The second pass reads again and writes the merged rows to their final places. What the first pass decides
lies in files of the staging folder until the second reads it, module by module, so that memory is bounded by the
chunk; no result depends on its size. With a calibration the experts run on their texts before all this, and the first
pass reads twice: what each group of experts would cost comes from the weights, too. Modules are worked on side by
side, one thread each: that uses several cores better than splitting the small operations of one module.

A journal in the staging folder has the hashes of the first pass's files and of every finished shard. The same
conversion goes on from there after it was stopped, and gives the same bytes.

Shapes: N experts, C channels of one chunk, O channels, I inputs, R rows, M members of a group.
"""

import contextlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from conversion.hub.conversion_report import add_relative_errors, conversion_report, package_versions
from conversion.hub.model_folder import write_hub_files
from conversion.io.code_hash import code_hash
from conversion.io.foreign_files import read_json
from conversion.io.model_files import REPORT_FILE
from conversion.io.options import find_device, parse_size
from conversion.io.shard_writer import ShardWriter
from conversion.io.sources import check_unchanged
from conversion.io.staged_folder import StagedFolder, check_disk_space, is_result
from conversion.merging.block_reader import BlockReader
from conversion.merging.calibration_source import find_calibration
from conversion.merging.channel_costs import ChannelCosts
from conversion.merging.grouped_module import all_modules
from conversion.merging.grouping_pass import group_modules
from conversion.merging.memory_budget import CHUNK_BYTES, memory_limit, plan_memory
from conversion.merging.merging_pass import output_tensors, write_modules
from conversion.merging.plan import Plan, make_plan
from conversion.merging.recipe import Recipe, load_recipe
from conversion.merging.workers import Workers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: where it is, and what conversion_report.json says."""

    folder: Path
    report: dict[str, Any]


def convert(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    overwrite: bool = False,
    reuse: bool = False,
    max_memory: int | str | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    max_shard_size: int | str = "5GB",
    device: str = "cpu",
    progress: bool = True,
) -> Conversion:
    """Merge the experts of a recipe into one channel-merged checkpoint; what it says of refining is only checked.

    A conversion that is stopped keeps its finished parts in a hidden folder beside `out`; the same call goes on from
    there. Changed inputs, another recipe or another version start afresh.

    Args:
        recipe: a recipe, or the path of its YAML file.
        out: the folder to make. It appears only when it is complete.
        overwrite: replace a model folder that is there.
        reuse: leave it where this very conversion made it.
        max_memory: memory that may be used beside the interpreter's own, and while experts are calibrated beside one
            expert's weights: bytes or a size such as "2GB"; None: 2GB, with a calibration 7GB. No result depends on
            it, nor on the next.
        chunk_bytes: the most bytes of float32 rows that a thread takes at a time.
        max_shard_size: largest safetensors file, bytes or a size such as "5GB".
        device: where the arithmetic runs.
        progress: show a progress bar.

    Raises:
        ValueError: the recipe, the checkpoints, the output folder or the budget are not as they must be.
        OSError: a file cannot be read or written.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if recipe.refine is not None:  # the libraries that training needs are slow to load
        from conversion.refinement.training_arguments import check_recipe_options

        check_recipe_options(recipe, use_cpu=device == "cpu")
    out = Path(out)
    shard_bytes = parse_size(max_shard_size)
    plan = make_plan(recipe, out, overwrite=overwrite)
    memory = plan_memory(plan, memory_limit(recipe, max_memory), torch.get_num_threads(), chunk_bytes)
    torch_device = find_device(device)
    source = find_calibration(plan, memory.max_memory, torch.get_num_threads() if torch_device.type == "cpu" else 1)
    if source is None and plan.recipe.preset == "recommended":
        logger.warning(
            "the recommended preset has no calibration texts: rows are shared by how the weights look, which keeps "
            "less of the experts than calibration: {data: ...} would"
        )
    blocks = BlockReader(plan, memory.chunk_bytes, torch_device)
    fingerprint = conversion_fingerprint(
        plan,
        calibration=source and source.identity,
        max_shard_size=shard_bytes,
        device=str(torch_device),
    )
    if reuse and is_result(out, fingerprint):
        return Conversion(out, read_json(out / REPORT_FILE))
    check_disk_space(out, plan.max_bytes + (source.disk_bytes if source else 0), fingerprint)
    with contextlib.ExitStack() as stack:
        staged = stack.enter_context(StagedFolder(out, overwrite, fingerprint))
        for reader in (plan.base_reader, *plan.readers):
            stack.callback(reader.close)
        costs = None
        if source is not None:
            calibration = source.open(staged.journal, torch_device, progress)
            stack.callback(calibration.close)
            costs = ChannelCosts(plan, calibration, torch_device)
        total = plan.times_read * plan.bytes_to_read
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, disable=not progress, dynamic_ncols=True)
        )
        workers = Workers(memory.threads, blocks.stop)
        bar.set_description("grouping channels")
        grouped = group_modules(plan, costs, blocks, workers, staged.journal, bar)
        report = conversion_report(plan, grouped, source and source.texts)
        bar.set_description("merging rows")
        writer = ShardWriter(staged.path, output_tensors(plan, grouped), shard_bytes, staged.journal)
        stack.callback(writer.close)
        errors = write_modules(plan, costs, blocks, workers, grouped, writer, staged.journal, bar)
        add_relative_errors(report, plan, grouped, errors)
        writer.finish({"total_parameters": report["parameters"]["stored"]})
        bar.set_description("writing files")
        rows = {path: module.num_rows for path, module in all_modules(plan, grouped).items()}
        config = write_hub_files(staged.path, plan, rows, report)
        check_unchanged((plan.base, *plan.experts))
        staged.publish(config)
    return Conversion(out, report)


def conversion_fingerprint(plan: Plan, **choices: Any) -> dict[str, Any]:
    """Everything that the bytes of a conversion depend on: recipe, input files, versions, this code."""
    values = {
        "recipe": plan.recipe.record(),
        "inputs": {source.name: source.files for source in (plan.base, *plan.experts)},
        "versions": package_versions(),
        "code": code_hash(),
        **choices,
    }
    return json.loads(json.dumps(values))
