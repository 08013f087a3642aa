"""The front door of engines that are servers themselves: one address, one key, thinking apart from the answer.

A thin proxy: what an engine has stays its own matter, and its answers pass unchanged but for what differs between
engines. Only the paths listed here lead to it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from sse_starlette import EventSourceResponse

from ray_pipeline.serving.common_routes import add_common_routes
from ray_pipeline.serving.door_split import ChatSplitter, MessagesSplitter, Splitter, TextLogprobs
from ray_pipeline.serving.guard import error_body
from ray_pipeline.serving.native_answers import until_left
from ray_pipeline.serving.responses_split import ResponsesSplitter
from ray_pipeline.serving.several import lines_of, merged_events, merged_replies, one_each

PASSED = ("/v1/completions", "/v1/messages/count_tokens", "/tokenize", "/detokenize")
TURNS = ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens")  # paths that read a conversation
SECONDS_TO_CONNECT, SEND_SECONDS = 10.0, 60.0


@dataclass(frozen=True)
class Upstream:
    """An engine's own server.

    Attributes:
        model: the served model's name. context: its tokens. thinking: prompts end with `<think>`.
        with_tools: a chat with tools as the engine is to get it. socket: where it listens, if not on a port.
    """

    engine: str
    model: str
    address: str
    key: str
    context: int
    thinking: bool = False
    with_tools: Callable[[dict[str, Any]], dict[str, Any]] = dict
    socket: str | None = None


class Door:
    """Requests to one engine."""

    def __init__(self, upstream: Upstream):
        self.upstream = upstream
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.client = httpx.AsyncClient(
            base_url=upstream.address,
            headers={"Authorization": f"Bearer {upstream.key}"} if upstream.key else {},
            timeout=httpx.Timeout(None, connect=SECONDS_TO_CONNECT),
            transport=httpx.AsyncHTTPTransport(uds=upstream.socket, limits=limits),
            trust_env=False,  # a proxy from the environment must not see requests to this machine
        )

    async def relay(self, request: Request, path: str, body: dict[str, Any], splitter: Splitter | None) -> Response:
        """Ask the engine and hand back what it says, taken apart where it has to be."""
        model = body.get("model")
        if isinstance(model, str) and model != self.upstream.model:
            message = f"model {model[:200]!r} is not served here: {self.upstream.model} is"
            return JSONResponse(error_body(404, message, param="model", code="model_not_found"), 404)
        for param, fault in (("messages", _turns_fault(path, body)), ("tools", _tools_fault(body))):
            if fault is not None:
                return JSONResponse(error_body(400, fault, param=param), 400)
        try:
            bodies = one_each(body)
        except ValueError as error:
            return JSONResponse(error_body(400, str(error), param="n"), 400)
        try:
            requests = [self.client.build_request("POST", path, json=one) for one in bodies]
        except ValueError as error:  # half a letter, or a number that no double holds
            return JSONResponse(error_body(400, f"the body is not JSON that can be sent on: {error}"), 400)
        try:
            answers = await until_left(lambda: self._send(requests), request)
            if answers is None:
                return Response(status_code=499)
            if all(a.headers.get("content-type", "").startswith("text/event-stream") for a in answers):
                events = self._events(answers, splitter)
                return EventSourceResponse(events, ping=15, send_timeout=SEND_SECONDS, sep="\n")
            contents = await until_left(lambda: asyncio.gather(*(one.aread() for one in answers)), request)
            await _close(answers)
        except httpx.HTTPError as error:
            return await self._unanswered(error)
        if contents is None:
            return Response(status_code=499)
        return self._whole([one.status_code for one in answers], contents, splitter)

    async def _send(self, requests: Sequence[httpx.Request]) -> list[httpx.Response]:
        """Ask for every answer at once.

        Raises:
            httpx.HTTPError: the engine does not answer one of them.
        """
        tasks = [asyncio.create_task(self.client.send(request, stream=True)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        except (httpx.HTTPError, asyncio.CancelledError):
            for task in tasks:
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            await _close([one for one in found if isinstance(one, httpx.Response)])
            raise

    async def healthy(self) -> bool:
        """Whether the engine says that it works."""
        try:
            return (await self.client.get("/health", timeout=10)).status_code == 200
        except httpx.HTTPError:
            return False

    async def _unanswered(self, error: httpx.HTTPError) -> Response:
        """llama.cpp hangs up on some wrong types and on answers that are no text, and goes on with the rest.

        What is seen of it is an end, or a reset where something was left unread.
        """
        name = self.upstream.engine
        hung_up = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError)
        if hung_up and await self.healthy():
            reason = "a field of the request is of a wrong type, or the answer to it is no text"
            return JSONResponse(error_body(400, f"{name} ended the connection without a word: {reason}"), 400)
        return JSONResponse(error_body(502, f"{name} does not answer ({error})"), 502)

    async def count(self, body: dict[str, Any]) -> int:
        """Tokens of the prompt of Anthropic's messages; 0 where the engine refuses them, which it will say itself."""
        try:
            answer = await self.client.post("/v1/messages/count_tokens", json=body)
            return int(answer.json()["input_tokens"]) if answer.status_code == 200 else 0
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return 0

    def _whole(self, statuses: Sequence[int], contents: Sequence[bytes], splitter: Splitter | None) -> Response:
        for status, content in zip(statuses, contents, strict=True):
            if status >= 400:
                return _refused(status, content)
        value = merged_replies([json.loads(content) for content in contents])
        return JSONResponse(value if splitter is None else splitter.whole(value))

    async def _events(
        self, answers: Sequence[httpx.Response], splitter: Splitter | None
    ) -> AsyncIterator[dict[str, str]]:
        """The engine's events; the connections to it are closed when the client leaves, which ends its work."""
        try:
            lines = lines_of(answers[0]) if len(answers) == 1 else merged_events(answers)
            async for event, line in lines:
                for name, data in _split(splitter, event, line):
                    yield {"event": name, "data": data} if name else {"data": data}
        except httpx.HTTPError as error:
            yield {"data": json.dumps(error_body(502, f"{self.upstream.engine} stopped answering ({error})"))}
        finally:
            await _close(answers)


async def _close(answers: Sequence[httpx.Response]) -> None:
    for answer in answers:
        await answer.aclose()


def _turns_fault(path: str, body: dict[str, Any]) -> str | None:
    """What is wrong with the form of a conversation. llama.cpp answers a turn without a role with a 500."""
    if path not in TURNS:
        return None
    turns = body.get("messages")
    if not isinstance(turns, list) or not turns:
        return f"messages: must be a list of turns, at least one (given: {repr(turns)[:100]})"
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            return f"messages.{number}: must be an object with a role (given: {repr(turn)[:100]})"
    return None


def _tools_fault(body: dict[str, Any]) -> str | None:
    """What is wrong with the form of the tools, which llama.cpp answers with a 500 as well."""
    tools = body.get("tools")
    if tools is None or (isinstance(tools, list) and all(isinstance(one, dict) for one in tools)):
        return None
    return f"tools: must be a list of objects (given: {repr(tools)[:100]})"


def _refused(status: int, content: bytes) -> Response:
    """An engine's error in OpenAI's form."""
    try:
        value = json.loads(content)
    except ValueError:
        value = content.decode("utf-8", "replace")[:1000]
    found = value.get("error", value) if isinstance(value, dict) else value
    message = found.get("message", found) if isinstance(found, dict) else found
    known = isinstance(found, dict) and found.get("type") == "exceed_context_size_error"
    if known or "maximum context length" in str(message):
        return JSONResponse(error_body(400, str(message), code="context_length_exceeded"), 400)
    return JSONResponse(error_body(status, str(message)), status)


def _split(splitter: Splitter | None, event: str, data: str) -> list[tuple[str, str]]:
    if splitter is None or data == "[DONE]":
        return [(event, data)]
    value = json.loads(data)
    return [(name, json.dumps(one, ensure_ascii=False)) for name, one in splitter.event(event, value)]


def door_app(upstream: Upstream) -> FastAPI:
    """The application in front of an engine."""
    door = Door(upstream)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await door.client.aclose()

    app = FastAPI(title="ray-pipeline", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    add_common_routes(app)

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = await door.healthy()
        return JSONResponse({"status": "ok" if alive else "stopped", "engine": upstream.engine}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        answer = await door.client.get("/metrics", timeout=10)
        return Response(answer.content, answer.status_code, media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": upstream.model, "object": "model", "created": 0, "owned_by": "ray-pipeline"}
        return {"object": "list", "data": [entry | {"max_model_len": upstream.context}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await _body(request)
        if isinstance(body, Response):
            return body
        tools = bool(body.get("tools")) and body.get("tool_choice") != "none"
        splitter = ChatSplitter(thinking=upstream.thinking, tools=tools)
        sent = upstream.with_tools(body) if tools else body
        return await door.relay(request, "/v1/chat/completions", sent, splitter)

    @app.post("/v1/messages")
    async def messages(request: Request) -> Response:
        body = await _body(request)
        if isinstance(body, Response):
            return body
        prompt = await door.count(body) if body.get("stream") is True else 0
        splitter = MessagesSplitter(upstream.model, prompt, thinking=upstream.thinking)
        return await door.relay(request, "/v1/messages", body, splitter)

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        body = await _body(request)
        if isinstance(body, Response):
            return body
        return await door.relay(request, "/v1/responses", body, ResponsesSplitter(thinking=upstream.thinking))

    for path in PASSED:
        app.post(path)(_passed(door, path))
    return app


def _passed(door: Door, path: str) -> Any:
    async def passed(request: Request) -> Response:
        body = await _body(request)
        if isinstance(body, Response):
            return body
        return await door.relay(request, path, body, TextLogprobs() if path == "/v1/completions" else None)

    return passed


async def _body(request: Request) -> dict[str, Any] | Response:
    try:
        value = json.loads(await request.body(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return JSONResponse(error_body(400, f"the body is not JSON: {str(error)[:200]}"), 400)
    if not isinstance(value, dict):
        return JSONResponse(error_body(400, "the body must be a JSON object"), 400)
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
