"""The web application: the endpoints of Transformers' server that a merged checkpoint has, and OpenAI's errors."""

import asyncio
import json
import secrets
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import CBWorkerDeadError

from conversion.serving.answers import ExpertGenerationState
from conversion.serving.handlers import ExpertChatHandler, ExpertResponseHandler
from conversion.serving.model_manager import MergedModelManager

ENDPOINTS = ("/v1/chat/completions", "/v1/responses", "/v1/models", "/health")
OPEN_ENDPOINTS = ("/health",)  # that need no key
ERROR_TYPES = {401: "authentication_error", 404: "not_found_error"}


def build_application(
    manager: MergedModelManager,
    state: ExpertGenerationState,
    *,
    max_tokens: int,
    max_body: int,
    api_key: str | None = None,
) -> FastAPI:
    """The application of a loaded checkpoint.

    Args:
        max_tokens: the most tokens of an answer.
        max_body: the most bytes of a request.
        api_key: what requests must bring; None: nothing.
    """
    context = getattr(manager.config.text_config, "max_position_embeddings", None)
    cache = state.get_manager().max_request_tokens
    limits = {"max_tokens": max_tokens, "max_request_tokens": cache if context is None else min(context, cache)}
    application = build_server(
        manager,
        ExpertChatHandler(manager, state, **limits),
        completion_handler=None,
        response_handler=ExpertResponseHandler(manager, state, **limits),
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    routes = application.router.routes
    routes[:] = [route for route in routes if route.path in ENDPOINTS]

    @application.get("/v1/models/{name:path}")
    def model(name: str) -> JSONResponse:
        manager.expert_of(name)
        entry = next((entry for entry in manager.get_gen_models() if entry["id"] == name), None)
        return JSONResponse(entry or {**manager.get_gen_models()[0], "id": name})

    application.add_exception_handler(AnyHTTPException, answer_error)
    application.add_exception_handler(RequestValidationError, answer_unreadable)
    application.add_exception_handler(CBWorkerDeadError, answer_dead)
    application.add_exception_handler(Exception, answer_fault)
    application.add_middleware(Gate, max_body=max_body, api_key=api_key)
    return application


def error_content(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer_error(request: Request, error: HTTPException) -> JSONResponse:
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    content = error_content(str(error.detail), error.status_code, param, code)
    return JSONResponse(content, error.status_code, headers=error.headers)


def answer_unreadable(request: Request, error: RequestValidationError) -> JSONResponse:
    """The body is no JSON object."""
    reasons = "; ".join(dict.fromkeys(item["msg"] for item in error.errors()))
    return JSONResponse(error_content(f"the body is no JSON object: {reasons}", 400), 400)


def answer_dead(request: Request, error: CBWorkerDeadError) -> JSONResponse:
    return JSONResponse(error_content(str(error), 503), 503)


def answer_fault(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_content("the server failed: its log says why", 500), 500)


class Gate:
    """ASGI middleware: lets in requests with the key and of a size that is read, and ends those whose client has gone.

    The body is read whole before the application runs; from then on the only news of the client is that it left.
    """

    def __init__(self, app: Any, max_body: int, api_key: str | None):
        self.app = app
        self.max_body = max_body
        self.key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        if self.key and scope["path"] not in OPEN_ENDPOINTS and not secrets.compare_digest(given, self.key):
            await refuse(send, 401, "the API key is missing or wrong", "invalid_api_key")
            return
        body = await self._body(headers, receive)
        if body is None:
            message = f"the body is larger than {self.max_body:,} bytes, the most that this server reads"
            await refuse(send, 413, message, "request_too_large")
            return
        await self._run(scope, body, receive, send)

    async def _body(self, headers: dict[bytes, bytes], receive: Any) -> bytes | None:
        """The whole body, or None if it is too large."""
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self.max_body:
            return None
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_body:
                return None
        return bytes(body)

    async def _run(self, scope: dict[str, Any], body: bytes, receive: Any, send: Any) -> None:
        gone = asyncio.ensure_future(receive())  # of a body that is read, the next message is http.disconnect
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> dict[str, Any]:
            return unread.pop() if unread else await asyncio.shield(gone)

        running = asyncio.ensure_future(self.app(scope, replay, send))
        # Cancelled are the requests that are there when the server's grace is over: no fault to be logged.
        with suppress(asyncio.CancelledError):
            await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not running.done():
            running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def refuse(send: Any, status: int, message: str, code: str) -> None:
    """Answer without the application; what the client still sends is not read."""
    content = json.dumps(error_content(message, status, code=code)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
