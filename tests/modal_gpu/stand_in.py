"""A stand-in of Modal's service on loopback: gRPC on `modal_proto` for clients and containers, HTTP for blobs.

Containers are processes of this machine that run Modal's own entry point (`containers.py`). Volumes are folders. Only
what this project's client code asks for is here; any other call fails, and `World.unknown` names it.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import threading
from pathlib import Path
from typing import Any

import aiohttp.web
import grpclib.server
from grpclib import GRPCError, Status
from modal_proto.api_grpc import ModalClientBase

from tests.modal_gpu.calls import Calls
from tests.modal_gpu.objects import Objects
from tests.modal_gpu.world import BLOCK, World


def _unary(name: str) -> Any:
    async def handle(self: Service, stream: Any) -> None:
        request = await stream.recv_message()
        world = self.world
        world.seen.append(request)
        if world.delay:
            await asyncio.sleep(world.delay)
        if name in world.errors:
            raise world.errors[name]
        answer = getattr(self, f"do_{name}", None)
        if answer is None:
            world.unknown.append(name)
            raise GRPCError(Status.UNIMPLEMENTED, name)
        found = answer(request)
        if inspect.isasyncgen(found):
            async for message in found:
                await stream.send_message(message)
        else:
            await stream.send_message(await found if inspect.isawaitable(found) else found)

    return handle


class Service(Objects, Calls, ModalClientBase):
    """All of it: a method of the service is answered by `do_METHOD`."""


for _name in ModalClientBase.__abstractmethods__:
    setattr(Service, _name, _unary(_name))
Service.__abstractmethods__ = frozenset()


class StandIn:
    """Runs the service in a thread of its own."""

    def __init__(self, root: Path):
        self.world = World(root)
        self._ready, self._stop = threading.Event(), None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="stand-in", daemon=True)

    def __enter__(self) -> World:
        self._thread.start()
        assert self._ready.wait(10)
        return self.world

    def __exit__(self, *_: object) -> None:
        assert self.world.loop is not None and self._stop is not None
        self.world.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        world = self.world
        self._stop = asyncio.Event()
        world.loop = asyncio.get_running_loop()
        web = aiohttp.web.Application(client_max_size=1 << 30)
        web.add_routes([
            aiohttp.web.put("/blob/{id}", self._put_blob), aiohttp.web.get("/blob/{id}", self._get_blob),
            aiohttp.web.get("/file/{at}/{volume}/{path:.*}", self._get_file),
        ])  # fmt: skip
        runner = aiohttp.web.AppRunner(web)
        await runner.setup()
        site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        world.blobs_address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        server = grpclib.server.Server([Service(world)])
        await server.start("127.0.0.1", 0)
        world.address = f"http://127.0.0.1:{server._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]
        self._ready.set()
        await self._stop.wait()
        server.close()
        await runner.cleanup()

    async def _put_blob(self, request: aiohttp.web.Request) -> aiohttp.web.Response:
        data = await request.read()
        self.world.blobs[request.match_info["id"]] = data
        return aiohttp.web.Response(headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    async def _get_blob(self, request: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.Response(body=self.world.blobs[request.match_info["id"]])

    async def _get_file(self, request: aiohttp.web.Request) -> aiohttp.web.Response:
        found = request.match_info
        data = (self.world.volume(found["volume"]) / found["path"]).read_bytes()
        return aiohttp.web.Response(body=data[int(found["at"]) : int(found["at"]) + BLOCK])
