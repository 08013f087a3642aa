"""Requests to a server of a model, good and bad ones, by a random number generator."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

QUESTIONS = [f"What is {i} + {3 * i}?" for i in range(16)]
TOKENS = 8  # of a good request's answer
NATIVE = ("/v1/chat/completions", "/v1/completions")
DOOR = (*NATIVE, "/v1/messages", "/v1/responses", "/v1/messages/count_tokens", "/tokenize", "/detokenize")
JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 1e308, -1e-308, 10**30, "", "x", "\ud800", "\0", "5", [], {}, [[]], [None], [""],
    {"a": 1}, [10**9], [[1, 2]], "abc " * 1000, ["x"] * 40, {"type": "json_object"}, {"5": -100}, [1] * 500,
    {"include_usage": 1},
]  # fmt: skip
FIELDS = (
    "model", "messages", "prompt", "input", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n",
    "stream", "stream_options", "logprobs", "top_logprobs", "logit_bias", "tools", "tool_choice", "response_format",
    "repetition_penalty", "presence_penalty", "echo", "best_of", "user", "temprature", "tokens", "content", "grammar",
)  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A request.

    Attributes:
        question: of a good one, which has to be answered with this question's text.
        leaves: the client goes after the first piece of the answer.
    """

    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    question: str | None = None
    leaves: bool = False


def good_body(path: str, question: str) -> dict[str, Any]:
    """Greedy, of `TOKENS` tokens."""
    settings = {"temperature": 0, "max_tokens": TOKENS}
    if path == "/v1/completions":
        return settings | {"prompt": question}
    if path == "/v1/responses":
        return {"input": question, "temperature": 0, "max_output_tokens": TOKENS}
    if path in ("/tokenize", "/detokenize"):
        return {"content": question} if path == "/tokenize" else {"tokens": [5, 6]}
    return settings | {"messages": [{"role": "user", "content": question}]}


def make(chance: Random, paths: tuple[str, ...]) -> Made:
    """One of ten kinds."""
    kind = chance.randrange(10)
    path, question = chance.choice(paths), chance.choice(QUESTIONS)
    body = good_body(path, question)
    if kind < 3:
        streams = {"stream": chance.random() < 0.5}
        return Made("POST", NATIVE[0], _json(good_body(NATIVE[0], question) | streams), question=question)
    if kind < 6:
        return Made("POST", path, _json(_mutated(chance, body)))
    if kind == 6:
        return Made("POST", path, _damaged(chance, _json(body)))
    if kind == 7:
        long = body | {"max_tokens": 100, "temperature": 1, "stream": True}
        return Made("POST", path, _json(long), leaves=True)
    if kind == 8:
        return _odd(chance, path, body)
    return Made("GET", chance.choice(["/", "/health", "/v1/models", "/openapi.json", "/etc/passwd", "/v1/../x", path]))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _mutated(chance: Random, body: dict[str, Any]) -> dict[str, Any]:
    body = json.loads(json.dumps(body))
    for _ in range(chance.randint(1, 3)):
        target = body
        messages = body.get("messages")
        if isinstance(messages, list) and messages and isinstance(messages[0], dict) and chance.random() < 0.3:
            target = messages[0]
        name = chance.choice([*target, *FIELDS])
        if chance.random() < 0.2:
            target.pop(name, None)
        else:
            target[name] = chance.choice(JUNK)
    return body


def _damaged(chance: Random, text: bytes) -> bytes:
    damaged = bytearray(text)
    for _ in range(chance.randint(1, 4)):
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
    return bytes(damaged[: chance.randint(1, len(damaged))] if chance.random() < 0.5 else damaged)


def _odd(chance: Random, path: str, body: dict[str, Any]) -> Made:
    """Too large, of another kind, of another host, by another method, or with another encoding named."""
    kind = chance.randrange(6)
    if kind == 0 and chance.random() < 0.1:
        return Made("POST", path, b" " * (10 << 20))
    headers = {"content-type": chance.choice(["text/plain", "", "application/json; charset=utf-16", "a/b" * 200])}
    if kind == 1:
        return Made("POST", path, _json(body), headers)
    if kind == 2:
        return Made(chance.choice(["PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "X"]), path, _json(body))
    others = [{"host": "evil.example"}, {"content-encoding": "gzip"}, {"x-a": "b" * 5000}, {"expect": "y"}]
    return Made("POST", path, _json(body), {"content-type": "application/json"} | chance.choice(others))
