"""The user's turns of a chat, found in its token ids by what its template writes around them.

The markers are derived where a checkpoint is made, and checked there by rendering conversations; they are token ids,
as a model has no tokenizer. A turn begins where a conversation begins or where what came before it ends: a marker that
a user types inside of a turn begins none, where the template ends answers with a token of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Ids = list[int]


@dataclass(frozen=True)
class ChatMarkers:
    """What one chat template writes around a turn of the user.

    Attributes:
        first: from the beginning of a conversation to its first turn, without the token that begins a text.
        openings: what ends a turn of somebody else and begins one of the user.
        end: what ends a turn of the user and begins an answer.
        tools: what follows an opening where the template gives the user's role to what a tool says.
        lead, tail: white space of the template around most turns; it may be one token with that of the turn.
    """

    first: Ids
    openings: list[Ids]
    end: Ids
    tools: list[Ids]
    lead: Ids
    tail: Ids


@dataclass(frozen=True)
class ChatTurns:
    """How the router reads a chat: the markers by which turns are found, and the frame that it was trained with.

    Attributes:
        before, after: the default template's frame of one turn; lead, tail: its white space.
        separator: between two turns that are read together.
        bos: the token that may stand at the beginning of a text, any number of times; empty where there is none.
        templates: the markers of each template whose turns can be found, the default one's first.
    """

    before: Ids
    after: Ids
    lead: Ids
    tail: Ids
    separator: Ids
    bos: Ids
    templates: list[ChatMarkers]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ChatTurns":
        """What `to_dict` gave. Raises TypeError or ValueError for anything else."""
        templates = [ChatMarkers(**markers) for markers in values["templates"]]
        turns = cls(**{**values, "templates": templates})
        lists = [turns.before, turns.after, turns.lead, turns.tail, turns.separator, turns.bos]
        for markers in templates:
            lists += [markers.first, markers.end, markers.lead, markers.tail, *markers.openings, *markers.tools]
        if any(not isinstance(ids, list) or any(type(number) is not int for number in ids) for ids in lists):
            raise ValueError("a marker is no list of token ids")
        if any(not ids for markers in templates for ids in (markers.first, markers.end, *markers.openings)):
            raise ValueError("a marker is empty")
        return turns

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def router_query(self, ids: Ids, context: str) -> Ids | None:
        """What the router reads of a prompt: its last turn of the user, or all of them; None where it has none.

        The same as a rendering of that turn alone; only where two are joined a token may span the joint there.

        Args:
            ids: the prompt's tokens, without padding.
            context: "last_user_turn" or "conversation".
        """
        found = [
            (turns[0][0], next(places(ids, m.end, turns[0][0]), None) is None, place)
            for place, m in enumerate(self.templates)
            if (turns := self.find(ids, m))
        ]
        if not found:
            return None
        # Of the template that opens first, for others are typed in its turns; of two, the one whose turn ends.
        markers = self.templates[min(found)[-1]]
        turns = [ids[start:stop] for start, stop in self.find(ids, markers)]
        if context == "last_user_turn":
            turns = turns[-1:]
        query = list(self.before)
        for number, turn in enumerate(turns):
            has_lead, text, has_tail = split_edges(turn, markers)
            query += self.separator if number else self.lead if has_lead else []
            query += text
        return [*query, *(self.tail if has_tail else []), *self.after]

    def find(self, ids: Ids, markers: ChatMarkers) -> list[tuple[int, int]]:
        """Where the turns of the user begin and end in a prompt of one template."""
        begin = 0
        while ids[begin : begin + 1] == self.bos != []:
            begin += 1
        starts = {}  # of a turn -> of its opening
        if ids[begin : begin + len(markers.first)] == markers.first:
            starts[begin + len(markers.first)] = begin
        for opening in markers.openings:
            starts.update({place + len(opening): place for place in places(ids, opening)})
        starts = {
            start: opening
            for start, opening in sorted(starts.items())
            if not any(ids[start : start + len(tool)] == tool for tool in markers.tools)
        }
        turns = []
        for start, following in zip(starts, [*list(starts.values())[1:], len(ids)]):
            stop = next(places(ids, markers.end, start), len(ids))
            if stop == len(ids):  # the prompt may end within the marker
                cut = (size for size in range(len(markers.end) - 1, 0, -1) if ids[-size:] == markers.end[:size])
                stop -= next(cut, 0)
            turns.append((start, max(start, min(stop, following))))
        return turns


def places(ids: Sequence[int], marker: Sequence[int], start: int = 0) -> Iterator[int]:
    """Where a marker stands in the ids, from `start` on."""
    while True:
        try:
            start = ids.index(marker[0], start)
        except ValueError:
            return
        if ids[start : start + len(marker)] == marker:
            yield start
        start += 1


def split_edges(turn: Ids, markers: ChatMarkers) -> tuple[bool, Ids, bool]:
    """Whether a turn begins with the template's white space, the turn without it, and whether it ended with it."""
    has_lead = turn[: len(markers.lead)] == markers.lead
    text = turn[len(markers.lead) :] if has_lead else turn
    end = len(text) - len(markers.tail)
    has_tail = end >= 0 and text[end:] == markers.tail
    return has_lead, text[:end] if has_tail else text, has_tail
