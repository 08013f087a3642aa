"""Runs an application on a port until it is told to stop."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from ray_pipeline.errors import UserError
from ray_pipeline.serving.connection import Connection
from ray_pipeline.serving.guard import LOOPBACK, Guard, GuardRules

GRACE_SECONDS = 5  # for answers in progress when the server is stopped
# A connection without requests is kept longer than clients keep theirs (5 s in the official ones): who closes first
# must not be the server, which would reset a request that is on its way.
IDLE_SECONDS = 75


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one.

    Raises:
        UserError: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except (OSError, OverflowError) as error:
        listening.close()
        raise _explain(error, host, port) from None
    return listening


def _explain(error: Exception, host: str, port: int) -> UserError:
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return UserError(f"--port {port}: another program listens there. Give another, or --port 0 for any free one.")
    if code == errno.EACCES:
        return UserError(f"--port {port}: this user may not listen there. Give one from 1024 to 65535.")
    return UserError(f"--host {host}: cannot listen there ({error}). Use 127.0.0.1, or 0.0.0.0 for every network.")


def guard_rules(host: str, api_key: str | None) -> GuardRules:
    """What is let through: on the loopback interface only requests that call this machine by its own name."""
    return GuardRules(api_key, LOOPBACK if host in ("127.0.0.1", "localhost", "::1") else None)


def server_config(app: Any, rules: GuardRules) -> uvicorn.Config:
    """How every server here answers: behind the guard, nothing told about itself, slow heads of requests given up."""
    return uvicorn.Config(
        Guard(app, rules), http=Connection, ws="none", lifespan="on", log_level="warning", access_log=False,
        server_header=False, date_header=False, proxy_headers=False, timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=IDLE_SECONDS,
    )  # fmt: skip


def run_server(app: Any, listening: socket.socket, rules: GuardRules, ready: Callable[[], None]) -> None:
    """Serve until Ctrl-C or SIGTERM, which is raised again when all is closed.

    Args:
        ready: called when requests are answered.
    """

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

    Server(server_config(app, rules)).run(sockets=[listening])
