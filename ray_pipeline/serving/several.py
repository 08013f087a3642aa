"""Several answers to one request, from an engine that is asked for each by itself.

llama.cpp counts the tokens of one of `n` answers alone, and hangs up on completions with `n`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx

from ray_pipeline.serving.request_forms import MOST_CHOICES

Json = dict[str, Any]
Line = tuple[str, str]  # name and data of an event
DONE = "[DONE]"


def one_each(body: Json) -> list[Json]:
    """A request for each answer that is asked for, each with a seed of its own.

    Raises:
        ValueError: no number of answers.
    """
    count = body.get("n")
    if count is None:
        return [body]
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_CHOICES:
        raise ValueError(f"n: must be a whole number from 1 to {MOST_CHOICES} (given: {repr(count)[:100]})")
    seed = body.get("seed")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 or count == 1:
        return [body | {"n": 1}] * count
    return [body | {"n": 1, "seed": seed + i} for i in range(count)]


def merged_replies(values: Sequence[Json]) -> Json:
    """One reply of all choices, and the tokens of all answers; the prompt's once."""
    if len(values) == 1:
        return values[0]
    choices = [choice | {"index": i} for i, value in enumerate(values) for choice in value["choices"]]
    return values[0] | {"choices": choices, "usage": _usage([value["usage"] for value in values])}


def _usage(found: Sequence[Json]) -> Json:
    written = sum(one["completion_tokens"] for one in found)
    counts = {"completion_tokens": written, "total_tokens": found[0]["prompt_tokens"] + written}
    return found[0] | counts


async def lines_of(answer: httpx.Response) -> AsyncIterator[Line]:
    """The events of a stream."""
    event = ""
    async for line in answer.aiter_lines():
        if line.startswith("event:"):
            event = line[6:].strip()
        elif line.startswith("data:"):
            yield event, line[5:].strip()
        elif not line:
            event = ""


async def merged_events(answers: Sequence[httpx.Response]) -> AsyncIterator[Line]:
    """The events of all streams as they come, each with its answer's index; the usage of all at the end.

    Raises:
        httpx.HTTPError: a stream broke off.
    """
    queue: asyncio.Queue[tuple[int, str | Exception | None]] = asyncio.Queue()
    readers = [asyncio.create_task(_read(i, answer, queue)) for i, answer in enumerate(answers)]
    going, usage, last = len(answers), [], {}
    try:
        while going:
            i, data = await queue.get()
            if isinstance(data, Exception):
                raise data
            if data is None:
                going -= 1
                continue
            value = json.loads(data)
            if value.get("usage") is not None:
                usage.append(value.pop("usage"))
                last = value
            value["choices"] = [choice | {"index": i} for choice in value.get("choices", ())]
            if value["choices"] or "error" in value:
                yield "", json.dumps(value)
        if len(usage) == len(answers):
            yield "", json.dumps(last | {"choices": [], "usage": _usage(usage)})
        yield "", DONE
    finally:
        for reader in readers:
            reader.cancel()


async def _read(i: int, answer: httpx.Response, queue: asyncio.Queue[tuple[int, str | Exception | None]]) -> None:
    try:
        async for _, data in lines_of(answer):
            if data != DONE:
                await queue.put((i, data))
    except httpx.HTTPError as error:
        await queue.put((i, error))
    await queue.put((i, None))
