"""One copy of an engine in a process of its own, and the form in which requests reach it. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_pipeline.errors import UserError
from ray_pipeline.serving.engines import EngineSettings, ServedModel, known_engines
from ray_pipeline.serving.guard import Message


@dataclass(frozen=True)
class ForwardedRequest:
    """A request on its way from the door to a replica.

    Attributes:
        path: as ASGI has it, decoded. query: the raw text behind `?`. body: all of it.
    """

    method: str
    path: str
    query: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""

    @property
    def scope(self) -> dict[str, Any]:
        """The ASGI scope of an HTTP request."""
        return {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": self.method, "scheme": "http", "path": self.path, "query_string": self.query, "root_path": "",
            "headers": self.headers, "client": None, "server": None,
        }  # fmt: skip


class EngineReplica:
    """Starts the engine when it is made, and ends it when it is deleted.

    Raises:
        UserError: files that this machine does not see or that are damaged, or an engine that does not start.
    """

    def __init__(self, engine: str, model: ServedModel, settings: EngineSettings):
        for path in _folders(model):
            if not path.exists():
                raise UserError(
                    f"{socket.gethostname()}: there is no {path} there. Give a model in a folder that all nodes of the "
                    "cluster share (NFS, Lustre, a mounted bucket)."
                )
        self._running = known_engines()[engine].start(model, settings)

    def __del__(self) -> None:
        if hasattr(self, "_running"):
            self._running.stop()

    async def check_health(self) -> None:
        """Called by Ray Serve now and then, which replaces a replica where it raises.

        Raises:
            RuntimeError: the engine is not well.
        """
        said = [message async for messages in self.answer(ForwardedRequest("GET", "/health")) for message in messages]
        if (status := said[0]["status"]) != 200:
            raise RuntimeError(f"the engine answers its health check with {status}")

    async def answer(self, request: ForwardedRequest) -> AsyncIterator[list[Message]]:
        """The engine's answer, as the messages of ASGI that its application sends; those that are there at once come
        together. Where the caller gives up, the application is cancelled, which ends its work."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        waiting: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            if not waiting:
                await asyncio.Event().wait()  # a client that leaves is seen at the door, which cancels this
            return waiting.pop()

        async def run() -> None:
            try:
                await self._running.app(request.scope, receive, sent.put)
            finally:
                sent.put_nowait(None)

        work = asyncio.create_task(run())
        try:
            ended = False
            while not ended:
                messages = [await sent.get()]
                while not sent.empty():
                    messages.append(sent.get_nowait())
                ended = messages[-1] is None
                if found := [message for message in messages if message is not None]:
                    yield found
            await work
        finally:
            work.cancel()


def _folders(model: ServedModel) -> list[Path]:
    """What has to be there to load it."""
    source = [] if model.source is None else [model.source.folder, model.source.tokenizer]
    return [*source, *([] if model.gguf is None else [model.gguf])]
