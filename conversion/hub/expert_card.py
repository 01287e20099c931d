"""The README.md of one expert that was exported as a plain checkpoint, from the report of the merged one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.hub.model_card import (
    CITATION,
    card_metadata,
    inputs_snippet,
    license_note,
    link_to,
    source_cards,
    write_from_report,
)
from conversion.hub.refinement_section import REFINEMENT
from conversion.io.model_files import CHAT_TEMPLATE
from conversion.io.options import format_share


def write_expert_card(checkpoint: Path, expert: str, out: Path) -> None:
    """Write the card of an expert of the `checkpoint` that was exported to `out`; without a report there is none."""
    chat = (out / CHAT_TEMPLATE).is_file()
    write_from_report(checkpoint, out, lambda report, cards: expert_card(report, cards, expert, chat))


def expert_card(report: Mapping[str, Any], records: Mapping[str, Any], expert: str, chat: bool) -> str:
    """The text of README.md, with its metadata.

    Args:
        report: the conversion report of the merged checkpoint.
        records: from `card_records`.
        expert: the name of the expert.
        chat: there is a chat template.
    """
    experts, cards = report["experts"], source_cards(report, records)
    number = [record["name"] for record in experts].index(expert)
    error = report["relative_errors"][expert]
    exact = error == 0 and REFINEMENT not in report  # which trained the rows after that was measured
    sources, relation = [report["base_model"], *experts], "merge"
    if exact:
        sources, cards, relation = [experts[number]], [cards[number + 1]], None
    title = f"Expert {expert} of a channel-merged model"
    metadata = card_metadata(sources, cards, title, chat, relation=relation)
    origin = (
        f"Its weights are those of {link_to(experts[number])}, bit for bit."
        if exact
        else f"It comes of {link_to(experts[number])} and is not that model: some of its rows were merged with those "
        "of the other experts. The relative error of that, the distance of its weights from that model's over the "
        f"distance of that model's from the base's, is {'not known' if error is None else format_share(error)}."
    )
    return f"""\
---
{metadata.to_yaml().strip()}
---

# {title}

One of {len(experts)} fine-tunes of {link_to(report["base_model"])} that were merged into one model by
*Channel Merging* ([arXiv 2412.15283](https://arxiv.org/abs/2412.15283)), taken out of it as a plain checkpoint that
needs no code of its own. {origin}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

checkpoint, revision = "path/or/repository", "main"  # on the Hub, pin the commit that you have read
tokenizer = AutoTokenizer.from_pretrained(checkpoint, revision=revision)
model = AutoModelForCausalLM.from_pretrained(checkpoint, revision=revision, dtype="auto")

{inputs_snippet(chat)}
answer = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.batch_decode(answer, skip_special_tokens=True))
```

## Limits

- {license_note(metadata)}

## Citation

```bibtex
{CITATION}
```
"""
