"""What never reaches an application: no key, a foreign host name, bodies that are too large or too slow."""

from __future__ import annotations

import socket

import httpx
import pytest
from fastapi import FastAPI

from ray_pipeline.errors import UserError
from ray_pipeline.serving import connection, guard
from ray_pipeline.serving.engines import RunningEngine
from ray_pipeline.serving.guard import GuardRules
from ray_pipeline.serving.http_server import bind, server_config
from tests.serving.made_servers import serving


def application() -> RunningEngine:
    app = FastAPI()

    @app.post("/v1/echo")
    def echo(body: dict) -> dict:
        return body

    return RunningEngine("echo", app, lambda: None)


@pytest.fixture(scope="module")
def address():
    with serving(application(), api_key="secret") as url:
        yield url


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer secre"}, 401),
        ({"authorization": "Basic secret"}, 401),
        ({"authorization": "Bearer secret"}, 200),
        ({"authorization": "bearer secret"}, 200),
        ({"x-api-key": "secret"}, 200),
        ({"x-api-key": "s\u00e9cret".encode("latin-1").decode("latin-1")}, 401),
        ({"x-api-key": "secret", "host": "evil.example"}, 403),
        ({"x-api-key": "secret", "host": "localhost:1"}, 200),
        ({"x-api-key": "secret", "content-type": "text/plain"}, 415),
    ],
)
def test_key_host_and_kind_of_body(address, headers, status):
    headers = {"content-type": "application/json"} | headers
    sent = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = httpx.post(f"{address}/v1/echo", content=b'{"a": 1}', headers=sent)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


def test_a_body_of_ten_megabytes_is_refused_announced_or_not(address):
    headers = {"content-type": "application/json", "x-api-key": "secret"}
    assert httpx.post(f"{address}/v1/echo", content=b" " * (10 << 20), headers=headers).status_code == 413
    chunks = (b" " * (1 << 20) for _ in range(10))
    assert httpx.post(f"{address}/v1/echo", content=chunks, headers=headers).status_code == 413


def test_a_body_that_never_ends_is_given_up(address, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    port = int(address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        slow.sendall(
            b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nx-api-key: secret\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert slow.recv(200).startswith(b"HTTP/1.1 408")


ASKED = b"GET / HTTP/1.1\r\nHost: localhost\r\nx-api-key: secret\r\n\r\n"


@pytest.mark.parametrize(
    ("whole", "head"), [(b"", b""), (b"", b"GET /v1"), (b"", b"GET / HTTP/1.1\r\nHost: lo"), (ASKED, b"GET / HT")]
)
def test_headers_that_never_end_are_given_up(address, monkeypatch, whole, head):
    """Of the first request of a connection, and of the next one."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=10) as slow:
        if whole:
            slow.sendall(whole)
            assert slow.recv(4000).startswith(b"HTTP/1.1 404")
        slow.sendall(head)
        said = b""
        while piece := slow.recv(4000):
            said += piece
    assert b"HTTP/1.1 408" in said


def test_a_port_in_use_is_told():
    with bind("127.0.0.1", 0) as taken, pytest.raises(UserError, match="another program listens there"):
        bind("127.0.0.1", taken.getsockname()[1])


def test_an_address_of_another_machine_is_told():
    with pytest.raises(UserError, match="--host 203.0.113.9: cannot listen there"):
        bind("203.0.113.9", 0)


def test_a_connection_without_requests_is_closed_by_the_client_first():
    """Else a request on its way meets a closed connection, now and then."""
    client = httpx.Limits().keepalive_expiry
    kept = server_config(application().app, GuardRules()).timeout_keep_alive
    assert client is not None and kept >= 2 * client
