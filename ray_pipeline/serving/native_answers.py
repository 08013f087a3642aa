"""From answers being written to what a client reads: whole, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from ray_pipeline.serving.answer_parts import AnswerParts
from ray_pipeline.serving.guard import error_body
from ray_pipeline.serving.replies import Json, Reply, usage
from ray_pipeline.serving.writer import Answer, Delta

DONE = "[DONE]"


class AnswerFailed(Exception):
    """An answer that ended in an error of the server's."""


@dataclass
class Choice:
    """One of the answers to a request, on its way to the client.

    Attributes:
        parts: takes thinking and calls out of a chat's answer; None for plain text.
    """

    index: int
    answer: Answer
    parts: AnswerParts | None
    shown: int = 0
    tokens: list[Any] = field(default_factory=list)

    @property
    def reports(self) -> bool:
        """Whether log-probabilities were asked for."""
        return self.answer.wanted.top is not None


@dataclass
class Exchange:
    """A request's answers and how they are told."""

    reply: Reply
    choices: list[Choice]
    include_usage: bool = False
    echo: str = ""

    @property
    def usage(self) -> Json:
        """Tokens of the prompt, once, and of all answers."""
        prompt = len(self.choices[0].answer.wanted.prompt)
        return usage(prompt, sum(choice.answer.tokens for choice in self.choices))

    def cancel(self) -> None:
        """Nobody reads any more."""
        for choice in self.choices:
            choice.answer.cancel()

    async def whole(self) -> Json:
        """The complete reply.

        Raises:
            AnswerFailed: an answer ended in an error.
        """
        choices = [await self._whole_choice(choice) for choice in self.choices]
        return self.reply.whole(choices, self.usage)

    async def _whole_choice(self, choice: Choice) -> Json:
        text, tokens, finish = "", [], None
        while finish is None:
            delta = await choice.answer.next()
            text, finish = text + delta.text, delta.finish
            tokens += delta.tokens
            if delta.error is not None:
                raise AnswerFailed(delta.error)
        if choice.parts is None:
            logprobs = self.reply.text_logprobs(tokens, len(self.echo)) if choice.reports else None
            return _choice(choice.index, {"text": self.echo + text}, logprobs, finish)
        reasoning, content, calls = choice.parts.whole(text)
        message: Json = {"role": "assistant", "content": content}
        message |= {} if reasoning is None else {"reasoning_content": reasoning}
        message |= {"tool_calls": calls} if calls else {}
        logprobs = self.reply.chat_logprobs(tokens) if choice.reports else None
        return _choice(choice.index, {"message": message}, logprobs, "tool_calls" if calls else finish)

    async def events(self) -> AsyncIterator[str]:
        """The data of each event of the stream."""
        queue: asyncio.Queue[tuple[Choice, Delta]] = asyncio.Queue()
        readers = [asyncio.create_task(_read(choice, queue)) for choice in self.choices]
        going = len(readers)
        try:
            for choice in self.choices:
                if choice.parts is not None:
                    yield _data(
                        self.reply.chunk([_choice(choice.index, {"delta": {"role": "assistant", "content": ""}})])
                    )
                elif self.echo:
                    yield _data(self.reply.chunk([_choice(choice.index, {"text": self.echo})]))
            while going:
                choice, delta = await queue.get()
                if delta.error is not None:
                    yield _data(error_body(500, delta.error))
                    return
                for chunk in self._chunks(choice, delta):
                    yield _data(self.reply.chunk([chunk]))
                going -= delta.finish is not None
            if self.include_usage:
                yield _data(self.reply.chunk([], self.usage))
            yield DONE
        finally:
            self.cancel()
            for reader in readers:
                reader.cancel()

    def _chunks(self, choice: Choice, delta: Delta) -> Sequence[Json]:
        """What a delta says; the end is an event of its own."""
        if choice.parts is None:
            logprobs = self.reply.text_logprobs(delta.tokens, choice.shown + len(self.echo)) if choice.reports else None
            choice.shown += len(delta.text)
            return [_choice(choice.index, {"text": delta.text}, logprobs, delta.finish)]
        parts = choice.parts.feed(delta.text)
        finish: str | None = delta.finish
        said: list[Json] = []
        if finish is not None:
            parts = [*parts, *choice.parts.finish()]
        said += [{part.field: part.text} for part in parts]
        if finish is not None and choice.parts.tool_calls:
            said.append({"tool_calls": [{"index": i} | c for i, c in enumerate(choice.parts.tool_calls)]})
            finish = "tool_calls"
        choice.tokens += delta.tokens
        if (finish is not None or (choice.tokens and choice.reports)) and not said:
            said = [{}]
        chunks = [_choice(choice.index, {"delta": one}) for one in said]
        if chunks and choice.reports:
            chunks[0]["logprobs"] = self.reply.chat_logprobs(choice.tokens)
            choice.tokens = []
        if finish is not None:
            chunks[-1]["finish_reason"] = finish
        return chunks


async def _read(choice: Choice, queue: asyncio.Queue[tuple[Choice, Delta]]) -> None:
    finish = None
    while finish is None:
        delta = await choice.answer.next()
        finish = delta.finish
        await queue.put((choice, delta))


def _choice(index: int, said: Json, logprobs: Json | None = None, finish: str | None = None) -> Json:
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}


def _data(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


async def until_left(work: Callable[[], Any], request: Request) -> Any:
    """The result of `work`; None where the client has gone before it."""
    tasks = [asyncio.ensure_future(work()), asyncio.ensure_future(_left(request))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
