"""One connection of a client: ended where the head of a request does not arrive in reasonable time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ray_pipeline.serving.guard import error_body

HEAD_SECONDS = 20.0  # from the connection, or from a request's first byte, until its headers are there


class Connection(H11Protocol):
    """uvicorn's own, with a clock: it waits for ever for headers that come a byte at a time."""

    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Expect a request."""
        super().connection_made(transport)
        self._clock = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def data_received(self, data: bytes) -> None:
        """Start the clock with a request's first byte and stop it with the last of its head."""
        if self._clock is None and self.conn.their_state is h11.IDLE:
            self._clock = self.loop.call_later(HEAD_SECONDS, self._give_up)
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_clock()
        super().connection_lost(exc)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _give_up(self) -> None:
        self._clock = None
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE:
            body = json.dumps(error_body(408, f"the headers did not arrive within {HEAD_SECONDS:g} s")).encode()
            head = "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
