"""The trainings of a race, one after another, and what they say: means, intervals and paired differences over seeds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_pipeline.data.rows.batch import Batch
from scripts.learning_bench.competitors import build
from scripts.learning_bench.text import Text, read_text

CURVE = 25  # steps between the losses that are kept
HELD_OUT_ROWS = 16  # at once
# Two-sided 95% of Student's t by degrees of freedom; beyond the last the normal one is near enough.
_STUDENT = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Plan:
    """What is trained. Competitors are recipes of ours, the first of which the others are timed by, and peers."""

    texts: tuple[str, ...]
    competitors: tuple[str, ...]
    seeds: int
    steps: int
    batch_size: int
    seq_len: int
    vocab_size: int
    documents: int
    equal_time: bool


@dataclass(frozen=True)
class Training:
    """One training and its held-out loss.

    Attributes:
        race: "tokens", or "time" where `steps` is what the first recipe's CPU time allows.
        nats: held-out, per token. bits: per byte of held-out text. seconds: of CPU time a step, the median.
        curve: training loss every 25 steps, the mean of them.
    """

    text: str
    competitor: str
    seed: int
    race: str
    steps: int
    tokens: int
    num_params: int
    nats: float
    bits: float
    seconds: float
    curve: list[float]

    def line(self) -> str:
        """For a person who waits."""
        return (f"{self.text:28} {self.competitor:14} seed {self.seed} {self.steps:6} steps ({self.race})  "
                f"{self.nats:.4f} nats  {self.bits:.4f} bits a byte  {self.seconds:.3f} s a step")  # fmt: skip


def race(plan: Plan, done: list[dict[str, Any]]) -> Iterator[Training]:
    """Train what is not done yet; each training is added to `done`, as plain values, before it is given."""
    for source in plan.texts:
        text = read_text(source, vocab_size=plan.vocab_size, seq_len=plan.seq_len, documents=plan.documents)
        for seed in range(plan.seeds):
            for name in plan.competitors:
                yield from _trained(plan, text, name, seed, "tokens", plan.steps, done)
            for name in plan.competitors[1:] if plan.equal_time else ():
                steps = equal_time_steps(plan, text.name, label(name), done)
                yield from _trained(plan, text, name, seed, "time", steps, done)


def equal_time_steps(plan: Plan, text: str, name: str, done: Sequence[dict[str, Any]]) -> int:
    """Steps that take a competitor the CPU time of the first recipe; decided once, by what was measured first."""
    of_text = [t for t in done if t["text"] == text]
    decided = [t["steps"] for t in of_text if t["competitor"] == name and t["race"] == "time"]
    if decided:
        return int(decided[0])
    ours, theirs = (
        next(t["seconds"] for t in of_text if t["competitor"] == who and t["race"] == "tokens")
        for who in (label(plan.competitors[0]), name)
    )
    return max(1, round(plan.steps * ours / theirs))


def label(name: str) -> str:
    """How a competitor is called: a recipe's file by its name alone."""
    return Path(name).stem


def _trained(
    plan: Plan, text: Text, name: str, seed: int, kind: str, steps: int, done: list[dict[str, Any]]
) -> Iterator[Training]:
    tokens = steps * plan.batch_size * plan.seq_len
    key = {"text": text.name, "competitor": label(name), "seed": seed, "race": kind, "steps": steps, "tokens": tokens}
    if any(key.items() <= other.items() for other in done):
        return
    found = train(text, name, seed=seed, steps=steps, batch_size=plan.batch_size, seq_len=plan.seq_len)
    training = Training(**key, **found)
    done.append(asdict(training))
    yield training


def train(text: Text, name: str, *, seed: int, steps: int, batch_size: int, seq_len: int) -> dict[str, Any]:
    """Train a competitor; the figures of a `Training`."""
    model = build(
        name, vocab_size=text.vocab_size, seq_len=seq_len, seed=seed, steps=steps, batch_size=batch_size
    )  # fmt: skip
    losses, seconds = [], []
    for step in range(steps):
        batch = text.batch(seed, step, batch_size)
        start = time.process_time()
        losses.append(model.train_step(batch, step))
        seconds.append(time.process_time() - start)
    nats, targets = 0.0, 0
    for batch in text.heldout_batches(HELD_OUT_ROWS):
        nats += model.nats(batch)
        targets += _targets(batch)
    curve = [statistics.fmean(losses[start : start + CURVE]) for start in range(0, steps, CURVE)]
    return {
        "num_params": model.num_params, "nats": nats / targets, "bits": nats / math.log(2) / text.heldout_bytes,
        "seconds": statistics.median(seconds), "curve": curve,
    }  # fmt: skip


def _targets(batch: Batch) -> int:
    return int((batch.labels >= 0).sum())


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of a few seeds and half of its 95% interval (Student's t); of one seed NaN."""
    if len(values) < 2:
        return values[0], math.nan
    factor = _STUDENT[len(values) - 1] if len(values) <= len(_STUDENT) else 1.96
    return statistics.fmean(values), factor * statistics.stdev(values) / math.sqrt(len(values))


def table(done: Sequence[dict[str, Any]], against: str = "nanochat") -> list[str]:
    """Lines of Markdown: every competitor's loss, and its difference to a peer's on the same text, race and seeds."""
    out = [
        f"| text | race | competitor | parameters | nats a token | bits a byte | against {against} |",
        "|---" * 7 + "|",
    ]
    kinds = dict.fromkeys((t["text"], t["steps"] if t["race"] == "tokens" else "time") for t in done)
    for text, kind in kinds:
        same = [t for t in done if t["text"] == text and kind in ("time", t["steps"]) and _in_race(t, kind)]
        peers = {t["seed"]: t["nats"] for t in same if t["competitor"] == against}
        for name in dict.fromkeys(t["competitor"] for t in same):
            own = [t for t in same if t["competitor"] == name]
            pairs = [t["nats"] - peers[t["seed"]] for t in own if t["seed"] in peers and name != against]
            figures = [_with_interval(values) for values in ([t["nats"] for t in own], [t["bits"] for t in own], pairs)]
            title = "equal time" if kind == "time" else f"{kind} steps"
            out.append("| " + " | ".join([text, title, name, f"{own[0]['num_params']:,}", *figures]) + " |")
    return out


def _in_race(training: dict[str, Any], kind: int | str) -> bool:
    """Of the race by time are those that were given other steps; of the others those trained on equal tokens."""
    return bool(training["race"] == ("time" if kind == "time" else "tokens"))


def _with_interval(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"
