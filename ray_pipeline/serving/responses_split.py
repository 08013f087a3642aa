"""OpenAI's responses whose text holds thinking: it becomes an item `reasoning` beside the item `message`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ray_pipeline.serving.answer_parts import AnswerParts, Part
from ray_pipeline.serving.door_split import Events, Json


class ResponsesSplitter:
    """See `Splitter`. An item's events carry its place among all items, which thinking moves.

    Args:
        thinking: the prompt ended with `<think>`.
    """

    def __init__(self, *, thinking: bool):
        self.thinking = thinking
        self._places: dict[str, int] = {}  # of items that the client has seen, by id
        self._sent = 0  # events
        self._parts: AnswerParts | None = None  # of the message that is being written
        self._held: Events = []  # its beginning, until there is an answer
        self._message = ""  # its id
        self._texts: dict[str, str] = {}  # of messages and their reasoning, by id

    def whole(self, value: Json) -> Json:
        """See `Splitter`."""
        out: list[Json] = []
        for item in value.get("output", ()):
            if item.get("type") != "message":
                out.append(item)
                continue
            text = "".join(part.get("text", "") for part in item["content"])
            reasoning, answer, _ = AnswerParts(thinking=self.thinking).whole(text)
            out += _items(item, reasoning or "", answer or "")
        return value | {"output": out}

    def event(self, name: str, value: Json) -> Events:
        """See `Splitter`."""
        out = self._events(name, value)
        numbered = [(kind, one | {"sequence_number": self._sent + i}) for i, (kind, one) in enumerate(out)]
        self._sent += len(out)
        return numbered

    def _events(self, name: str, value: Json) -> Events:
        kind = str(value.get("type"))
        item = value.get("item") or {}
        if kind == "response.output_item.added" and item.get("type") == "message":
            self._parts, self._message, self._held = AnswerParts(thinking=self.thinking), item["id"], [(name, value)]
            return []
        if self._parts is not None and kind == "response.content_part.added":
            self._held.append((name, value))
            return []
        if self._parts is not None and kind == "response.output_text.delta":
            return self._say(name, value, self._parts.feed(value["delta"]))
        if self._parts is not None and kind == "response.output_text.done":
            out = self._say(name, value, self._parts.finish())
            self._parts = None
            return out + self._end(name, value)
        if kind in ("response.content_part.done", "response.output_item.done") and self._held_back(value):
            return []  # thinking alone
        if kind in ("response.completed", "response.incomplete"):
            return [(name, value | {"response": self._final(value["response"])})]
        if kind in ("response.created", "response.in_progress"):
            return [(name, value | {"response": {"output": []} | value["response"]})]
        return [(name, self._placed(value))]

    def _say(self, name: str, value: Json, parts: Iterable[Part]) -> Events:
        out: Events = []
        for part in parts:
            if part.field == "content":
                out += self._opened()
                self._texts[self._message] = self._texts.get(self._message, "") + part.text
                out.append((name, self._placed(value | {"type": "response.output_text.delta", "delta": part.text})))
                continue
            if (thought := _reasoning_id(self._message)) not in self._places:
                item = _reasoning(thought, "", "in_progress")
                kind = "response.output_item.added"
                out.append((kind, self._placed({"type": kind, "item": item})))
            self._texts[thought] = self._texts.get(thought, "") + part.text
            kind = "response.reasoning_text.delta"
            event = {"type": kind, "item_id": thought, "delta": part.text}
            out.append((kind, self._placed(event)))
        names = {"response.output_text.done": "response.output_text.delta"}  # what the end still had to say
        return [(names.get(one, one), event) for one, event in out]

    def _opened(self) -> Events:
        held = [(name, self._placed(value)) for name, value in self._held]
        self._held = []
        return held

    def _end(self, name: str, value: Json) -> Events:
        out: Events = []
        thought = _reasoning_id(self._message)
        if thought in self._places:
            item = _reasoning(thought, self._texts[thought], "completed")
            text = {"type": "response.reasoning_text.done", "item_id": thought}
            done = {"type": "response.output_item.done", "item": item}
            text["text"] = self._texts[thought]
            out += [(str(one["type"]), self._placed(one)) for one in (text, done)]
            if self._held:
                return out
        return [*out, *self._opened(), (name, self._placed(value))]

    def _held_back(self, value: Json) -> bool:
        return bool(self._held) and (value.get("item") or {}).get("id", value.get("item_id")) == self._message

    def _placed(self, value: Json) -> Json:
        """With the client's index of its item, and the text that is left of a message."""
        value = dict(value)
        item = value.get("item")
        found = item["id"] if item and "id" in item else value.get("item_id")
        if found is None:
            return value
        place = self._places.setdefault(found, len(self._places))
        value["output_index"] = place  # which llama.cpp omits, and OpenAI's client needs
        if "item_id" in value:
            value["content_index"] = 0
        text = self._texts.get(found, "")
        if value["type"] == "response.output_text.done":
            value["text"] = text
        elif value["type"] == "response.content_part.done" and "text" in value["part"]:
            value["part"] = value["part"] | {"text": text}
        elif value["type"] == "response.output_item.done" and item and item.get("type") == "message":
            value["item"] = _items(item, "", text)[0]
        return value

    def _final(self, response: Json) -> Json:
        out: list[Json] = []
        for item in response.get("output", ()):
            known = item.get("type") == "message" and item["id"] == self._message
            texts = [self._texts.get(one, "") for one in (_reasoning_id(self._message), self._message)]
            out += _items(item, *texts) if known else [item]
        return response | {"output": sorted(out, key=lambda item: self._places.get(item.get("id", ""), len(out)))}


def _items(message: Json, reasoning: str, answer: str) -> list[Json]:
    """A message's thinking, where there is some, and its answer, where there is one or nothing else."""
    content = [part | {"text": answer} for part in message["content"][:1]]
    items = [_reasoning(_reasoning_id(message["id"]), reasoning, "completed")] if reasoning else []
    return items + ([message | {"content": content}] if answer or not reasoning else [])


def _reasoning_id(message: str) -> str:
    return "rs_" + message.removeprefix("msg_")


def _reasoning(name: str, text: str, status: str) -> Json:
    content: list[dict[str, Any]] = [{"type": "reasoning_text", "text": text}] if text else []
    return {"id": name, "type": "reasoning", "summary": [], "content": content, "status": status}
