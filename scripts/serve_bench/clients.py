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
from scripts.serve_bench.task import Task, prompt


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


def _request(model: str, task: Task, number: int) -> tuple[str, dict[str, Any]]:
    """Path and body of the request at place `number`."""
    text = prompt(task, number)
    said = {"prompt": text} if task.kind else {"messages": [{"role": "user", "content": text}]}
    path = "/v1/completions" if task.kind else "/v1/chat/completions"
    return path, {"model": model, **said, "max_tokens": task.tokens, "temperature": 0}


async def _ask(client: httpx.AsyncClient, model: str, task: Task, number: int) -> Said:
    path, body = _request(model, task, number)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    began, first, said, counted = time.perf_counter(), None, "", 0
    timings: dict[str, Any] = {}
    async with client.stream("POST", path, json=body) as reply:
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
                delta = choice.get("delta") or {"content": choice.get("text")}
                piece = delta.get("reasoning_content") or delta.get("content") or ""
                first = time.perf_counter() - began if piece and first is None else first
                said += piece
    if first is None:
        if not task.kind:
            raise RuntimeError(f"{client.base_url}: an answer without text")
        first = time.perf_counter() - began  # what goes on with a text may be its end
    return Said(said, counted, first, timings.get("draft_n", 0), timings.get("draft_n_accepted", 0))


async def _all(server: Server, task: Task, places: Sequence[Sequence[int]]) -> list[Said]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=server.address, timeout=None, limits=limits, trust_env=False
    ) as client:  # fmt: skip

        async def one(mine: Sequence[int]) -> list[Said]:
            return [await _ask(client, server.model, task, number) for number in mine]

        return [said for part in await asyncio.gather(*map(one, places)) for said in part]


def answers(server: Server, task: Task) -> list[str]:
    """Greedy answers to the checked questions, one after another."""
    said = asyncio.run(_all(server, task, [[-1 - i for i in range(task.checked)]]))
    return [one.text for one in said]


def tie(server: Server, task: Task, number: int, other: str) -> float:
    """How sure a server is of the token at which another's greedy answer to a checked question leaves its own.

    Returns:
        nats between its two likeliest tokens there: what rounds differently may take either where that is nothing.
    """
    path, body = _request(server.model, task, -1 - number)
    body |= {"logprobs": 2} if task.kind else {"logprobs": True, "top_logprobs": 2}
    reply = httpx.post(f"{server.address}{path}", json=body, timeout=None, trust_env=False).json()
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
    places = [range(start + i * task.each, start + (i + 1) * task.each) for i in range(clients)]
    began = time.perf_counter()
    said = asyncio.run(_all(server, task, places))
    seconds = time.perf_counter() - began
    wrong = [one.tokens for one in said if one.tokens != task.tokens]
    if wrong and not task.kind:  # a text may end
        raise RuntimeError(f"{server.name}: answers of {wrong} tokens instead of {task.tokens}")
    return {
        "tokens_per_second": sum(one.tokens for one in said) / seconds, "first": [one.first for one in said],
        "drafted": sum(one.drafted for one in said), "accepted": sum(one.accepted for one in said),
    }  # fmt: skip
