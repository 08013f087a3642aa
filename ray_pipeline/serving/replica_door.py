"""The front door of several replicas of an engine: the page and their health itself, all else passed to one of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, MutableMapping
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.routing import Route

from ray_pipeline.serving.common_routes import add_common_routes
from ray_pipeline.serving.guard import Message, Receive, Send, error_body
from ray_pipeline.serving.native_answers import until_left
from ray_pipeline.serving.replica import ForwardedRequest

SEND_SECONDS = 60.0  # a client that reads nothing for so long is let go
HEALTH_SECONDS = 10.0
RETRY_SECONDS = 5
KEPT_HERE = (b"authorization", b"x-api-key")  # the door's own matter
LOST = "the replica that answered ended: try again"


class TooMany(Exception):
    """All replicas are busy, and enough requests wait for them."""


class ReplicaLost(Exception):
    """The replica that answered ended."""


class Replicas(Protocol):
    """What requests are passed to."""

    def ask(self, request: ForwardedRequest) -> AsyncIterator[list[Message]]:
        """The messages of one replica's answer.

        Raises:
            TooMany, ReplicaLost: see there.
        """
        ...

    def running(self) -> int:
        """How many of them answer."""
        ...


class _Relay:
    """An ASGI application: one request to one replica, its answer as it comes."""

    def __init__(self, replicas: Replicas):
        self.replicas = replicas

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in KEPT_HERE]
        forwarded = ForwardedRequest(
            scope["method"], scope["path"], scope["query_string"], headers, await request.body()
        )
        await until_left(lambda: self._pass(forwarded, scope, receive, send), request)

    async def _pass(
        self, request: ForwardedRequest, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ) -> None:
        kind = None  # of the answer, from its first message on
        try:
            async for messages in self.replicas.ask(request):
                for message in messages:
                    kind = _kind(message) if kind is None else kind
                    async with asyncio.timeout(SEND_SECONDS):
                        await send(message)
        except TooMany:
            await _refusal(429, "all replicas are busy and enough requests wait: try again later")(scope, receive, send)
        except ReplicaLost:
            if kind is None:
                await _refusal(503, LOST)(scope, receive, send)
            elif kind.startswith("text/event-stream"):
                last = f"data: {json.dumps(error_body(503, LOST))}\n\n".encode()
                await send({"type": "http.response.body", "body": last})
            else:
                raise  # half of an answer: the connection is broken off


def _kind(start: Message) -> str:
    return dict(start["headers"]).get(b"content-type", b"").decode("latin-1")


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse(error_body(status, message), status, {"Retry-After": str(RETRY_SECONDS)})


def replica_app(replicas: Replicas, engine: str) -> FastAPI:
    """The application in front of them."""
    app = FastAPI(title="ray-pipeline", docs_url=None, redoc_url=None, openapi_url=None)
    add_common_routes(app)

    @app.get("/health")
    async def health() -> JSONResponse:
        try:
            running = await asyncio.wait_for(asyncio.to_thread(replicas.running), HEALTH_SECONDS)
        except TimeoutError:
            running = 0
        body = {"status": "ok" if running else "stopped", "engine": engine, "replicas": running}
        return JSONResponse(body, 200 if running else 503)

    app.router.routes.append(Route("/{path:path}", _Relay(replicas)))
    return app
