"""The README.md of a merged checkpoint, written from its conversion_report.json and the evaluation of its router."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData

from conversion.hub.refinement_section import refinement_results, refinement_section
from conversion.hub.source_card import NOT_STATED, SourceCard, read_card
from conversion.hub.vocabulary_section import vocabulary_section
from conversion.io import markdown
from conversion.io.model_files import CARD_FILE, CHAT_TEMPLATE, REPORT_FILE, read_config_file
from conversion.io.options import format_share

logger = logging.getLogger(__name__)

SEVERAL_LICENSES = "several"
BYTES_PER_INDEX = 4
EXAMPLES = ("What is 17 + 25?", "Write a haiku about rain.")
UNKNOWN_ROUTER = """\
## Router

No evaluation of this model's router is known. One that was never trained sends every prompt to the default expert
(`config.router["default_expert"]`), unless `expert_index` says otherwise; one that was trained before an expert was
added or exchanged knows nothing of that expert. `channel-merge train-router` trains it."""

CITATION = """\
@misc{zhang2024channelmerging,
  title         = {Channel Merging: Preserving Specialization for Merged Experts},
  author        = {Mingyang Zhang and Jing Liu and Ganggui Ding and Xinyi Yu and Linlin Ou and Bohan Zhuang},
  year          = {2024},
  eprint        = {2412.15283},
  archivePrefix = {arXiv},
  note          = {AAAI 2025},
}"""


def card_records(report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the report of the checkpoint in `folder` says of its sources' cards: `base`, and `experts` by name.

    An older report says nothing: then the checkpoint's own card speaks for all of them.
    """
    if "cards" in report:
        return report["cards"]
    own = read_card("the checkpoint", folder).record()
    return {"base": own, "experts": {record["name"]: own for record in report["experts"]}}


def card_metadata(
    records: Sequence[Mapping[str, Any]],
    cards: Sequence[SourceCard],
    title: str,
    chat: bool,
    results: Sequence[EvalResult] = (),
    relation: str | None = "merge",
) -> ModelCardData:
    """Metadata for the Hub.

    Args:
        records: of the models that this one comes of, as the report has them.
        cards: theirs. A licence that they do not all have is not this model's.
        title: what the model is called beside its results.
        chat: there is a chat template.
        results: what was measured.
        relation: to those models; None leaves that to the Hub.
    """
    repositories = list(dict.fromkeys(_repository(record) for record in records if record.get("revision")))
    languages = list(dict.fromkeys(language for card in cards for language in card.languages))
    licenses = {(card.license, card.license_name) for card in cards}
    shared = cards[0] if len(licenses) == 1 else SourceCard("other", SEVERAL_LICENSES)
    if not any(card.license for card in cards):
        shared = SourceCard()
    return ModelCardData(
        base_model=repositories or None,
        base_model_relation=relation if repositories else None,
        eval_results=list(results) or None,
        language=languages or None,
        library_name="transformers",
        license=shared.license,
        license_name=shared.license_name,
        license_link=shared.license_link,
        model_name=title if results else None,
        pipeline_tag="text-generation",
        tags=["merge", "channel-merging", *(["conversational"] if chat else [])],
        widget=[{"messages": [{"role": "user", "content": text}]} if chat else {"text": text} for text in EXAMPLES],
    )


def write_card(folder: Path, router: str | None = None, results: Sequence[EvalResult] = ()) -> None:
    """Write the README.md of a checkpoint from its report; without one that can be read, what is there stays.

    Args:
        router: the section about the evaluation of its router; None: nothing is known of it.
        results: the same evaluation for the Hub.
    """
    chat = (folder / CHAT_TEMPLATE).is_file()
    write_from_report(folder, folder, lambda report, cards: model_card(report, cards, chat, router, results))


def write_from_report(folder: Path, out: Path, card: Callable[[Mapping[str, Any], Mapping[str, Any]], str]) -> None:
    """Write a README.md into `out`: what `card(report, cards)` makes of the report of the checkpoint in `folder`."""
    file = folder / REPORT_FILE
    try:
        report = read_config_file(file)
        text = card(report, card_records(report, folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is no report of a conversion (%r), so no %s is written", file, error, CARD_FILE)
        return
    (out / CARD_FILE).write_text(text, encoding="utf-8")


def source_cards(report: Mapping[str, Any], cards: Mapping[str, Any]) -> list[SourceCard]:
    """The cards of the base and of every expert, as `card_records` has them."""
    records = (cards["base"], *(cards["experts"][expert["name"]] for expert in report["experts"]))
    return [SourceCard(**{**record, "languages": tuple(record["languages"])}) for record in records]


def model_card(
    report: Mapping[str, Any],
    records: Mapping[str, Any],
    chat: bool,
    router: str | None = None,
    results: Sequence[EvalResult] = (),
) -> str:
    """The text of README.md, with its metadata.

    Args:
        report: the conversion report.
        records: from `card_records`.
        chat: there is a chat template.
        router, results: as `write_card` takes them.
    """
    base, experts = report["base_model"], report["experts"]
    cards = source_cards(report, records)
    title = f"{len(experts)} experts in one model, merged channel by channel"
    results = [*results, *refinement_results(report)]
    metadata = card_metadata([base, *experts], cards, title, chat, results)
    parameters = report["parameters"]
    share = parameters["stored"] / parameters["experts"]
    return f"""\
---
{metadata.to_yaml().strip()}
---

# {title}

This model holds {len(experts)} fine-tunes ("experts") of {link_to(base)} in
{parameters["stored"]:,} parameters, {share:.1%} of the {parameters["experts"]:,} that they have as separate models.
For every output channel of every matrix the experts' rows were grouped by how alike they are, and each group was
merged into one stored row (*Channel Merging*, [arXiv 2412.15283](https://arxiv.org/abs/2412.15283)). A router reads
the prompt and picks the expert that answers it.

{_source_table(report, cards)}

The relative error is what merging changed: the distance of the rows that an expert reads here from its own, over the
distance of its own from the base's. 0 % is the expert itself, 100 % as far from it as the base.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

checkpoint, revision = "path/or/repository", "main"  # on the Hub, pin the commit that you have read
tokenizer = AutoTokenizer.from_pretrained(checkpoint, revision=revision, padding_side="left", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(checkpoint, revision=revision, dtype="auto", trust_remote_code=True)

{inputs_snippet(chat)}
routed = model.generate(**inputs, max_new_tokens=64)  # the router picks the expert of each prompt
chosen = model.generate(**inputs, max_new_tokens=64, expert_index="{experts[0]["name"]}")  # or you do
print(tokenizer.batch_decode(routed, skip_special_tokens=True))
```

The model needs `trust_remote_code=True` because its architecture is not part of Transformers: its code lies in this
repository beside the weights. The code that runs is that of the revision which you name, so name a commit. The
tokenizer has no code.

{router or UNKNOWN_ROUTER}

## Tokens, chat templates and where answers end

{vocabulary_section(report["vocabulary"])}

## How it was made

```yaml
{yaml.safe_dump(_shown_recipe(report["recipe"]), sort_keys=False, allow_unicode=True).strip()}
```
{_additions(report.get("added_experts", ()))}{_budget_note(report)}
{_size_table(report)}

{_owner_table(report)}

Weights are stored in {report["dtype"]}. Norms and other parameters without channels are kept exactly, one copy per
expert. `{REPORT_FILE}` has the numbers of every module, and the versions:
{", ".join(f"{package} {version}" for package, version in report["versions"].items())}.
{refinement_section(report)}
## Limits

- Where rows were merged, an expert here is not the original expert: measure it on your own task before you rely on it.
- Prompts must have the form that the chosen expert was trained on: its chat template, and see its tokens above.
- {license_note(metadata)}

## Citation

```bibtex
{CITATION}
```
"""


def inputs_snippet(chat: bool) -> str:
    """Code that makes the `inputs` of a prompt."""
    if not chat:
        return f'inputs = tokenizer(["{EXAMPLES[0]}"], return_tensors="pt")'
    return f"""\
messages = [{{"role": "user", "content": "{EXAMPLES[0]}"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""


def _source_table(report: Mapping[str, Any], cards: list[SourceCard]) -> str:
    """The base and the experts: where they are from, what they may be used for, and how much merging changed them."""
    weights = {spec["name"]: f"{spec['weight']:g}" for spec in report["recipe"]["experts"]}
    weights |= {record["name"]: "-" for record in report.get("added_experts", ())}  # merged with nothing
    rows = [("base", report["base_model"], "-", "-")]
    for record in report["experts"]:
        name = record["name"]
        rows.append((f"`{name}`", record, weights[name], format_share(report["relative_errors"][name])))
    return markdown.table(
        ["expert", "model", "revision", "licence", "languages", "weight", "relative error"],
        [
            [
                name,
                link_to(record),
                record.get("revision") or "-",
                card.license_text,
                ", ".join(card.languages) or NOT_STATED,
                weight,
                error,
            ]
            for (name, record, weight, error), card in zip(rows, cards, strict=True)
        ],
    )


def _additions(records: Sequence[Mapping[str, Any]]) -> str:
    """Which experts the recipe does not tell of, and what they cost."""
    if not records:
        return ""
    latest = {record["name"]: record for record in records}
    rows = [
        [
            f"`{name}`{' (exchanged)' if record['replaces'] else ''}",
            f"{record['new_rows']:,}",
            f"{record['reused_rows']:,}",
            f"{record['tolerance']:g}",
        ]
        for name, record in latest.items()
    ]
    return f"""
These experts came after the conversion of this recipe; all others are bit for bit as it left them:

{markdown.table(["expert", "rows of its own", "rows that were there", "tolerance"], rows)}
"""


def _budget_note(report: Mapping[str, Any]) -> str:
    """What the budget bought, and which texts decided it; nothing where there was neither."""
    budget, texts = report["recipe"].get("grouping", {}).get("budget"), report.get("calibration_texts")
    weighed = [module for module in report["modules"].values() if "predicted_loss" in module]
    sentences = []
    if budget is not None and weighed:
        rows = sum(module["rows"] for module in weighed) / sum(module["channels"] for module in weighed)
        sentences.append(
            f"Rows went to the channels where they pay off most, within {budget:.1%} of the experts' parameters: "
            f"a channel has {rows:.2f} on average."
        )
    predicted, one_row = (sum(module[name] for module in weighed) for name in ("predicted_loss", "one_row_loss"))
    if one_row:
        sentences.append(f"The predicted loss is {predicted / one_row:.1%} of that of one row per channel.")
    if texts:
        counts = ", ".join(f"{count:,} of `{name}`" for name, count in texts.items())
        sentences.append(f"What the channels do was measured on calibration texts: {counts}.")
    return "\n" + "\n".join(sentences) + "\n" if sentences else ""


def _size_table(report: Mapping[str, Any]) -> str:
    """Parameters and bytes of the merged model beside those of its experts."""
    parameters, width = report["parameters"], getattr(torch, report["dtype"]).itemsize
    rows = [
        [name, f"{parameters[key]:,}", f"{parameters[key] * width / 1e6:,.1f} MB"]
        for name, key in (
            ("this model", "stored"),
            ("its experts as separate models", "experts"),
            ("its experts, rows that are the same counted once", "experts_distinct"),
        )
        if key in parameters
    ]
    if "indices" in parameters:
        index_bytes = BYTES_PER_INDEX * parameters["indices"]
        rows.append(["channel indices of this model", "", f"{index_bytes / 1e6:,.1f} MB"])
    return markdown.table(["", "parameters", f"in {report['dtype']}"], rows)


def _owner_table(report: Mapping[str, Any]) -> str:
    """How many experts the stored rows serve."""
    owners: dict[int, int] = {}
    for module in report["modules"].values():
        for names, count in module["owners"].items():
            owners[names.count("+") + 1] = owners.get(names.count("+") + 1, 0) + count
    total = sum(owners.values())
    rows = [[str(size), f"{count:,}", f"{count / total:.1%}"] for size, count in sorted(owners.items())]
    return markdown.table(["owners of a row", "rows", "share"], rows)


def license_note(metadata: ModelCardData) -> str:
    """What the licences of its sources mean for a model, in one sentence."""
    if metadata.license is None:
        return "No model card of the base or of an expert states a licence: find out what they allow before use."
    if metadata.license_name == SEVERAL_LICENSES:
        return "The licences of the base model and of every expert apply together; the table above has them all."
    return "The base model and all experts state the same licence, which applies here too."


def _repository(record: Mapping[str, Any]) -> str:
    """The Hub id of a source without the revision that the recipe asked for."""
    return record["model"].partition("@")[0]


def link_to(record: Mapping[str, Any]) -> str:
    """A source for a reader: its place on the Hub, or its name."""
    if not record.get("revision"):
        return f"`{_without_folder(record['model'])}`"
    return f"[{_repository(record)}](https://huggingface.co/{_repository(record)}/tree/{record['revision']})"


def _shown_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    experts = [{**expert, "model": _without_folder(expert["model"])} for expert in recipe["experts"]]
    return {**recipe, "base_model": _without_folder(recipe["base_model"]), "experts": experts}


def _without_folder(model: str) -> str:
    """A model as older reports have it, without where on its author's machine it lay."""
    path = Path(model)
    return path.name if path.is_absolute() or model.startswith((".", "~")) else model
