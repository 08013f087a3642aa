"""What every request passes before an application sees it: whose it is, how large, how slow. Knows no engine."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MOST_BYTES = 4 << 20  # of a body; a prompt that large fits no context
MOST_READ = 64 << 20  # bytes of a body that is refused: who is hung up on while sending does not see the refusal
BODY_SECONDS = 30.0  # until a body is there
OPEN_PATHS = ("/", "/health", "/favicon.ico")  # answered without a key: they say nothing about the model's answers
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


@dataclass(frozen=True)
class GuardRules:
    """What is let through.

    Attributes:
        api_key: None for everybody.
        hosts: names that a request may call this server by; None for any. A web page that made its own name point to
            this machine (DNS rebinding) is refused by it.
    """

    api_key: str | None = None
    hosts: tuple[str, ...] | None = LOOPBACK


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """ASGI middleware."""

    def __init__(self, app: App, rules: GuardRules):
        self.app, self.rules = app, rules

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Refuse, or hand on with the body read whole."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is None and scope["method"] == "POST":
            body = await _read_body(receive, headers)
            if isinstance(body, bytes):
                receive = _with_body(body, receive)
            else:
                refusal = body
        if refusal is not None:
            await _answer(send, *refusal)
            return
        await self.app(scope, receive, send)

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        hosts = self.rules.hosts
        name = headers.get("host", "").rsplit(":", 1)[0] if not headers.get("host", "").endswith("]") else "[::1]"
        if hosts is not None and name.lower() not in hosts:
            return 403, f"host {name[:100]!r}: this server answers as {', '.join(hosts[:2])} alone"
        if self.rules.api_key is not None and path not in OPEN_PATHS and not self._has_key(headers):
            return 401, "a valid key is needed: Authorization: Bearer KEY"
        return None

    def _has_key(self, headers: dict[str, str]) -> bool:
        """Compared in constant time. Anthropic's clients send x-api-key."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        wanted = self.rules.api_key or ""
        return hmac.compare_digest(key.encode("utf-8", "replace"), wanted.encode())


async def _read_body(receive: Receive, headers: dict[str, str]) -> bytes | tuple[int, str] | None:
    """The body, or why it is refused."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A web page can send any other kind to this machine without asking first.
        return 415, f"content-type {kind[:100]!r}: must be application/json"
    too_large = 413, f"the body is larger than {MOST_BYTES >> 20} MiB, which no context holds"
    length = headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > MOST_READ:
        return too_large
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return 400, "the client left"
                piece = message.get("body", b"")
                size += len(piece)
                if size <= MOST_BYTES:
                    body += piece
                if size > MOST_READ:
                    return too_large
                if not message.get("more_body"):
                    return bytes(body) if size <= MOST_BYTES else too_large
    except TimeoutError:
        return 408, f"the body did not arrive within {BODY_SECONDS:g} s"


def _with_body(body: bytes, receive: Receive) -> Receive:
    """As if it came in one piece; what follows (the client leaving) comes from the connection."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _answer(send: Send, status: int, message: str) -> None:
    content = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
