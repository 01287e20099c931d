"""Chat completions and responses: Transformers' own handlers, for requests that are answered by one expert each."""

import json
import logging
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import Modality

from conversion.serving.model_manager import Question
from conversion.serving.requests import (
    RequestError,
    check_messages,
    check_numbers,
    known_fields,
    stop_strings,
    token_limit,
    with_known_roles,
)
from conversion.serving.sampling import sampling_arguments

logger = logging.getLogger(__name__)

SAMPLING_FIELDS = ("model", "seed", "stream", "temperature", "top_p")


class EventStream(StreamingResponse):
    """A stream that is closed, and so its answer given up, as soon as nobody is sent more of it."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


class ExpertHandler:
    """What both endpoints share. A mixin before a handler of Transformers, whose answers it completes.

    Args:
        max_tokens: the most tokens of an answer.
        max_request_tokens: the most tokens of a prompt and its answer.
    """

    fields: tuple[str, ...]  # that a body may have

    def __init__(self, *args, max_tokens: int, max_request_tokens: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.max_tokens = max_tokens
        self.max_request_tokens = max_request_tokens

    def messages_of(self, fields: dict[str, Any]) -> list[dict[str, Any]]:
        raise NotImplementedError

    async def handle_request(self, body: dict[str, Any], request_id: str) -> JSONResponse | StreamingResponse:
        """Answer a body, as JSON or as a stream.

        Raises:
            RequestError: the body asks for what there is not.
        """
        fields = known_fields(body, self.fields)
        check_numbers(fields)
        stops = stop_strings(fields)
        messages = with_known_roles(self.messages_of(fields))
        messages = self.get_processor_inputs_from_messages(messages, Modality.LLM)
        question = await self.model_manager.question(fields.get("model"), messages)
        limits = self._limits(fields, stops, len(question.input_ids))
        # Not the client's id, which another client might send, too.
        request_id = uuid.uuid4().hex
        logger.info(
            "%s: %s answers %d tokens%s",
            request_id,
            question.expert,
            len(question.input_ids),
            "" if question.probability is None else f", probability {question.probability:.3f}",
        )
        seed = fields.get("seed", random.getrandbits(63))
        gen_manager = self.generation_state.get_manager()
        gen_manager.check_alive()
        arguments = {
            "request_id": request_id,
            "model": self.model_manager.model,
            "processor": question,
            "model_id": question.expert,
            "inputs": {
                "input_ids": question.input_ids,
                "expert_index": question.expert,
                **sampling_arguments(limits, seed),
            },
            "gen_config": limits,
            "gen_manager": gen_manager,
            **self.more_arguments(body),
        }
        if not fields.get("stream"):
            answer = await self._non_streaming(**arguments)
            content = self.completed(json.loads(answer.body), question, limits)
            return JSONResponse(content, headers=question.headers)
        return EventStream(self._events(arguments), media_type="text/event-stream", headers=question.headers)

    def more_arguments(self, body: dict[str, Any]) -> dict[str, Any]:
        """What the endpoint's handler takes beside the arguments of all."""
        return {}

    def completed(self, content: dict[str, Any], question: Question, limits: GenerationConfig) -> dict[str, Any]:
        """An answer, or one event of a stream, with what the handlers of Transformers leave out."""
        raise NotImplementedError

    async def _events(self, arguments: dict[str, Any]) -> AsyncIterator[str]:
        """The events of a stream. The answer begins with the first: before it, there is nothing to give up."""
        question, limits = arguments["processor"], arguments["gen_config"]
        async with aclosing(self._streaming(**arguments).body_iterator) as parts:
            async for part in parts:
                events = [json.loads(event.removeprefix("data: ")) for event in part.split("\n\n") if event]
                yield "".join(
                    f"data: {json.dumps(self.completed(event, question, limits), ensure_ascii=False)}\n\n"
                    for event in events
                )
        yield self.last_event

    last_event = ""

    def _limits(self, fields: dict[str, Any], stops: list[str], prompt_tokens: int) -> GenerationConfig:
        """The request's generation config.

        Raises:
            RequestError: the prompt, or the answer that is asked for, is too long.
        """
        room = self.max_request_tokens - prompt_tokens
        if room < 1:
            raise RequestError(
                f"the conversation has {prompt_tokens} tokens, and this server takes {self.max_request_tokens} with "
                "the answer: send fewer messages or shorter ones",
                param="messages",
                code="context_length_exceeded",
            )
        param, asked = token_limit(fields)
        if asked is not None and asked > self.max_tokens:
            raise RequestError(f"{param} is {asked}, and this server gives at most {self.max_tokens}", param=param)
        if asked is not None and asked > room:
            raise RequestError(
                f"{param} is {asked} and the conversation has {prompt_tokens} tokens, and this server takes "
                f"{self.max_request_tokens} together",
                param=param,
                code="context_length_exceeded",
            )
        sampling = {name: fields[name] for name in ("temperature", "top_p") if name in fields}
        limits = self._build_generation_config(sampling, self.model_manager.model.generation_config, use_cb=True)
        if fields.get("temperature"):
            limits.do_sample = True
        limits.stop_strings = stops
        limits.max_new_tokens = min(self.max_tokens, room) if asked is None else asked
        return limits


class ExpertChatHandler(ExpertHandler, ChatCompletionHandler):
    fields = (*SAMPLING_FIELDS, "messages", "max_completion_tokens", "max_tokens", "stop")
    last_event = "data: [DONE]\n\n"

    def messages_of(self, fields: dict[str, Any]) -> list[dict[str, Any]]:
        check_messages(fields.get("messages"), "messages")
        return fields["messages"]

    def completed(self, content: dict[str, Any], question: Question, limits: GenerationConfig) -> dict[str, Any]:
        if "error" in content:
            return {"error": {"message": content["error"], "type": "server_error", "param": None, "code": None}}
        return {**content, "routing": question.routing}


class ExpertResponseHandler(ExpertHandler, ResponseHandler):
    fields = (*SAMPLING_FIELDS, "input", "instructions", "max_output_tokens")

    def messages_of(self, fields: dict[str, Any]) -> list[dict[str, Any]]:
        given = fields.get("input")
        if isinstance(given, list) and not all(isinstance(item, dict) for item in given):
            raise RequestError(f"input is {given!r:.100}, expected a text or a list of messages", param="input")
        try:
            messages = self._normalize_input({**fields, "input": given})
        except (KeyError, TypeError, AttributeError) as error:
            kind = f"{type(error).__name__}: {error}"
            raise RequestError(f"input cannot be read as messages ({kind:.100})", param="input") from None
        check_messages(messages, "input")
        return messages

    def more_arguments(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"body": {}}  # it would only echo what is ignored here, unchecked

    def completed(self, content: dict[str, Any], question: Question, limits: GenerationConfig) -> dict[str, Any]:
        response = content.get("response", content)
        if response.get("object") != "response":
            return content
        response = {**response, "routing": question.routing}
        if response["status"] == "completed" and limits.max_new_tokens is not None:
            output = response["usage"]["output_tokens"]
            if output >= limits.max_new_tokens:
                response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        if "response" not in content:
            return response
        kind = "response.incomplete" if response["status"] == "incomplete" else content["type"]
        return {**content, "type": kind, "response": response}
