"""What goes wrong in training, told from its figures alone: each fault has a name and a sentence. No torch.

A detector is fed the figures of every step, in order, and answers with a sentence where it sees its fault.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping

from ray_pipeline.settings.guards_config import GuardsConfig

LEAST = 8  # steps that must be known before one is held against them
SCATTER = 1.4826  # of a normal distribution, deviation over median absolute deviation
TAIL, UPPER = 20, 1.645  # one value in twenty is that many deviations above a normal distribution's mean
Figures = Mapping[str, float]
Detector = Callable[[Figures], str | None]


class Remembered:
    """The last values of a figure."""

    def __init__(self, window: int):
        self.values: deque[float] = deque(maxlen=window)

    def middle(self, last: int | None = None) -> float:
        """The median of them, or of the `last` ones."""
        return statistics.median(list(self.values)[-last:] if last else self.values)

    def upper(self) -> float:
        """The deviation of a normal distribution around zero that the largest twentieth of them would be of."""
        known = sorted(self.values)
        return known[-1 - len(known) // TAIL] / UPPER if known else 0.0

    def scatter(self) -> float:
        """Their deviation from what they fall or rise along: from step to step, so that a trend is none of it."""
        moves = [abs(after - before) for before, after in itertools.pairwise(self.values)]
        return SCATTER / math.sqrt(2) * statistics.median(moves) if moves else 0.0


def not_finite(settings: GuardsConfig) -> Detector:
    """Loss or gradient norm that are no numbers."""

    def look(figures: Figures) -> str | None:
        loss, norm = figures.get("loss", 0.0), figures.get("grad_norm", 0.0)
        if math.isfinite(loss) and math.isfinite(norm):
            return None
        return f"the loss is {loss:g} and the gradient norm {norm:g}"

    return look


def loss_spike(settings: GuardsConfig) -> Detector:
    """A loss far above the last ones, by how they scatter from step to step and by a fifth of their size.

    Where batches of several kinds take turns, as answers of a student's own do, some losses always stand out: by how
    far is remembered too.
    """
    losses, above = Remembered(settings.window), Remembered(settings.window)

    def look(figures: Figures) -> str | None:
        loss = figures.get("loss", math.nan)
        if not math.isfinite(loss):
            return None
        found = None
        if losses.values:
            middle = losses.middle(LEAST)
            usual = max(settings.spike * max(losses.scatter(), above.upper()), 0.2 * abs(middle), 0.02)
            if len(losses.values) >= LEAST and loss - middle > usual:
                found = f"the loss is {loss:.4g}, that of the last {LEAST} steps {middle:.4g}"
            else:
                above.values.append(loss - middle)
        if found is None:  # a spike is nothing to hold the next step against
            losses.values.append(loss)
        return found

    return look


def exploding_gradients(settings: GuardsConfig) -> Detector:
    """A gradient norm many times the median of the last ones."""
    norms = Remembered(settings.window)

    def look(figures: Figures) -> str | None:
        norm = figures.get("grad_norm", math.nan)
        if not math.isfinite(norm):
            return None
        found = None
        if len(norms.values) >= LEAST and norm > settings.explosion * max(norms.middle(), 1e-8):
            found = f"the gradient norm is {norm:.4g}, that of the last {len(norms.values)} steps {norms.middle():.4g}"
        if found is None:
            norms.values.append(norm)
        return found

    return look


def _in_a_row(settings: GuardsConfig, look: Detector, *names: str) -> Detector:
    """Speaks where `look` has for `patience` times in a row; steps without figures of these names do not count."""
    times = 0

    def patient(figures: Figures) -> str | None:
        nonlocal times
        if any(name not in figures for name in names):
            return None
        found = look(figures)
        times = times + 1 if found else 0
        if times < settings.patience:
            return None
        times = 0  # what follows, after a rewind say, is counted anew
        return found

    return patient


def vanishing_gradients(settings: GuardsConfig) -> Detector:
    """A gradient norm under a thousandth of what it was."""
    norms = Remembered(settings.window)

    def look(figures: Figures) -> str | None:
        norm = figures["grad_norm"]
        if not math.isfinite(norm):
            return None
        if len(norms.values) >= LEAST and norm < 1e-3 * norms.middle():
            return f"the gradient norm is {norm:.3g}, and was {norms.middle():.3g}"
        if norm < 1e-9:
            return f"the gradient norm is {norm:.3g}"
        norms.values.append(norm)
        return None

    return _in_a_row(settings, look, "grad_norm")


def dead_experts(settings: GuardsConfig) -> Detector:
    """Experts that no token was sent to, of one router."""

    def look(figures: Figures) -> str | None:
        idle = figures["moe/idle_experts"]
        return f"no token goes to {idle:.0f} of one layer's experts" if idle else None

    return _in_a_row(settings, look, "moe/idle_experts")


def entropy_collapse(settings: GuardsConfig) -> Detector:
    """An entropy under a tenth of what it was at first."""
    first: list[float] = []

    def look(figures: Figures) -> str | None:
        entropy = figures["entropy"]
        if len(first) < LEAST:
            first.append(entropy)
            return None
        start = statistics.median(first)
        return f"the entropy is {entropy:.3g} nats, and was {start:.3g}" if entropy < 0.1 * start else None

    return _in_a_row(settings, look, "entropy")


def frozen_reward(settings: GuardsConfig) -> Detector:
    """A mean reward that is the same to the last digit, of answers that are not all right."""
    last: list[float] = []

    def look(figures: Figures) -> str | None:
        reward, before = figures["reward"], last[:]
        last[:] = [reward]
        solved = figures.get("accuracy", 0.0) == 1.0
        return f"the mean reward is {reward:.6g} again and again" if before == last and not solved else None

    return _in_a_row(settings, look, "reward")


def _drift(settings: GuardsConfig, worse: Callable[[Figures, Figures], str | None], *names: str) -> Detector:
    """Holds figures against the medians of the first ones; nothing where one of `names` is not measured."""
    first: list[Figures] = []

    def look(figures: Figures) -> str | None:
        if len(first) < LEAST:
            first.append({name: figures[name] for name in names})
            return None
        return worse(figures, {name: statistics.median(one[name] for one in first) for name in names})

    return _in_a_row(settings, look, *names)


def longer_answers(settings: GuardsConfig) -> Detector:
    """Answers of more than one and a half times the tokens, that are right no more often."""

    def worse(now: Figures, start: Figures) -> str | None:
        if now["completion_tokens"] <= 1.5 * start["completion_tokens"] or now["accuracy"] > start["accuracy"] + 0.02:
            return None
        return (
            f"answers have {now['completion_tokens']:.0f} tokens, and had {start['completion_tokens']:.0f}; "
            f"{now['accuracy']:.1%} are right, and {start['accuracy']:.1%} were"
        )

    return _drift(settings, worse, "completion_tokens", "accuracy")


def repetition(settings: GuardsConfig) -> Detector:
    """Answers of which a much larger part repeats what they said."""

    def worse(now: Figures, start: Figures) -> str | None:
        if now["repetition"] <= max(0.4, start["repetition"] + 0.2):
            return None
        return f"{now['repetition']:.0%} of an answer repeats it, {start['repetition']:.0%} did at first"

    return _drift(settings, worse, "repetition")


def format_without_answers(settings: GuardsConfig) -> Detector:
    """Answers that keep the format more often than they did, and are right less often."""

    def worse(now: Figures, start: Figures) -> str | None:
        gained = now["format_rate"] >= 0.9 and now["format_rate"] >= start["format_rate"] + 0.1
        if not gained or now["accuracy"] > max(start["accuracy"] - 0.02, 0.02):
            return None
        return (
            f"{now['format_rate']:.0%} of answers keep the format, {start['format_rate']:.0%} did; "
            f"{now['accuracy']:.1%} are right, and {start['accuracy']:.1%} were"
        )

    return _drift(settings, worse, "format_rate", "accuracy")


# In the order in which they are believed where several speak of one step.
BEFORE_THE_STEP = (not_finite, loss_spike, exploding_gradients)
AFTER_IT = (
    vanishing_gradients, dead_experts, entropy_collapse, frozen_reward, longer_answers, repetition,
    format_without_answers,
)  # fmt: skip
SLOW = tuple(make.__name__ for make in AFTER_IT)  # faults that began `patience` steps before they are told
