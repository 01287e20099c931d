"""`channel-merged-proxy CHECKPOINT --upstream URL`: lets requests to vLLM be routed, by a model named `auto`.

A request to `auto` is read by the checkpoint's router, on its first blocks alone, and goes on to vLLM with the expert
as its model; the answer's headers `x-expert` and `x-expert-probability` say which one it was. All other requests go on
as they are. What an adapter does not tell vLLM, the proxy adds for every expert: the tokens that end its answers, and
the name of its own chat template, where the checkpoint has any.
"""

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from channel_merged_vllm.trunk import RouterTrunk, trunk_config

AUTO = "auto"
MAX_BODY = 32 * 2**20
# Of one connection alone, or of the body as it was.
HOP_HEADERS = {"connection", "content-length", "host", "keep-alive", "transfer-encoding", "upgrade"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Who answers a query, and how sure the router is of it."""

    expert: str
    probability: float


class Router:
    """Chooses the expert of a request's prompt or messages.

    Args:
        checkpoint: folder or Hub id; the code files beside its weights are not executed.
    """

    def __init__(self, checkpoint: str):
        self.config = trunk_config(checkpoint)
        self.model = RouterTrunk.from_pretrained(checkpoint, config=self.config).eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint)
        templates = self.tokenizer.chat_template
        self.templates = set(templates) & set(self.config.expert_names) if isinstance(templates, dict) else set()

    def choose(self, body: dict[str, Any]) -> Choice:
        """The expert for the body of a request; ValueError where it has nothing that can be routed."""
        prompt, messages = body.get("prompt"), body.get("messages")
        if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            inputs = self.model.router_inputs(self.tokenizer, [with_plain_text(messages)])
            inputs = {name.removeprefix("router_"): tensor for name, tensor in inputs.items()} | {"whole": True}
        elif isinstance(prompt, str) and prompt:
            inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        else:
            raise ValueError(f"the model {AUTO!r} routes `messages`, or a `prompt` that is one text: give one of them")
        routing = self.model.route(**inputs)
        expert = int(routing.expert_index[0])
        return Choice(self.config.expert_names[expert], float(routing.probabilities[0, expert]))

    def completed(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A request to an expert, with what vLLM must be told beside its name."""
        expert, ends = fields["model"], self.config.expert_eos_token_ids
        stops = fields.get("stop_token_ids") or []
        if ends is not None and not fields.get("ignore_eos") and isinstance(stops, list):
            # Else vLLM ends at those of all experts together.
            fields = {**fields, "ignore_eos": True, "stop_token_ids": [*ends[expert], *stops]}
        if "messages" in fields and expert in self.templates:
            fields = {"chat_template": expert, **fields}
        return fields


def with_plain_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents in parts of text are one text each, as the router reads them."""

    def plain(content: Any) -> Any:
        if not isinstance(content, list):
            return content
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))

    return [{**message, "content": plain(message.get("content"))} for message in messages]


async def read_body(request: Request) -> bytes | None:
    """The body of a request; None where it is larger than MAX_BODY."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY:
            return None
    return bytes(body)


async def pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    """An answer as it comes; where the client leaves, the connection to vLLM is closed, which then stops as well."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()


def error(status: int, message: str) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def make_app(router: Router, upstream: httpx.AsyncClient) -> FastAPI:
    """The proxy in front of `upstream`, a client whose base URL is vLLM's server."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        async with upstream:
            yield

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    async def forward(request: Request, body: bytes, headers: dict[str, str]) -> Response:
        sent = {name: value for name, value in request.headers.items() if name not in HOP_HEADERS}
        outgoing = upstream.build_request(
            request.method, request.url.path, params=request.query_params, headers=sent, content=body
        )
        sending = asyncio.ensure_future(upstream.send(outgoing, stream=True))
        gone = asyncio.ensure_future(request.receive())  # the body is read: the next message is http.disconnect
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                return Response(status_code=499)
            answer = sending.result()
        except httpx.TransportError as reason:
            return error(502, f"vLLM at {upstream.base_url} does not answer: {type(reason).__name__} {reason}")
        finally:
            gone.cancel()
            sending.cancel()  # nothing where it is done
        received = {name: value for name, value in answer.headers.items() if name not in HOP_HEADERS}
        return StreamingResponse(pieces(answer), answer.status_code, received | headers)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """vLLM's models, and before them the one that is routed."""
        try:
            headers = {name: request.headers[name] for name in ("authorization",) if name in request.headers}
            answer = await upstream.get("/v1/models", headers=headers)
        except httpx.TransportError as reason:
            return error(502, f"vLLM at {upstream.base_url} does not answer: {type(reason).__name__} {reason}")
        listed = answer.json()
        if answer.is_success:
            listed["data"].insert(0, {"id": AUTO, "object": "model", "created": 0, "owned_by": "channel-merged"})
        return JSONResponse(listed, answer.status_code)

    async def complete(request: Request) -> Response:
        body = await read_body(request)
        if body is None:
            return error(413, f"the request has more than {MAX_BODY} bytes")
        try:
            fields = json.loads(body)
        except ValueError as reason:
            return error(400, f"the request is no JSON: {reason}")
        if not isinstance(fields, dict):
            return error(400, f"the request is a JSON {type(fields).__name__}, expected an object")
        headers = {}
        if fields.get("model") == AUTO:
            try:
                choice = await run_in_threadpool(router.choose, fields)
            except (ValueError, TemplateError) as reason:
                return error(400, str(reason))
            fields["model"] = choice.expert
            headers = {"x-expert": quote(choice.expert), "x-expert-probability": f"{choice.probability:.4f}"}
        if fields.get("model") in router.config.expert_names:
            fields = router.completed(fields)
        return await forward(request, json.dumps(fields).encode(), headers)

    app.post("/v1/chat/completions")(complete)
    app.post("/v1/completions")(complete)

    @app.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def other(request: Request, path: str) -> Response:
        body = await read_body(request)
        if body is None:
            return error(413, f"the request has more than {MAX_BODY} bytes")
        return await forward(request, body, {})

    return app


def main():
    parser = argparse.ArgumentParser(prog="channel-merged-proxy", description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", help="folder or Hub id of the checkpoint that vLLM serves")
    parser.add_argument("--upstream", default="http://127.0.0.1:8000", help="vLLM's server (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        router = Router(arguments.checkpoint)
        upstream = httpx.AsyncClient(
            base_url=arguments.upstream,
            timeout=httpx.Timeout(10, read=None, pool=None),
            limits=httpx.Limits(max_connections=None),
        )
    except (OSError, ValueError, httpx.InvalidURL) as reason:
        sys.exit(f"channel-merged-proxy: {' '.join(str(reason).split())}")
    if not router.model.router.is_trained:
        default = router.config.router["default_expert"]
        logger.warning("The router is untrained: %r answers all requests to %r.", default, AUTO)
    uvicorn.run(make_app(router, upstream), host=arguments.host, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
