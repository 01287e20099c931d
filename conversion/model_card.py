"""The README.md of a merged checkpoint: everything in it comes from the run and from the experts' own cards."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from conversion.model_source import Source
from conversion.plan import Plan

logger = logging.getLogger(__name__)

REPORT_FILE = "conversion_report.json"
CARD_FILE = "README.md"
NOT_STATED = "not stated"
SEVERAL_LICENSES = "several"
BYTES_PER_INDEX = 4

CITATION = """\
@misc{zhang2024channelmerging,
  title         = {Channel Merging: Preserving Specialization for Merged Experts},
  author        = {Mingyang Zhang and Jing Liu and Ganggui Ding and Xinyi Yu and Linlin Ou and Bohan Zhuang},
  year          = {2024},
  eprint        = {2412.15283},
  archivePrefix = {arXiv},
  note          = {AAAI 2025},
}"""


@dataclass(frozen=True)
class SourceCard:
    """What the model card of the base or of an expert says of its licence and its languages."""

    license: str | None = None
    license_name: str | None = None  # of a licence that the Hub only knows as "other"
    license_link: str | None = None
    languages: tuple[str, ...] = ()

    @property
    def license_text(self) -> str:
        """The licence for a reader, with its link if it has one."""
        name = self.license_name or self.license or NOT_STATED
        is_address = (self.license_link or "").startswith(("https://", "http://"))
        return f"[{name}]({self.license_link})" if is_address else name


def read_card(source: Source) -> SourceCard:
    """Licence and languages from the README.md of a checkpoint; nothing where there is none that can be read."""
    file = source.folder / CARD_FILE
    if not file.is_file():
        return SourceCard()
    try:
        metadata = metadata_load(file) or {}
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("%s: the metadata of %s cannot be read: %s", source.name, file, " ".join(str(error).split()))
        return SourceCard()
    licenses = [str(value) for value in _listed(metadata.get("license"))]
    return SourceCard(
        license=" and ".join(licenses) or None,
        license_name=metadata.get("license_name"),
        license_link=metadata.get("license_link"),
        # Unquoted, the code of Norwegian is YAML's word for false.
        languages=tuple("no" if value is False else str(value) for value in _listed(metadata.get("language"))),
    )


def card_metadata(plan: Plan, cards: list[SourceCard]) -> ModelCardData:
    """Metadata for the Hub.

    Args:
        cards: of the base and of every expert. A licence that they do not all have is not the merged model's.
    """
    sources = (plan.base, *plan.experts)
    repositories = list(dict.fromkeys(source.repository for source in sources if source.revision))
    languages = list(dict.fromkeys(language for card in cards for language in card.languages))
    licenses = {(card.license, card.license_name) for card in cards}
    shared = cards[0] if len(licenses) == 1 else SourceCard("other", SEVERAL_LICENSES)
    if not any(card.license for card in cards):
        shared = SourceCard()
    return ModelCardData(
        base_model=repositories or None,
        base_model_relation="merge" if repositories else None,
        language=languages or None,
        library_name="transformers",
        license=shared.license,
        license_name=shared.license_name,
        license_link=shared.license_link,
        pipeline_tag="text-generation",
        tags=["merge", "channel-merging"],
    )


def model_card(plan: Plan, report: Mapping[str, Any], vocabulary: str) -> str:
    """The text of README.md, with its metadata.

    Args:
        report: the conversion report.
        vocabulary: the section about tokens and chat templates.
    """
    cards = [read_card(source) for source in (plan.base, *plan.experts)]
    metadata = card_metadata(plan, cards)
    parameters = report["parameters"]
    share = parameters["stored"] / parameters["experts"]
    first = plan.expert_names[0]
    return f"""\
---
{metadata.to_yaml().strip()}
---

# {plan.num_experts} experts in one model, merged channel by channel

This model holds {plan.num_experts} fine-tunes ("experts") of {_link(plan.base)} in
{parameters["stored"]:,} parameters, {share:.1%} of the {parameters["experts"]:,} that they have as separate models.
For every output channel of every matrix the experts' rows were grouped by how alike they are, and each group was
merged into one stored row (*Channel Merging*, [arXiv 2412.15283](https://arxiv.org/abs/2412.15283)). A router reads
the prompt and picks the expert that answers it.

{_source_table(plan, report, cards)}

The relative error is what merging changed: the distance of the rows that an expert reads here from its own, over the
distance of its own from the base's. 0 % is the expert itself, 100 % as far from it as the base.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

checkpoint, revision = "path/or/repository", "main"  # on the Hub, pin the commit that you have read
tokenizer = AutoTokenizer.from_pretrained(checkpoint, revision=revision, padding_side="left", trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(checkpoint, revision=revision, dtype="auto", trust_remote_code=True)

inputs = tokenizer(["Your prompt"], return_tensors="pt")
routed = model.generate(**inputs, max_new_tokens=64)  # the router picks the expert of each prompt
chosen = model.generate(**inputs, max_new_tokens=64, expert_index="{first}")  # or you do
print(tokenizer.batch_decode(chosen, skip_special_tokens=True))
```

The model needs `trust_remote_code=True` because its architecture is not part of Transformers: its code lies in this
repository beside the weights. The code that runs is that of the revision which you name, so name a commit. The
tokenizer has no code.

## Tokens, chat templates and where answers end

{vocabulary}

## How it was made

```yaml
{yaml.safe_dump(plan.recipe.record(), sort_keys=False, allow_unicode=True).strip()}
```

{_size_table(plan, report)}

{_owner_table(report)}

Weights are stored in {report["dtype"]}. Norms and other parameters without channels are kept exactly, one copy per
expert. `{REPORT_FILE}` has the numbers of every module, and the versions:
{", ".join(f"{package} {version}" for package, version in report["versions"].items())}.

## Limits

- The conversion itself trains nothing. Until its router is trained, every prompt is answered by `{first}` unless
  `expert_index` says otherwise.
- Where rows were merged, an expert here is not the original expert: measure it on your own task before you rely on it.
- Prompts must have the form that the chosen expert was trained on: its chat template, and see its tokens above.
- {_license_note(metadata)}

## Citation

```bibtex
{CITATION}
```
"""


def _source_table(plan: Plan, report: Mapping[str, Any], cards: list[SourceCard]) -> str:
    """The base and the experts: where they are from, what they may be used for, and how much merging changed them."""
    rows = [(_link(plan.base), plan.base, cards[0], "-", "-")]
    for source, spec, card in zip(plan.experts, plan.recipe.experts, cards[1:], strict=True):
        error = report["relative_errors"][source.name]
        rows.append((_link(source), source, card, f"{spec.weight:g}", "-" if error is None else f"{error:.1%}"))
    lines = [
        f"| {'base' if source is plan.base else f'`{source.name}`'} | {link} | {source.revision or '-'} "
        f"| {card.license_text} | {', '.join(card.languages) or NOT_STATED} | {weight} | {error} |"
        for link, source, card, weight, error in rows
    ]
    head = "| expert | model | revision | licence | languages | weight | relative error |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *lines])


def _size_table(plan: Plan, report: Mapping[str, Any]) -> str:
    """Parameters and bytes of the merged model beside those of its experts."""
    parameters, width = report["parameters"], plan.dtype.itemsize
    index_bytes = BYTES_PER_INDEX * plan.num_experts * sum(part.out_features for part in plan.modules.channel.values())
    lines = [
        f"| {name} | {count:,} | {count * width / 1e6:,.1f} MB |"
        for name, count in (
            ("this model", parameters["stored"]),
            ("its experts as separate models", parameters["experts"]),
            ("its experts, rows that are the same counted once", parameters["experts_distinct"]),
        )
    ]
    lines.append(f"| channel indices of this model | | {index_bytes / 1e6:,.1f} MB |")
    return "\n".join([f"| | parameters | in {report['dtype']} |", "|---|---|---|", *lines])


def _owner_table(report: Mapping[str, Any]) -> str:
    """How many experts the stored rows serve."""
    owners: dict[int, int] = {}
    for module in report["modules"].values():
        for names, count in module["owners"].items():
            owners[names.count("+") + 1] = owners.get(names.count("+") + 1, 0) + count
    total = sum(owners.values())
    lines = [f"| {size} | {count:,} | {count / total:.1%} |" for size, count in sorted(owners.items())]
    return "\n".join(["| owners of a row | rows | share |", "|---|---|---|", *lines])


def _license_note(metadata: ModelCardData) -> str:
    if metadata.license is None:
        return "No model card of the base or of an expert states a licence: find out what they allow before use."
    if metadata.license_name == SEVERAL_LICENSES:
        return "The licences of the base model and of every expert apply together; the table above has them all."
    return "The base model and all experts state the same licence, which applies here too."


def _link(source: Source) -> str:
    if source.revision is None:
        return f"`{source.model}`"
    return f"[{source.repository}](https://huggingface.co/{source.repository}/tree/{source.revision})"


def _listed(value: Any) -> list[Any]:
    """A value of the metadata that may be one or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
