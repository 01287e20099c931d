"""Everything in a merged checkpoint's folder but its weights: config, code, tokenizer, model card, report."""

import importlib.metadata
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import AutoTokenizer, GenerationConfig

import modeling_channel_merged
from conversion.plan import Plan, Source
from modeling_channel_merged.configuration_channel_merged import ChannelMergedConfig

if TYPE_CHECKING:
    from conversion.convert import GroupedModule

logger = logging.getLogger(__name__)

REPORT_FILE = "conversion_report.json"
CARD_FILE = "README.md"
PACKAGE = "channel-merged"
RECORDED_PACKAGES = (PACKAGE, "torch", "transformers", "safetensors")

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)

CITATION = """\
@misc{zhang2024channelmerging,
  title         = {Channel Merging: Preserving Specialization for Merged Experts},
  author        = {Mingyang Zhang and Jing Liu and Ganggui Ding and Xinyi Yu and Linlin Ou and Bohan Zhuang},
  year          = {2024},
  eprint        = {2412.15283},
  archivePrefix = {arXiv},
  note          = {AAAI 2025},
}"""


def conversion_report(plan: Plan, grouped: Mapping[str, "GroupedModule"]) -> dict[str, Any]:
    """What was merged from what, and what came of it, as plain values. The same for every run of the same recipe."""
    names = plan.expert_names
    modules = {}
    stored = distinct = 0
    for path, module in grouped.items():
        spec = plan.modules.channel[path]
        row_size = spec.in_features + spec.bias
        stored += module.num_rows * row_size
        distinct += module.num_distinct * row_size
        modules[path] = {
            "kind": spec.kind,
            "channels": spec.out_features,
            "inputs": spec.in_features,
            "rows": module.num_rows,
            "merged_rows": int((~module.copied).sum()),
            "distinct_rows": module.num_distinct,
            "owners": module.owner_counts(names),
        }
    kept = plan.num_experts * plan.per_expert_parameters
    return {
        **merge_record(plan),
        "parameters": {
            "stored": stored + kept,
            "experts_distinct": distinct + kept,
            "experts": plan.expert_parameters,
        },
        "modules": modules,
    }


def merge_record(plan: Plan) -> dict[str, Any]:
    """How the merge was made: recipe, sources, method, seed, versions."""
    return {
        "recipe": plan.recipe.record(),
        "base_model": plan.base.record(),
        "experts": [expert.record() for expert in plan.experts],
        "method": plan.recipe.merge_method,
        "seed": plan.recipe.seed,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that the result may depend on, of those that are installed."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_hub_files(folder: Path, plan: Plan, rows: Mapping[str, int], report: Mapping[str, Any]) -> str:
    """Write everything but the weights and config.json into a new checkpoint folder.

    Returns:
        The text of config.json, which belongs there last.
    """
    write_code(folder)
    if not write_tokenizer(folder, plan.base):
        logger.warning("the base model %s has no tokenizer files: the merged model has none", plan.base.model)
    write_generation_config(folder, plan)
    write_json(folder / REPORT_FILE, report)
    (folder / CARD_FILE).write_text(model_card(plan, report), encoding="utf-8")
    return merged_config(plan, rows, report).to_json_string(use_diff=True)


def merged_config(plan: Plan, rows: Mapping[str, int], report: Mapping[str, Any]) -> ChannelMergedConfig:
    """The merged model's config."""
    text_config = plan.text_config.to_dict()
    text_config["dtype"] = str(plan.dtype).removeprefix("torch.")
    text_config.pop("_name_or_path", None)
    return ChannelMergedConfig(
        text_config=text_config,
        expert_names=plan.expert_names,
        num_experts=plan.num_experts,
        rows=dict(rows),
        merge={**merge_record(plan), "parameters": report["parameters"]},
        architectures=["ChannelMergedForCausalLM"],
        dtype=plan.dtype,
    )


def write_code(folder: Path) -> None:
    """Copy the model's code beside its weights, so that it loads where this package is not installed."""
    for file in sorted(Path(modeling_channel_merged.__file__).parent.glob("*.py")):
        if file.name != "__init__.py":
            shutil.copyfile(file, folder / file.name)


def write_tokenizer(folder: Path, base: Source) -> bool:
    """Copy the base's tokenizer; False if it has none."""
    files = sorted({file for pattern in TOKENIZER_FILES for file in base.folder.glob(pattern) if file.is_file()})
    for file in files:
        target = folder / file.relative_to(base.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    if files:
        _name_tokenizer_class(folder, base)
    return bool(files)


def write_generation_config(folder: Path, plan: Plan) -> None:
    """Copy the base's generation config, or derive one from its config."""
    file = plan.base.folder / "generation_config.json"
    if file.exists():
        shutil.copyfile(file, folder / file.name)
    else:
        GenerationConfig.from_model_config(plan.text_config).save_pretrained(folder)


def model_card(plan: Plan, report: Mapping[str, Any]) -> str:
    """The README.md of the checkpoint, all of it from the conversion itself."""
    recipe = plan.recipe
    repositories = [source.model.partition("@")[0] for source in (plan.base, *plan.experts) if source.revision]
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "channel-merging"],
    }
    if repositories:
        metadata |= {"base_model": list(dict.fromkeys(repositories)), "base_model_relation": "merge"}
    parameters = report["parameters"]
    share = parameters["stored"] / parameters["experts"]
    first = plan.expert_names[0]
    experts = "\n".join(
        f"| `{source.name}` | {_link(source)} | {source.revision or ''} | {spec.weight:g} |"
        for source, spec in zip(plan.experts, recipe.experts, strict=True)
    )
    owners: dict[int, int] = {}
    for module in report["modules"].values():
        for names, count in module["owners"].items():
            owners[names.count("+") + 1] = owners.get(names.count("+") + 1, 0) + count
    total_rows = sum(owners.values())
    shares = "\n".join(f"| {size} | {count:,} | {count / total_rows:.1%} |" for size, count in sorted(owners.items()))
    return f"""\
---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {plan.num_experts} experts in one model, merged channel by channel

This model holds {plan.num_experts} fine-tunes ("experts") of {_link(plan.base)} in
{parameters["stored"]:,} parameters, {share:.1%} of the {parameters["experts"]:,} that they have as separate models.
For every output channel of every matrix the experts' rows were grouped by how alike they are, and each group was
merged into one stored row (*Channel Merging*, [arXiv 2412.15283](https://arxiv.org/abs/2412.15283)). A router reads
the prompt and picks the expert that answers it.

| expert | model | revision | weight |
|---|---|---|---|
{experts}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

checkpoint, revision = "path/or/repository", "main"  # on the Hub, pin the commit that you have read
pinned = {{"revision": revision, "trust_remote_code": True}}
tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left", **pinned)
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", **pinned)

inputs = tokenizer(["Your prompt"], return_tensors="pt")
routed = model.generate(**inputs, max_new_tokens=64)  # the router picks the expert of each prompt
chosen = model.generate(**inputs, max_new_tokens=64, expert_index="{first}")  # or you do
print(tokenizer.batch_decode(chosen, skip_special_tokens=True))
```

`trust_remote_code=True` is needed because the architecture is not part of Transformers: its code lies in this
repository beside the weights.

## How it was made

```yaml
{yaml.safe_dump(recipe.record(), sort_keys=False, allow_unicode=True).strip()}
```

| owners of a row | rows | share |
|---|---|---|
{shares}

Weights are stored in {report["dtype"]}. Norms and other parameters without channels are kept exactly, one copy per
expert. `{REPORT_FILE}` has the numbers of every module, and the versions: {_listed(report["versions"])}.

## Limits

- The conversion itself trains nothing. Until its router is trained, every prompt is answered by `{first}` unless
  `expert_index` says otherwise.
- Where rows were merged, an expert here is not the original expert: measure it on your own task before you rely on it.
- Tokenizer, chat template and generation defaults are the base model's; prompts must have the form that the chosen
  expert was trained on.
- The licences of the base model and of every expert apply.

## Citation

```bibtex
{CITATION}
```
"""


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _name_tokenizer_class(folder: Path, base: Source) -> None:
    """Write down the tokenizer's class: one that is only known from the base's model type would not be found here."""
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if "tokenizer_class" in values:
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        logger.warning("the tokenizer of %s cannot be loaded, its files are only copied: %s", base.model, error)
        return
    write_json(file, {**values, "tokenizer_class": type(tokenizer).__name__})


def _link(source: Source) -> str:
    repository = source.model.partition("@")[0]
    return f"[{repository}](https://huggingface.co/{repository})" if source.revision else f"`{source.model}`"


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())
