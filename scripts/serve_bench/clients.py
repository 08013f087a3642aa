"""Clients that ask all at once: how long until the first text, how many tokens a second."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from scripts.serve_bench.servers import Server
from scripts.serve_bench.task import Task, question


@dataclass(frozen=True)
class Said:
    """One streamed answer. first: seconds until its first text. tokens: as the server counts them.

    drafted, accepted: tokens that the server guessed ahead, and those of them that the model would have said.
    """

    text: str
    tokens: int
    first: float
    drafted: int
    accepted: int


async def _ask(client: httpx.AsyncClient, model: str, text: str, tokens: int) -> Said:
    body: dict[str, Any] = {
        "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, said, counted = time.perf_counter(), None, "", 0
    timings: dict[str, Any] = {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"status {reply.status_code}: {(await reply.aread())[:1000]!r}")
        async for line in reply.aiter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            chunk = json.loads(line[5:])
            timings = chunk.get("timings") or timings
            if chunk.get("usage"):
                counted = chunk["usage"]["completion_tokens"]
            for choice in chunk.get("choices", ()):
                piece = choice["delta"].get("reasoning_content") or choice["delta"].get("content") or ""
                first = time.perf_counter() - began if piece and first is None else first
                said += piece
    if first is None:
        raise RuntimeError(f"{client.base_url}: an answer without text")
    return Said(said, counted, first, timings.get("draft_n", 0), timings.get("draft_n_accepted", 0))


async def _all(server: Server, questions: Sequence[Sequence[str]], tokens: int) -> list[Said]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=server.address, timeout=None, limits=limits, trust_env=False
    ) as client:  # fmt: skip

        async def one(mine: Sequence[str]) -> list[Said]:
            return [await _ask(client, server.model, text, tokens) for text in mine]

        return [said for part in await asyncio.gather(*map(one, questions)) for said in part]


def answers(server: Server, task: Task) -> list[str]:
    """Greedy answers to the checked questions, one after another."""
    said = asyncio.run(_all(server, [[question(-1 - i) for i in range(task.checked)]], task.tokens))
    return [one.text for one in said]


def tie(server: Server, task: Task, number: int, other: str) -> float:
    """How sure a server is of the token at which another's greedy answer to a checked question leaves its own.

    Returns:
        nats between its two likeliest tokens there: what rounds differently may take either where that is nothing.
    """
    body = {
        "model": server.model, "messages": [{"role": "user", "content": question(-1 - number)}],
        "max_tokens": task.tokens, "temperature": 0, "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    reply = httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=None, trust_env=False).json()
    said = ""
    for token in reply["choices"][0]["logprobs"]["content"]:
        said += token["token"]
        if not other.startswith(said):
            first, second = token["top_logprobs"]
            return float(first["logprob"] - second["logprob"])
    return 0.0


def measure(server: Server, task: Task, clients: int, start: int) -> dict[str, Any]:
    """One turn of a server: tokens of all answers a second, and each answer's seconds to the first text.

    Args:
        start: number of the first question.

    Raises:
        RuntimeError: an answer of another length.
    """
    numbers = iter(range(start, start + clients * task.each))
    questions = [[question(next(numbers)) for _ in range(task.each)] for _ in range(clients)]
    began = time.perf_counter()
    said = asyncio.run(_all(server, questions, task.tokens))
    seconds = time.perf_counter() - began
    if wrong := [one.tokens for one in said if one.tokens != task.tokens]:
        raise RuntimeError(f"{server.name}: answers of {wrong} tokens instead of {task.tokens}")
    return {
        "tokens_per_second": clients * task.each * task.tokens / seconds, "first": [one.first for one in said],
        "drafted": sum(one.drafted for one in said), "accepted": sum(one.accepted for one in said),
    }  # fmt: skip
