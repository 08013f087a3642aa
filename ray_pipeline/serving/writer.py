"""The thread that writes answers: requests wait in a queue, take a slot, and hand their text to whoever awaits it."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from model.generate.decoder import Decoder
from model.generate.sampler import NotFiniteLogits, Sampling
from model.generate.stopping import Detokenize, StopWatch
from ray_pipeline.serving.slots import SlotRequest, Slots, Written

FinishReason = Literal["stop", "length", "error"]
PREFILL_TOKENS = 4096  # of prompts run between two steps of the others


class Busy(Exception):
    """So many requests wait already that another one would not be answered in reasonable time."""


@dataclass(frozen=True)
class Wanted:
    """What one answer is to be like.

    Attributes:
        limit: most tokens. eos_ids: tokens that end it; they are no text. stop: texts that end it, omitted from it.
        top: log-probabilities of so many likeliest tokens; None for none. streamed: hand out text as it is written.
    """

    prompt: list[int]
    limit: int
    sampling: Sampling
    seed: int
    eos_ids: frozenset[int]
    decode: Detokenize
    stop: Sequence[str] = ()
    top: int | None = None
    streamed: bool = False


@dataclass
class Delta:
    """What came since the last one.

    Attributes:
        finish: why the answer ended; None while it goes on. error: the reason of `finish="error"`.
    """

    text: str = ""
    tokens: list[Written] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str | None = None


class Answer:
    """One answer while it is written: the writer's thread adds, one coroutine reads."""

    def __init__(self, wanted: Wanted, loop: asyncio.AbstractEventLoop):
        self.wanted, self.loop = wanted, loop
        self.cancelled = False
        self.finish: FinishReason | None = None  # kept here, since a reader takes the delta away at any moment
        self.tokens = 0
        self._watch = StopWatch(wanted.stop, wanted.decode)
        self._shown = 0
        self._lock = threading.Lock()
        self._delta = Delta()
        self._ready = asyncio.Event()

    async def next(self) -> Delta:
        """What was written since the last call; waits for something to come."""
        await self._ready.wait()
        self._ready.clear()
        with self._lock:
            delta, self._delta = self._delta, Delta()
        return delta

    def cancel(self) -> None:
        """Nobody reads any more: its slot is free after the next step."""
        self.cancelled = True

    def take(self, written: Written) -> bool:
        """Add a token, in the writer's thread; whether the answer goes on."""
        if self.cancelled:
            return False
        self.tokens += 1
        if written.token in self.wanted.eos_ids:
            self._add(written, "stop")
        elif self._watch.add(written.token):
            self._add(written, "stop")
        else:
            self._add(written, "length" if self.tokens >= self.wanted.limit else None)
        return self.finish is None

    def _add(self, written: Written, finish: FinishReason | None) -> None:
        end = self._watch.safe() if finish is None else len(self._watch.finish())
        with self._lock:
            self._delta.text += self._watch.text[self._shown : end]
            self._delta.tokens.append(written)
            self._delta.finish = self.finish = finish
        self._shown = max(self._shown, end)

    def fail(self, reason: str) -> None:
        """End it without an answer."""
        with self._lock:
            self.finish = self._delta.finish = "error"
            self._delta.error = reason

    @property
    def worth_telling(self) -> bool:
        """Whether the reader is to be woken."""
        return self.finish is not None or (self.wanted.streamed and bool(self._delta.text))

    def wake(self) -> None:
        """Let `next` return; in the event loop."""
        self._ready.set()


class Writer:
    """Runs a decoder in a thread of its own.

    Args:
        slots: answers written together. waiting: most requests that may wait for a slot.
    """

    def __init__(self, decoder: Decoder, *, slots: int, waiting: int):
        self._slots, self._most_waiting = Slots(decoder, slots), waiting
        self._waiting: deque[Answer] = deque()
        self._writing: list[Answer] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def submit(self, wanted: Sequence[Wanted]) -> list[Answer]:
        """Queue the answers to one request; called in an event loop.

        Raises:
            Busy: the queue is full.
        """
        loop = asyncio.get_running_loop()
        answers = [Answer(one, loop) for one in wanted]
        with self._changed:
            if len(self._waiting) + len(answers) > self._most_waiting:
                raise Busy(f"{len(self._waiting)} requests are waiting, and {self._most_waiting} may")
            self._waiting.extend(answers)
            self._changed.notify()
        return answers

    @property
    def is_alive(self) -> bool:
        """Whether answers are written."""
        return self._thread.is_alive() and not self._stopping

    @property
    def load(self) -> tuple[int, int]:
        """How many answers are being written, and how many wait."""
        return self._slots.used, len(self._waiting)

    def stop(self) -> None:
        """End the thread after its step; what was not answered fails."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (new := self._next()) is not None:
            self._writing += new
            try:
                if new:
                    self._slots.add([self._slot_request(answer) for answer in new])
                self._slots.step()
            except NotFiniteLogits as error:
                self._fail_all(f"{error}: the model's weights are spoiled")
            except Exception as error:  # noqa: BLE001  one bad step must not end the server; it is told to all it met
                self._fail_all(f"{type(error).__name__}: {error}")
            self._tell()
        with self._changed:
            self._writing += self._waiting
            self._waiting.clear()
        self._fail_all("the server is shutting down")
        self._tell()

    def _next(self) -> list[Answer] | None:
        """Requests to begin now; waits while there is nothing to do. None at the end."""
        with self._changed:
            while not self._stopping and not self._waiting and not self._slots.used:
                self._changed.wait()
            if self._stopping:
                return None
            new: list[Answer] = []
            longest = 0
            while self._waiting and len(new) < self._slots.free:
                if self._waiting[0].cancelled:
                    self._waiting.popleft()
                    continue
                longest = max(longest, len(self._waiting[0].wanted.prompt))
                if new and longest * (len(new) + 1) > PREFILL_TOKENS:
                    break
                new.append(self._waiting.popleft())
            return new

    def _slot_request(self, answer: Answer) -> SlotRequest:
        wanted = answer.wanted
        return SlotRequest(wanted.prompt, wanted.limit, wanted.sampling, wanted.seed, answer.take, wanted.top)

    def _fail_all(self, reason: str) -> None:
        self._slots.clear()
        for answer in self._writing:
            if answer.finish is None:
                answer.fail(reason)

    def _tell(self) -> None:
        """Wake the readers, once for all of a step."""
        told = [answer for answer in self._writing if answer.worth_telling]
        self._writing = [a for a in self._writing if a.finish is None and not a.cancelled]
        for loop in {answer.loop for answer in told}:
            mine = [answer for answer in told if answer.loop is loop]
            if not loop.is_closed():
                loop.call_soon_threadsafe(_wake, mine)


def _wake(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.wake()
