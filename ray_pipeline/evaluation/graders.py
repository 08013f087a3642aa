"""How a task's answers are marked: by their final result, by a reward, or by running them against tests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ray_pipeline.evaluation.marking import are_right
from ray_pipeline.evaluation.tasks.item import Item, Scoring
from ray_pipeline.hardware import num_cpus
from ray_pipeline.isolation.sandbox import run_judged
from ray_pipeline.rewards.answer import final_text
from ray_pipeline.rewards.unit_tests import MEMORY_BYTES, code_block
from ray_pipeline.settings.post_training import ScoringConfig

if TYPE_CHECKING:
    from ray_pipeline.rewards.scoring import Scorer


class AnswerScoring(Scoring):
    """Is the final answer the reference's? The same marking as in training."""

    def score(self, items: Sequence[Item], texts: Sequence[str]) -> list[float | None]:
        """1.0 or 0.0; never fails."""
        asked = [(item.prompt, text, item.reference) for item, text in zip(items, texts, strict=True)]
        return [float(right) for right in are_right(asked)]


class RewardScoring(Scoring):
    """Any reward by name; those that can hang work in processes of their own, with a time limit.

    It is given an item's data["reference"] where there is one, else the reference that people read.
    """

    def __init__(self, reward: str, settings: ScoringConfig | None = None):
        self.reward = reward
        # A mark that failed is counted and shown; it does not throw the other answers away.
        self.settings = settings or ScoringConfig(max_failures=1.0)
        self._scorer: Scorer | None = None

    def __enter__(self) -> Scoring:
        from ray_pipeline.rewards.scoring import Scorer

        self._scorer = Scorer({self.reward: 1.0}, self.settings)
        self._scorer.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._scorer is not None:
            self._scorer.__exit__(*exc)
            self._scorer = None

    def score(self, items: Sequence[Item], texts: Sequence[str]) -> list[float | None]:
        """The reward's value, None where it raised or ran out of time."""
        assert self._scorer is not None, "a scoring is used as a context"
        pairs = zip(items, texts, strict=True)
        asked = [(item.prompt, text, item.data.get("reference", item.reference)) for item, text in pairs]
        scores = self._scorer.score(asked)
        values = zip(scores.parts, scores.failed, strict=True)
        return [None if failed else float(part[self.reward]) for part, failed in values]


def code_of(text: str) -> str:
    """The program in an answer: its last block of code, else all that is not thinking."""
    final = final_text(text) or ""
    block = code_block(final)
    return final if block is None else block


class TestScoring(Scoring):
    """Runs the answer's program with the item's tests in a sandbox: right if the tests reach their end.

    An item's data: "tests" is Python that raises where the program is wrong; "before" (optional) is put in front of an
    answer that does not define "name" itself, because it goes on where the prompt stopped.
    """

    __test__ = False  # not a test of pytest's

    def __init__(self, *, wall_seconds: float = 10.0, without_landlock: bool = False):
        self.wall_seconds, self.without_landlock = wall_seconds, without_landlock

    def score(self, items: Sequence[Item], texts: Sequence[str]) -> list[float | None]:
        """1.0 where all tests pass; None where the sandbox could not run."""
        with ThreadPoolExecutor(max_workers=num_cpus()) as pool:
            return list(pool.map(self._run, items, texts))

    def _run(self, item: Item, text: str) -> float:
        solution, tests = program(text, item.data), item.data["tests"]
        limits: dict[str, Any] = {"memory_bytes": MEMORY_BYTES, "without_landlock": self.without_landlock}
        return float(run_judged(solution, tests, seconds=self.wall_seconds, **limits))


def program(text: str, data: Mapping[str, Any]) -> str:
    """The code of an answer, made whole where it only continues the prompt's."""
    code, name = code_of(text), data.get("name")
    if name is None or re.search(rf"^\s*def\s+{re.escape(name)}\b", code, re.MULTILINE):
        return code
    return f"{data.get('before', '')}{code}"
