"""The markers by which a model finds the user's turns in a prompt's token ids, derived from its chat templates.

Conversations are rendered that differ in one message only: what their ids have in common before and behind it is
the template's. A template's markers are kept where by them every turn of other conversations is found and read as the
router reads it of a rendering of that turn alone; otherwise the report says why its prompts are read whole.
"""

import logging
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from conversion.io.wording import one_line
from conversion.vocabulary.own_vocabulary import DEFAULT_TEMPLATE, named_templates
from modeling_channel_merged.chat_turns import ChatMarkers, ChatTurns

logger = logging.getLogger(__name__)

Ids = list[int]
Message = dict[str, Any]
Role = Callable[[str], Message]

# Texts whose beginnings and ends have nothing in common.
PLAIN = ("What is it", "今天星期几", "Tell me of a b c", "écris vite")
# A tokenizer may join their edges with what stands beside them.
OTHERS = (
    "17 + 25?",
    "  spaced ",
    "a line\n",
    "\tx\t",
    "\nprint(a[0])\n\n",
    '"Why"...',
    "**1.** Say (all) of this:\n\n- m[i][j] <b> {x}\n\n## Heading\n\nEnd!",
    "今天星期三，明天星期几？",
    *(f"{mark}x y{mark}" for mark in string.punctuation),
)
TEXTS = (*PLAIN, *OTHERS)
ANSWERS = ("It is so", "不知道", "\n\n- 42.", "1 + (2)", "Oui", '"a"')
TOOL_CALL_ID = "call00001"  # of nine letters and digits, as Mistral's templates want them


@dataclass(frozen=True)
class DerivedTurns:
    """What came of the chat templates.

    Attributes:
        turns: the markers; None without any.
        whole: the templates whose prompts the router reads whole, by name, and why.
        with_system: the templates whose system prompts it reads, too, as they are a part of a turn of the user.
    """

    turns: ChatTurns | None
    whole: dict[str, str]
    with_system: list[str]

    def record(self) -> dict[str, Any]:
        """What the report says of them."""
        return {"read_whole": self.whole, "read_with_system_prompt": self.with_system}


def derive_turns(tokenizer: PreTrainedTokenizerBase | None) -> DerivedTurns:
    """The markers of all chat templates of a checkpoint's tokenizer, the default one's first; warns where it has none.

    The router's frame is that of the default template: without it there are no markers at all.
    """
    templates = named_templates(tokenizer)
    names = sorted(templates, key=lambda name: name != DEFAULT_TEMPLATE)
    found: dict[str, ChatTurns | str] = {}
    with_system = set()
    for text in dict.fromkeys(templates[name] for name in names):
        template = Template(tokenizer, text)
        try:
            found[text] = template.turns()
            if template.takes(system("text"), user("text")) and not template.tells_apart(found[text]):
                with_system.add(text)
        except Exception as error:  # whatever a template makes of messages
            found[text] = one_line(error) or type(error).__name__
    whole = {name: found[templates[name]] for name in names if isinstance(found[templates[name]], str)}
    if names and names[0] in whole:
        whole = dict.fromkeys(names, whole[names[0]])
    for name, reason in whole.items():
        logger.warning(
            "chat template %r: the user's turns cannot be found in token ids (%s), so the router reads its prompts "
            "whole where it is not given `router_inputs`",
            name,
            reason,
        )
    frames = [found[templates[name]] for name in names if name not in whole]
    if not frames:
        return DerivedTurns(None, whole, [])
    markers = []
    for frame in frames:
        markers += [own for own in frame.templates if own not in markers]
    together = [name for name in names if name not in whole and templates[name] in with_system]
    return DerivedTurns(replace(frames[0], templates=markers), whole, together)


class Template:
    """One chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str):
        self.tokenizer = tokenizer
        self.text = text
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def ids(self, *messages: Message) -> Ids:
        """A conversation's ids, up to where an answer begins; as `apply_chat_template` gives them."""
        text = self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.text, add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def takes(self, *messages: Message) -> bool:
        """Whether the template can render such a conversation."""
        try:
            self.ids(*messages)
        except Exception:  # of its own, to say that it cannot, or by mistake
            return False
        return True

    def turns(self) -> ChatTurns:
        """The template's frame of one turn and its markers. Raises ValueError where turns are not found by them."""
        before, after = self.frame(TEXTS)
        near_before, near_after = self.frame(PLAIN)
        first = list(before)
        while first[:1] == self.bos != []:
            del first[0]
        followed = common_start(
            common_end(self.ids(user(text), assistant(answer), user("more")) for text in TEXTS) for answer in ANSWERS
        )
        markers = ChatMarkers(
            first=first,
            openings=[self.opening(assistant, ANSWERS)],
            end=common_start([after, followed]) or followed,  # nothing follows where no answer is asked for
            tools=[],
            lead=near_before[len(before) :],
            tail=near_after[: len(near_after) - len(after)],
        )
        if not (first and markers.end and markers.openings[0]):
            raise ValueError("it writes nothing before, between or behind them")
        separator = common_end(
            common_start(self.ids(user(f"{one}\n\n{other}")) for other in PLAIN)[len(near_before) :] for one in PLAIN
        )
        turns = ChatTurns(before, after, markers.lead, markers.tail, separator, self.bos, [markers])
        turns = with_markers(turns, tools=self.tools(turns))
        if self.takes(system("text"), user("text")):
            opening = self.opening(system, TEXTS)
            wider = with_markers(turns, openings=[*markers.openings, opening])
            if opening and opening not in markers.openings and self.tells_apart(wider):
                turns = wider
        self.check(turns)
        return turns

    def frame(self, texts: Iterable[str]) -> tuple[Ids, Ids]:
        """What stands before and behind a single turn of the user."""
        rendered = [self.ids(user(text)) for text in texts]
        return common_start(rendered), common_end(rendered)

    def opening(self, role: Role, texts: Iterable[str]) -> Ids:
        """What stands between the end of a role's turn and the beginning of the user's."""
        lead = [user("first")] if role is assistant else []
        return common_end(common_start(self.ids(*lead, role(text), user(turn)) for turn in TEXTS) for text in texts)

    def tells_apart(self, turns: ChatTurns) -> bool:
        """Whether the user's turn is found behind a system prompt."""
        found = (turns.router_query(self.ids(system("Be kind."), user(text)), "last_user_turn") for text in TEXTS)
        return all(query == self.ids(user(text)) for query, text in zip(found, TEXTS))

    def tools(self, turns: ChatTurns) -> list[Ids]:
        """What tells the turn of a tool from the user's, where the template opens both alike."""
        if not self.takes(user("first"), *tool_turn("text")):
            return []
        before = common_start(self.ids(user("first"), *tool_turn(text)) for text in TEXTS)
        found = turns.find(before, turns.templates[0])
        return [before[found[1][0] :]] if len(found) > 1 else []

    def check(self, turns: ChatTurns):
        """Raise ValueError where the router would read another turn, or the same one segmented otherwise."""
        for text in TEXTS:
            asked = [user("first"), assistant("An answer."), user("second?"), assistant("1"), user(text)]
            conversations = {"one turn": asked[-1:], "several turns": asked, "an answer": [*asked, assistant("So")]}
            if self.takes(*asked, *tool_turn("It rains.")):
                conversations["what a tool says"] = [*asked, *tool_turn("It rains.")]
            for kind, messages in conversations.items():
                ids = self.ids(*messages)
                number = len(turns.find(ids, turns.templates[0]))
                if turns.router_query(ids, "last_user_turn") != self.ids(user(text)) or number > 3:
                    raise ValueError(f"by what stands around them, {text!r} is not found in {kind}")


def with_markers(turns: ChatTurns, **changes: Any) -> ChatTurns:
    return replace(turns, templates=[replace(markers, **changes) for markers in turns.templates])


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def tool_turn(content: str) -> list[Message]:
    """The call of a tool, and what it says."""
    call = {"id": TOOL_CALL_ID, "type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "look", "tool_call_id": TOOL_CALL_ID, "content": content},
    ]


def common_start(lists: Iterable[Ids]) -> Ids:
    """The ids that all lists begin with."""
    first, *others = lists
    size = next((place for place, row in enumerate(zip(first, *others)) if len({*row}) > 1), None)
    return first[: min(map(len, (first, *others))) if size is None else size]


def common_end(lists: Iterable[Ids]) -> Ids:
    """The ids that all lists end in."""
    return common_start(ids[::-1] for ids in lists)[::-1]
