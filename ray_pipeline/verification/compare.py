"""Two traces side by side, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ray_pipeline.verification.cases import LEAST_MARGIN, Case, Tolerance

if TYPE_CHECKING:
    from torch import Tensor

    from ray_pipeline.verification.steps import Trace


@dataclass
class Comparison:
    """A layout's trace against that of one process.

    Attributes:
        losses, norms: (one process, layout) per step; losses end with the forward pass without training.
        loss: largest relative difference of losses and of the objective's metrics. norm: of gradient norms. A metric
            whose mean is below one (a divergence, a share) is held against one: it may be zero but for rounding.
        weights: largest absolute difference of a weight; `weight` is its name.
        misrouted: tokens that went to another expert, over all steps and layers, of `routed`.
        seed: of weights and batches. margin: the least difference between the scores of an expert that one process
            chose and of one that it did not.
    """

    losses: list[tuple[float, float]] = field(default_factory=list)
    norms: list[tuple[float, float]] = field(default_factory=list)
    loss: float = math.inf
    norm: float = math.inf
    weights: float = math.inf
    weight: str = ""
    misrouted: int = 0
    routed: int = 0
    seed: int = 0
    margin: float = math.inf


@dataclass
class Result:
    """What became of one case. `error` is empty when it ran; `wrong` says what is out of tolerance."""

    case: Case
    seconds: float
    comparison: Comparison | None = None
    error: str = ""
    wrong: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.comparison is not None and not self.wrong and not self.error

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; numbers that are not finite become None."""
        compared = asdict(self.comparison) if self.comparison else {}
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in compared.items()}
        subject = self.case.subject
        return {
            "layers": subject.model.num_hidden_layers, "parameters": subject.model.num_params(), "rows": subject.rows,
            "seq_len": subject.seq_len, "steps": subject.steps, "seed": subject.seed,
            "layout": asdict(self.case.layout), "flags": self.case.layout.flags(), "precision": self.case.precision,
            "optimizer": self.case.optimizer, "stage": self.case.stage, "passed": self.passed, "wrong": self.wrong,
            "error": self.error,
            "seconds": round(self.seconds, 3), **plain,
        }  # fmt: skip


def difference(reference: Sequence[float], other: Sequence[float], *, least: float = 1e-12) -> float:
    """Largest difference relative to the reference, or to `least` where that is less; infinite for another length or a
    number that is not finite."""
    if len(reference) != len(other) or not all(math.isfinite(value) for value in [*reference, *other]):
        return math.inf
    return max((abs(a - b) / max(abs(a), least) for a, b in zip(reference, other, strict=True)), default=0.0)


def compare(reference: Trace, trace: Trace) -> Comparison:
    """`trace.loads` must hold the routers of all ranks."""
    out = Comparison(list(zip(reference.losses, trace.losses, strict=False)))
    out.seed, out.margin = reference.seed, reference.margin
    out.norms = list(zip(reference.norms, trace.norms, strict=False))
    metrics = [
        difference(list(a.values()), [b.get(key, math.nan) for key in a], least=a["tokens"])
        for a, b in zip(reference.parts, trace.parts, strict=True)
    ]
    out.loss = max(difference(reference.losses, trace.losses), *metrics)
    out.norm = difference(reference.norms, trace.norms)
    out.weights, out.weight = 0.0, ""
    for name, weight in reference.weights.items():
        apart = _apart(weight, trace.weights.get(name))
        if apart > out.weights:
            out.weights, out.weight = apart, name
    if extra := trace.weights.keys() - reference.weights.keys():
        out.weights, out.weight = math.inf, sorted(extra)[0]
    for expected, loads in zip(reference.loads, trace.loads, strict=True):
        for name, load in expected.items():
            out.routed += int(load.sum())
            got = loads.get(name)
            out.misrouted += int(load.sum() if got is None else ((load - got).abs().sum() / 2).ceil())
    return out


def _apart(weight: Tensor, other: Tensor | None) -> float:
    """Largest absolute difference; infinite for a weight that is missing, of another shape or not finite."""
    if other is None or other.shape != weight.shape:
        return math.inf
    apart = float((weight - other).abs().max())
    return apart if math.isfinite(apart) else math.inf


def judge(comparison: Comparison, tolerance: Tolerance) -> list[str]:
    """What is out of tolerance, in words; empty for PASS."""
    wrong = []
    if not comparison.loss <= tolerance.loss:
        wrong.append(f"loss differs by {comparison.loss:.1e} relative, more than {tolerance.loss:g}")
    if not comparison.norm <= tolerance.norm:
        wrong.append(f"gradient norm differs by {comparison.norm:.1e} relative, more than {tolerance.norm:g}")
    if tolerance.weights is not None:
        if not comparison.weights <= tolerance.weights:
            wrong.append(f"{comparison.weight} differs by {comparison.weights:.1e}, more than {tolerance.weights:g}")
        if comparison.misrouted:
            wrong.append(f"{comparison.misrouted} of {comparison.routed} tokens went to another expert")
    if wrong and comparison.margin < LEAST_MARGIN:
        wrong.append(f"it may be rounding: two experts' scores came within {comparison.margin:.0e} of each other")
    return wrong
