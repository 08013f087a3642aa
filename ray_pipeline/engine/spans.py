"""What one rank did in one training step, and when: spans of the pipeline's actions, of waiting, of the optimizer step.

On a GPU spans are taken between events of its stream, so that nothing waits for them; on a CPU by the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

Span = Callable[[str], AbstractContextManager[Any]]
WAIT, DATA, OPTIMIZER = "wait", "next batch", "optimizer step"
"""Names of spans beside those of a schedule's actions, which are their kinds: F, B, I, W."""


def no_span(name: str) -> AbstractContextManager[None]:
    """Records nothing."""
    return nullcontext()


class SpanRecorder:
    """Spans of one step, in the order in which they ended."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []
        self._origin = self._now()  # on the GPU's stream
        self._started = time.time()  # Unix seconds at about that moment

    def _now(self) -> Any:
        if not self._cuda:
            return time.time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """What is done inside is one span."""
        start = self._now()
        yield
        self._marks.append((name, start, self._now()))

    def spans(self) -> list[tuple[str, float, float]]:
        """Name, start and end of each, in Unix seconds of this rank's clock."""
        if not self._cuda:
            return list(self._marks)
        torch.cuda.synchronize()
        return [(name, self._seconds(start), self._seconds(end)) for name, start, end in self._marks]

    def _seconds(self, event: Any) -> float:
        return float(self._started + self._origin.elapsed_time(event) / 1000)
