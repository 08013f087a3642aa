"""Weights & Biases: online where there is a key, else in files that `wandb sync` uploads."""

from __future__ import annotations

import logging
import netrc
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import wandb

from ray_pipeline.records.trackers.tracker import SHOWN, Ending, Kind, TrackedRun, lists, numbers

LOG = logging.getLogger(__name__)
SHORT = 12  # digits of a digest by which an artifact is found again
EVALUATED = "val/step"  # the step of the last evaluation, which `step` alone does not tell


def can_log_in(env: Mapping[str, str], home: Path) -> bool:
    """Whether there is a key for W&B: in the environment, or where `wandb login` leaves it."""
    if env.get("WANDB_API_KEY"):
        return True
    host = urlsplit(env.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for path in [Path(env["NETRC"])] if env.get("NETRC") else [home / ".netrc", home / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host) is not None:
                return True
        except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
            continue
    return False


class WandbTracker:
    """One run of W&B, whose id stays the same over resumes.

    A process that is killed takes with it what W&B had not flushed (seen: all of a short offline run). Online, the last
    steps that arrived are asked for; offline one file holds the whole history, and is written anew.
    """

    def open(self, run: TrackedRun) -> Mapping[Kind, int]:
        online = can_log_in(os.environ, Path(os.path.expanduser("~")))
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if online else "offline")
        if mode == "offline":
            for earlier in run.folder.glob("wandb/offline-run-*"):
                if not list(earlier.glob("*.synced")):
                    shutil.rmtree(earlier)
        self.of = run
        self._run: Any = wandb.init(
            project=run.project, entity=run.entity, id=run.run_id, resume="allow", name=run.name, group=run.group,
            job_type=run.stage, dir=str(run.folder), mode=mode, config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )  # fmt: skip
        # Offline, `_step` starts again at every resume; our own step is the axis.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        received = int(self._run.summary.get("step") or 0)
        # A run that was begun before evaluations had their own count had one with every step.
        evaluated = int(self._run.summary.get(EVALUATED, self._run.summary.get("eval/step", received)))
        if not received:
            self._run.summary[EVALUATED] = 0
        if mode == "online":
            self._use()
        return {"train": received, "val": evaluated}

    def _use(self) -> None:
        """Draw the line from what the stages before made to this run; offline their digests in its config say it."""
        for stage, digest in self.of.upstream.items():
            kind = "data" if stage == "data_prep" else "model"
            try:
                self._run.use_artifact(f"{self.of.group}-{stage}-{kind}:{digest[:SHORT]}", type=kind)
            except (ValueError, TypeError, wandb.Error):  # made without a tracker, or elsewhere
                LOG.info("Weights & Biases has no artifact of %s to point at", stage)

    def log(self, step: int, kind: Kind, figures: Mapping[str, Any]) -> None:
        row: dict[str, Any] = {"step": step, **numbers(figures)}
        for name, values in lists(figures).items():  # a histogram at each step: W&B draws them as a heat map
            row[name] = wandb.Histogram(np_histogram=(np.array(values), np.arange(len(values) + 1)))
        self._run.log(row | ({EVALUATED: step} if kind == "val" else {}))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        table = wandb.Table(columns=list(SHOWN), data=[[row.get(name) for name in SHOWN] for row in rows])
        self._run.log({"step": step, "val/samples": table})

    def alert(self, step: int, title: str, text: str) -> None:
        self._run.alert(title=f"{self.of.name}: {title}", text=f"step {step}: {text}", level="WARN")

    def finish(self, ending: Ending) -> None:
        self._run.summary.update(ending.summary())
        for name, folder in ending.outputs.items():
            # By reference: checkpoints and exports stay where they are.
            lineage = {"digest": ending.digest, "made_from": dict(self.of.upstream)}
            artifact = wandb.Artifact(f"{self.of.group}-{self.of.stage}-{name}", type=name, metadata=lineage)
            artifact.add_reference(folder.absolute().as_uri(), checksum=False)
            self._run.log_artifact(artifact, aliases=["latest", *([ending.digest[:SHORT]] if ending.digest else [])])
        self._run.finish(exit_code=ending.exit_code)
