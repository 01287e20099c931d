"""Text out of tokens: what is said in pieces is what is said at once, and nothing of a stop string is said."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.cli.serving.utils import _StreamError

from conversion.serving.answers import AnswerStream, begun
from conversion.vocabulary.expert_tokenizer import ExpertTokenizer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def tokenizer():
    bytes_only = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["<eos>", *LETTERS])}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<eos>")


@pytest.fixture(params=["merged", "own"])
def expert(request, tokenizer):
    """An expert that reads with the merged tokenizer, or with its own, whose ids lie elsewhere in the vocabulary."""
    if request.param == "merged":
        return ExpertTokenizer("math", tokenizer)
    return ExpertTokenizer("math", tokenizer, tokenizer, list(range(1000, 1000 + len(tokenizer))))


def output(tokens, finished=False, error=None):
    return SimpleNamespace(generated_tokens=list(tokens), error=error, is_finished=lambda: finished)


def say(expert, tokens, stops=(), steps=None):
    """The pieces of an answer, its stream and whether it was cancelled; by default a token a step."""
    cancelled = []
    limits = SimpleNamespace(stop_strings=list(stops), max_new_tokens=99)
    question = SimpleNamespace(tokenizer=expert, ends=[expert.encode("<eos>", False)[0]])
    stream = AnswerStream(question, limits, lambda: cancelled.append(True))
    for size in steps if steps is not None else range(1, len(tokens)):
        stream.put(output(tokens[:size]))
    if not cancelled:
        stream.put(output(tokens, finished=True))
    pieces = [stream.queue.get_nowait() for _ in range(stream.queue.qsize())]
    assert pieces.pop() is None
    return pieces, stream, limits, cancelled


TEXT = "Grüße 🙂, 再见!"


@pytest.mark.parametrize("steps", [None, [], [3, 4, 9]], ids=["tokens", "whole", "some"])
def test_pieces_make_the_whole(expert, steps):
    """Also where a character has several tokens; none is cut."""
    tokens = expert.encode(TEXT, False)
    pieces, stream, limits, _ = say(expert, tokens, steps=steps)
    assert "".join(pieces) == TEXT and "\ufffd" not in TEXT.join(pieces)
    assert stream.total_tokens == len(tokens) and limits.max_new_tokens == 99
    pieces, stream, limits, _ = say(expert, [*tokens, *expert.encode("<eos>", False)], steps=steps)
    assert "".join(pieces) == TEXT and stream.total_tokens == len(tokens) + 1 and limits.max_new_tokens is None


def test_half_a_character_at_the_end_is_said_as_what_it_is(expert):
    tokens = expert.encode("a🙂", False)[:-1]
    pieces, *_ = say(expert, tokens)
    assert "".join(pieces) == expert.decode(tokens) == "a\ufffd"


@pytest.mark.parametrize("steps", [None, [], [2, 5]], ids=["tokens", "whole", "some"])
@pytest.mark.parametrize(
    ("stops", "said"),
    [
        (["cd"], "ab"),
        (["de", "cd"], "ab"),
        (["cdx", "dce"], "abcdabc"),  # begun twice, and given up
        (["x"], "abcdabcdce"),
        (["a"], ""),
        (["e"], "abcdabcdc"),
    ],
)
def test_nothing_of_a_stop_string_is_said(expert, stops, said, steps):
    tokens = expert.encode("abcdabcdce", False)
    pieces, stream, limits, cancelled = say(expert, tokens, stops, steps)
    assert "".join(pieces) == said
    assert (limits.max_new_tokens is None) == (said != "abcdabcdce")
    if steps is None and said == "ab":
        assert cancelled and stream.total_tokens == 4  # as soon as it is there


def test_what_cannot_become_a_stop_string_is_said_at_once(expert):
    pieces, *_ = say(expert, expert.encode("xyab-ab", False), ["abc"])
    assert pieces == ["x", "y", "ab-", "ab"]


def test_begun():
    assert [begun("xab", stop) for stop in ("abc", "b", "bb", "xabz", "q", "ab")] == [2, 0, 1, 3, 0, 0]
    assert begun("aa", "aaa") == 2


def test_a_fault_ends_the_stream(expert):
    stream = AnswerStream(
        SimpleNamespace(tokenizer=expert, ends=[]), SimpleNamespace(stop_strings=[], max_new_tokens=9), None
    )
    stream.put(output([], finished=True, error='it said "no"'))
    error = stream.queue.get_nowait()
    assert isinstance(error, _StreamError) and error.msg == "it said 'no'"
    stream.put(output(expert.encode("late", False), finished=True))
    assert stream.queue.empty()
