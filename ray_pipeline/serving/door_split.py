"""Where engines differ, made alike: thinking and calls taken out of the text, in OpenAI's and in Anthropic's form."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterable
from typing import Any, Protocol

from ray_pipeline.serving.answer_parts import AnswerParts

Json = dict[str, Any]
Events = list[tuple[str, Json]]


class Splitter(Protocol):
    """Rewrites one reply."""

    def whole(self, value: Json) -> Json:
        """A complete reply."""
        ...

    def event(self, name: str, value: Json) -> Events:
        """An event of a stream: what is to be sent in its place."""
        ...


class ChatSplitter:
    """Chat completions."""

    def __init__(self, *, thinking: bool, tools: bool):
        self.thinking, self.tools = thinking, tools
        self._parts: dict[int, AnswerParts] = {}

    def whole(self, value: Json) -> Json:
        """See `Splitter`."""
        for choice in value.get("choices", ()):
            message = choice.get("message", {})
            if not message.get("content"):
                continue
            reasoning, content, calls = AnswerParts(thinking=self.thinking, tools=self.tools).whole(message["content"])
            message["content"] = content
            if reasoning is not None:
                message["reasoning_content"] = reasoning
            if calls and not message.get("tool_calls"):
                message["tool_calls"] = calls
                choice["finish_reason"] = "tool_calls"
        return value

    def event(self, name: str, value: Json) -> Events:
        """See `Splitter`."""
        out: list[Json] = []
        for choice in value.get("choices", ()):
            out += self._choice(choice)
        if not value.get("choices"):
            return [(name, value)]
        base = {key: one for key, one in value.items() if key != "usage"}
        chunks: Events = [(name, base | {"choices": [choice]}) for choice in out]
        if value.get("usage") is not None:
            if chunks:
                chunks[-1][1]["usage"] = value["usage"]
            else:
                chunks.append((name, value | {"choices": []}))
        return chunks

    def _choice(self, choice: Json) -> list[Json]:
        index = int(choice.get("index", 0))
        delta = dict(choice.get("delta") or {})
        if index not in self._parts:
            self._parts[index] = AnswerParts(thinking=self.thinking, tools=self.tools)
            delta = {"role": "assistant"} | delta  # llama.cpp omits it where an answer begins with half a letter
        parts = self._parts[index]
        finish = choice.get("finish_reason")
        text = delta.pop("content", None)
        said: list[Json] = [delta | ({"content": ""} if "role" in delta else {})] if delta else []
        read = parts.feed(text) if text else []
        if finish is not None:
            read = [*read, *parts.finish()]
        said += [{part.field: part.text} for part in read]
        if finish is not None and parts.tool_calls:
            said.append({"tool_calls": [{"index": i} | call for i, call in enumerate(parts.tool_calls)]})
            finish = "tool_calls"
        if not said and (finish is not None or choice.get("logprobs")):
            said = [{}]
        chunks = [{"index": index, "delta": one, "finish_reason": None} for one in said]
        if chunks and choice.get("logprobs"):
            chunks[0]["logprobs"] = choice["logprobs"]
        if chunks:
            chunks[-1]["finish_reason"] = finish
        return chunks


class MessagesSplitter:
    """Anthropic's messages: a `thinking` block before each `text` block that begins with thinking.

    Args:
        prompt_tokens: of the prompt, for a stream whose beginning llama.cpp omits.
    """

    def __init__(self, model: str, prompt_tokens: int, *, thinking: bool):
        self.model, self.prompt_tokens, self.thinking = model, prompt_tokens, thinking
        self._started = False
        self._parts: AnswerParts | None = None
        self._next = 0  # index of the next block that the client sees
        self._open: str | None = None  # its kind, while one is open

    def whole(self, value: Json) -> Json:
        """See `Splitter`."""
        blocks: list[Json] = []
        for block in value.get("content", ()):
            if block.get("type") != "text":
                blocks.append(block)
                continue
            reasoning, content, _ = AnswerParts(thinking=self.thinking).whole(block["text"])
            if reasoning:
                blocks.append({"type": "thinking", "thinking": reasoning, "signature": ""})
            if content or not reasoning:
                blocks.append(block | {"text": content or ""})
        return value | {"content": blocks}

    def event(self, name: str, value: Json) -> Events:
        """See `Splitter`."""
        kind = value.get("type")
        if not self._started and kind not in (None, "error", "ping"):
            self._started = True
            # llama.cpp omits it where an answer begins with half a letter, and all but the end where it is no more.
            if kind != "message_start":
                return [("message_start", _message_start(self.model, self.prompt_tokens)), *self.event(name, value)]
        if kind == "content_block_start" and value["content_block"].get("type") == "text":
            self._parts = AnswerParts(thinking=self.thinking)
            return self._say(self._parts.feed(value["content_block"].get("text", "")))
        if kind == "content_block_delta" and value["delta"].get("type") == "text_delta" and self._parts is not None:
            return self._say(self._parts.feed(value["delta"]["text"]))
        if kind == "content_block_stop" and self._parts is not None:
            said = self._say(self._parts.finish())
            self._parts = None
            return said + self._close()
        value = copy.deepcopy(value)
        if kind == "content_block_start":
            value["index"] = self._next
            self._next += 1
        elif kind in ("content_block_delta", "content_block_stop"):
            value["index"] = self._next - 1
        return [(name, value)]

    def _say(self, parts: Iterable[Any]) -> Events:
        out: Events = []
        for part in parts:
            kind = "thinking" if part.field == "reasoning_content" else "text"
            if self._open != kind:
                out += self._close()
                empty = {"thinking": "", "signature": ""} if kind == "thinking" else {"text": ""}
                start = {"type": "content_block_start", "index": self._next, "content_block": {"type": kind, **empty}}
                out.append(("content_block_start", start))
                self._open, self._next = kind, self._next + 1
            delta = {"type": f"{kind}_delta", kind: part.text}
            event = {"type": "content_block_delta", "index": self._next - 1, "delta": delta}
            out.append(("content_block_delta", event))
        return out

    def _close(self) -> Events:
        if self._open is None:
            return []
        self._open = None
        return [("content_block_stop", {"type": "content_block_stop", "index": self._next - 1})]


def _message_start(model: str, prompt_tokens: int) -> Json:
    message: Json = {
        "id": f"msg_{uuid.uuid4().hex[:24]}", "type": "message", "role": "assistant", "model": model, "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": prompt_tokens, "output_tokens": 0},
    }  # fmt: skip
    return {"type": "message_start", "message": message}


class TextLogprobs:
    """Completions whose log-probabilities come in the form of chats, in their own."""

    def whole(self, value: Json) -> Json:
        """See `Splitter`."""
        return self.event("", value)[0][1]

    def event(self, name: str, value: Json) -> Events:
        """See `Splitter`."""
        for choice in value.get("choices", ()):
            content = (choice.get("logprobs") or {}).get("content")
            if content is not None:
                choice["logprobs"] = {
                    "tokens": [one["token"] for one in content],
                    "token_logprobs": [one["logprob"] for one in content],
                    "top_logprobs": [{t["token"]: t["logprob"] for t in one["top_logprobs"]} for one in content],
                }
        return [(name, value)]
