"""What a request may say: its fields and messages, checked before anything is done for it.

A field that would change the answer, and cannot here, is refused by its name; one that changes nothing is ignored.
"""

from collections.abc import Collection
from typing import Any

from fastapi import HTTPException

ROLES = ("system", "user", "assistant")
SAME_ROLES = {"developer": "system"}  # its newer name
TEXT_PARTS = ("text", "input_text", "output_text")
MAX_STOPS = 4
MAX_SEED = 2**63 - 1
TOKEN_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")  # the first of them that is given holds
# What is refused, with the values that ask for nothing.
CANNOT = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "top_logprobs"), (0,)),
    **dict.fromkeys(("tools", "functions", "include"), ([],)),
    **dict.fromkeys(("audio", "conversation", "generation_config", "previous_response_id", "prompt"), ()),
    **dict.fromkeys(("chat_template_kwargs", "logit_bias", "web_search_options"), ({},)),
    "n": (1,),
    "logprobs": (False,),
    "background": (False,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "text": ({}, {"format": {"type": "text"}}),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "truncation": ("disabled",),
}
IGNORED = {
    *("max_tool_calls", "metadata", "moderation", "parallel_tool_calls", "prediction", "prompt_cache_key"),
    *("prompt_cache_options", "prompt_cache_retention", "reasoning", "reasoning_effort", "safety_identifier"),
    *("service_tier", "store", "stream_options", "user", "verbosity"),
}


class RequestError(HTTPException):
    """A request that is not answered, in the words of OpenAI's errors.

    Args:
        param: the field that is at fault.
        code: what went wrong, for programs.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(status, message)
        self.param = param
        self.code = code


def known_fields(body: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The `known` fields of a body, those that are read; one that is null counts as left out.

    Raises:
        RequestError: an unknown field, or one that cannot be done.
    """
    fields = {}
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        if name in known:
            fields[name] = value
        elif name not in CANNOT:
            param = name[:100].encode(errors="replace").decode()  # JSON can hold lone surrogates
            raise RequestError(f"unknown field {param!r}", param=param, code="unknown_parameter")
        elif value not in CANNOT[name]:
            raise RequestError(
                f"{name} cannot be used with this server: leave it out", param=name, code="unsupported_parameter"
            )
    return fields


def check_numbers(fields: dict[str, Any]) -> None:
    """RequestError where a field of sampling, length or streaming has a value that it cannot have."""
    for name, low, high in (("temperature", 0, 2), ("top_p", 0, 1)):
        value = fields.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise RequestError(f"{name} is {value!r:.100}, expected a number from {low} to {high}", param=name)
    if fields.get("top_p") == 0:
        raise RequestError("top_p is 0, expected a number above 0; temperature 0 is greedy", param="top_p")
    for name in TOKEN_LIMITS:
        if name in fields and (type(fields[name]) is not int or fields[name] < 1):
            raise RequestError(f"{name} is {fields[name]!r:.100}, expected a number of at least 1", param=name)
    seed = fields.get("seed", 0)
    if type(seed) is not int or abs(seed) > MAX_SEED:
        raise RequestError(f"seed is {seed!r:.100}, expected a whole number of at most 63 bits", param="seed")
    if not isinstance(fields.get("stream", False), bool):
        raise RequestError(f"stream is {fields['stream']!r:.100}, expected true or false", param="stream")


def stop_strings(fields: dict[str, Any]) -> list[str]:
    """Texts that end an answer before them."""
    stops = fields.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise RequestError(f"stop is {stops!r:.100}, expected a text or up to {MAX_STOPS} of them", param="stop")
    return stops


def token_limit(fields: dict[str, Any]) -> tuple[str, int | None]:
    """The most tokens that a request asks for, and the field that says so; None if none does."""
    return next(((name, fields[name]) for name in TOKEN_LIMITS if name in fields), (TOKEN_LIMITS[0], None))


def check_messages(messages: Any, param: str) -> None:
    """RequestError where `messages`, which the field `param` holds, are no conversation of texts."""
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"{param} is {messages!r:.100}, expected a list of messages", param=param)
    for number, message in enumerate(messages):
        place = f"{param}[{number}]"
        if not isinstance(message, dict):
            raise RequestError(f"{place} is {message!r:.100}, expected role and content", param=place)
        if message.get("role") not in (*ROLES, *SAME_ROLES):
            expected = f"{', '.join(ROLES)} or developer"
            raise RequestError(f"{place}.role is {message.get('role')!r:.100}, expected {expected}", param=place)
        if any(message.get(key) for key in ("tool_calls", "function_call")):
            raise RequestError(f"{place} calls a tool, and this server has none", param=place)
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in TEXT_PARTS:
                raise RequestError(f"{place}.content has a part of type {kind!r:.100}, expected text", param=place)
            if not isinstance(part.get("text"), str):
                raise RequestError(f"{place}.content is {part.get('text')!r:.100}, expected text", param=place)


def with_known_roles(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Role and content of each message, by the role's older name."""
    return [
        {"role": SAME_ROLES.get(message["role"], message["role"]), "content": message["content"]}
        for message in messages
    ]
