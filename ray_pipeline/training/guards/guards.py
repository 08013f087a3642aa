"""Guards of one stage's training: what they see, what is done about it, and which steps are left out for it.

Every rank feeds its own; where more than a warning can follow, rank 0 decides for all, so that a figure that differs in
its last bit sends no rank another way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from model.parallel.gather import all_ranks_gather
from model.parallel.mesh import Mesh
from ray_pipeline.engine.step_stats import StepStats
from ray_pipeline.errors import UserError
from ray_pipeline.records.guard_file import add_intervention, read_interventions
from ray_pipeline.settings.guards_config import GuardsConfig
from ray_pipeline.training.guards.detectors import AFTER_IT, BEFORE_THE_STEP, SLOW, Detector

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """A fault: `guard` names it, `step` is that of which it was seen, `began` the first that it touched."""

    guard: str
    policy: str
    step: int
    began: int
    text: str

    @property
    def name(self) -> str:
        """`loss spike`"""
        return self.guard.replace("_", " ")


class Guards:
    """Watches one stage.

    Args:
        folder: the stage's. resume: the command that goes on with the run.
    """

    def __init__(self, settings: GuardsConfig, mesh: Mesh, folder: Path, stage: str, resume: str):
        self.settings, self.mesh, self.folder, self.stage, self.resume = settings, mesh, folder, stage, resume
        self.before, self.after = (self._detectors(kinds) for kinds in (BEFORE_THE_STEP, AFTER_IT))
        policies = {(name, self._policy(name)) for name in (*self.before, *self.after)}
        # A stop on numbers that are not finite needs no agreement: they are so everywhere.
        self.acts = any(policy != "warn" for _, policy in policies - {("not_finite", "stop")})
        past = all_ranks_gather(mesh, read_interventions(folder) if mesh.rank == 0 else None)[0]
        self.left_out: set[int] = {step for event in past for step in event["skipped"]}
        self.rewinds = [event for event in past if event["back_to"] is not None]
        self._quiet_until: dict[str, int] = {}

    @property
    def skips(self) -> bool:
        """Whether a step may be left out after its gradients are known."""
        return any(self._policy(name) == "skip" for name in self.before)

    def _detectors(self, kinds: Iterable[Callable[[GuardsConfig], Detector]]) -> dict[str, Detector]:
        return {make.__name__: make(self.settings) for make in kinds if self._policy(make.__name__) != "off"}

    def _policy(self, name: str) -> str:
        return getattr(self.settings, name)

    def look_before(self, step: int, figures: Mapping[str, float]) -> Finding | None:
        """At a step's `loss` and `grad_norm`; what all ranks are to act on, or None."""
        return self._judge(self.before, step, figures)

    def look_after(self, step: int, figures: Mapping[str, float]) -> Finding | None:
        """At what else was measured: experts, `entropy`, and of answers `reward`, `accuracy` and so on."""
        return self._judge(self.after, step, figures)

    def _judge(self, detectors: dict[str, Detector], step: int, figures: Mapping[str, float]) -> Finding | None:
        seen = [(name, text) for name, look in detectors.items() if (text := look(figures)) is not None]
        found = None
        if seen:
            name, text = seen[0]
            began = step - (self.settings.patience - 1 if name in SLOW else 0)
            found = Finding(name, self._policy(name), step, max(began, 1), text)
        if self.acts:
            found = all_ranks_gather(self.mesh, found)[0]
        if found is None or found.policy != "warn":
            return found
        if step >= self._quiet_until.get(found.guard, 0):
            self._record(found)
        self._quiet_until[found.guard] = step + self.settings.window  # once, until it was gone for a while
        return None

    def skipped(self, finding: Finding) -> None:
        """The step was not taken."""
        self.left_out.add(finding.step)
        self._record(finding, skipped=[finding.step])

    def rewound(self, finding: Finding, back_to: int) -> None:
        """Training goes back to the checkpoint of `back_to`; the batch that did it is left out from now on.

        Where the same place went wrong before, the cause lies before the step that showed it: twice as many steps are
        left out each time.

        Raises:
            UserError: more rewinds than `max_rewinds`.
        """
        if len(self.rewinds) >= self.settings.max_rewinds:
            limit = f"guards.max_rewinds={self.settings.max_rewinds}"
            raise self.stop(finding, f"Training went back {len(self.rewinds)} times before, as {limit} allows.")
        near = [event for event in self.rewinds if event["back_to"] == back_to]
        skipped = [*range(max(back_to + 1, finding.step - 2 ** len(near) + 1), finding.step + 1)]
        self.left_out |= set(skipped)
        self.rewinds.append({"back_to": back_to, "time": time.time()})
        self._record(finding, back_to=back_to, skipped=skipped)

    def stop(self, finding: Finding, why: str = "") -> UserError:
        """The error that ends the stage."""
        if finding.policy == "stop":
            self._record(finding)
        return UserError(
            f"{self.stage}: {finding.name} at step {finding.step}: {finding.text}. {why} Lower "
            f"{self.stage}.optimizer.lr, look at the batch, or let it pass with --set guards.{finding.guard}=warn.\n"
            f"  {self.resume}"
        )

    def _record(self, finding: Finding, *, back_to: int | None = None, skipped: list[int] | None = None) -> None:
        if self.mesh.rank:
            return
        more = "" if not skipped else f"; left out: step {', '.join(map(str, skipped))}"
        more = f"; back to step {back_to}{more}" if back_to is not None else more
        LOG.warning("%s: %s at step %d: %s%s", self.stage, finding.name, finding.step, finding.text, more)
        add_intervention(
            self.folder, step=finding.step, guard=finding.name, policy=finding.policy, text=finding.text,
            back_to=back_to, skipped=skipped or [],
        )  # fmt: skip


class Judge:
    """What guards say of one optimizer step, and what follows from it.

    Attributes:
        skipped: the step was not taken. rewinds, stops: what training is to go back for, or end for.
    """

    def __init__(self, guards: Guards, step: int):
        self.guards, self.step = guards, step
        self.skipped = False
        self.rewinds: Finding | None = None
        self.stops: Finding | None = None
        self._asked = False

    def accept(self, loss: float, norm: float) -> bool:
        """Whether the step may be taken, before it is."""
        self._asked = True
        found = self.guards.look_before(self.step, {"loss": loss, "grad_norm": norm})
        if found is not None and found.policy == "skip":
            self.skipped = True
            self.guards.skipped(found)
        else:
            self._take(found)
        return found is None

    def look(self, stats: StepStats) -> None:
        """At a step that was taken without asking."""
        if not self._asked:
            self._take(self.guards.look_before(self.step, {"loss": stats.loss, "grad_norm": stats.grad_norm}))

    def look_after(self, stats: StepStats, measured: Mapping[str, float]) -> None:
        """At everything else that is known of the step, unless it is given up already."""
        if self.rewinds is None and stats.weight:
            figures = {name: value / stats.weight for name, value in stats.metrics.items()}
            own = {"grad_norm": stats.grad_norm} if stats.metrics else {}  # a step without a batch has no gradient
            self._take(self.guards.look_after(self.step, own | figures | dict(stats.figures) | dict(measured)))

    def _take(self, found: Finding | None) -> None:
        if found is not None and found.policy == "rewind":
            self.rewinds = found
        elif found is not None:
            self.stops = found
