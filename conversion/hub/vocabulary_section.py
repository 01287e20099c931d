"""The model card's section on the vocabulary: whether each expert reads and writes as it did alone."""

from collections.abc import Mapping
from typing import Any

from conversion.io import markdown
from conversion.io.model_files import EXPERT_FOLDER
from conversion.io.wording import first_names

MAX_NAMES = 20


def vocabulary_section(vocabulary: Mapping[str, Any]) -> str:
    """The section's text, in Markdown, from the report on the vocabulary."""
    rows = []
    others = [name for name, expert in vocabulary["experts"].items() if expert.get("own_chat_template", True)]
    for name, expert in vocabulary["experts"].items():
        encoding = expert["encoding"]
        same = f"{encoding['same']} of {encoding['samples']}" if encoding else "no tokenizer"
        ends = ", ".join(map(str, expert["eos_token_ids"])) or "-"
        only, lacks = expert["channels_that_only_it_has"], expert["channels_that_it_lacks"]
        rows.append([f"`{name}`", f"{expert['size']:,}", f"{only:,}", f"{lacks:,}", same, ends])
    head = [
        *("expert", "own vocabulary", "only it has", "it lacks"),
        *("sample texts encoded as its own tokenizer did", "ends at"),
    ]
    return f"""\
The vocabulary has {vocabulary["size"]:,} tokens (`tokenizer_source: {vocabulary["source"]}`; the base has
{vocabulary["base_size"]:,}). {_template_note(others)}
The logits of a token that an expert does not have are -inf; in a prompt such a token is the mean of the base's. Each
answer ends at the tokens that end its own expert's answers.

{markdown.table(head, rows)}
{"".join(map(_vocabulary_notes, vocabulary["experts"], vocabulary["experts"].values()))}{_chat_notes(vocabulary)}
An expert's own tokenizer, where all of its tokens are here, is `subfolder="{EXPERT_FOLDER}/NAME"`; the merged ids
of its tokens are in `config.expert_vocabularies`. `channel-merge generate` uses it."""


def _chat_notes(vocabulary: Mapping[str, Any]) -> str:
    """Of which chat templates the router reads more than the user's turns, one line each."""
    turns = vocabulary.get("chat_turns", {})
    notes = [
        f"the router reads prompts in the chat template `{name}` whole: the user's turns cannot be told from the rest "
        f"({reason})"
        for name, reason in turns.get("read_whole", {}).items()
    ]
    if together := turns.get("read_with_system_prompt"):
        notes.append(
            f"the chat templates {_codes(together)} put a system prompt into a turn of the user: the router reads both"
        )
    return "".join(f"\n- {note}" for note in notes) + ("\n" if notes else "")


def _template_note(names: list[str]) -> str:
    """Whose chat template is not the default."""
    if not names:
        return "All experts use the tokenizer's chat template, if it has one."
    return (
        f"Experts with a chat template of their own: {_codes(names)}; "
        f'`tokenizer.apply_chat_template(messages, chat_template="{names[0]}")` takes it by the name. All others use '
        "the default."
    )


def _vocabulary_notes(name: str, expert: Mapping[str, Any]) -> str:
    """What does not hold for one expert, one line each."""
    encoding = expert["encoding"] or {}
    notes = []
    if expert["dropped_tokens"]:
        notes.append(f"these tokens were dropped: {_codes(expert['dropped_tokens'])}")
    if expert["dropped_padding_rows"]:
        notes.append(f"{expert['dropped_padding_rows']:,} padding rows of its embedding were dropped")
    if expert["renamed_tokens"]:
        notes.append(f"the tokenizer calls these of its tokens otherwise: {_codes(expert['renamed_tokens'])}")
    if expert["tokens_without_row"]:
        notes.append(f"its embedding had no row for these of its tokens: {_codes(expert['tokens_without_row'])}")
    if encoding.get("foreign_tokens"):
        notes.append(f"a prompt for it should not hold the others' tokens {_codes(encoding['foreign_tokens'])}")
    if encoding.get("first_difference"):
        notes.append(f"the tokenizer segments otherwise, for example `{encoding['first_difference']['text']!r}`")
    if not encoding.get("same_with_special_tokens", True):
        notes.append("its own tokenizer puts other special tokens around a text, or segments it otherwise")
    return "".join(f"\n- `{name}`: {note}" for note in notes) + ("\n" if notes else "")


def _codes(names: list[str]) -> str:
    return first_names(names, MAX_NAMES, "`{}`".format)
