"""Brings what a stage logs to a tracker, in a thread of another process than the ranks'.

The file that training writes is the queue: it holds whatever a tracker has not taken yet, in bounded memory, so one
that is slow, broken or gone neither slows training nor loses a line.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

from ray_pipeline.records.guard_file import read_interventions
from ray_pipeline.records.metrics_file import NOT_FIGURES, NewLines, is_validation, read_samples
from ray_pipeline.records.trackers.tracker import Ending, Kind, TrackedRun, Tracker
from ray_pipeline.settings.run_folder import METRICS_FILE

LOG = logging.getLogger(__name__)
POLL = 0.5  # seconds between looks at the file
MONEY = 30.0  # seconds between figures of what the run has cost
SPENT = "cost/run_usd"


class Follower(threading.Thread):
    """Sends the lines of `run.folder`'s metrics.jsonl that the tracker has not, as they come."""

    def __init__(self, make: Any, title: str, run: TrackedRun):
        super().__init__(name=f"tracker {title}", daemon=True)
        self.make, self.title, self.run_facts = make, title, run
        self.sent: dict[Kind, int] | None = None  # the last steps that the tracker has; None before it was opened
        self.failed = False
        self._ending: Ending | None = None
        self._ended = threading.Event()
        self._since = time.time()
        self._told = 0  # alerts
        self._priced = 0.0  # when what was spent was sent last

    def end(self, ending: Ending) -> None:
        """The stage has ended: send what is left, and that."""
        self._ending = ending
        self._ended.set()

    def run(self) -> None:
        """Body of the thread."""
        try:
            self._follow(self.make())
        except Exception as error:  # noqa: BLE001  whatever ends a tracker, it ends nothing else
            self.failed = True
            LOG.warning(
                "%s: %s stopped (%s: %s); training goes on, figures are in %s", self.run_facts.stage, self.title,
                type(error).__name__, error, self.run_facts.folder / METRICS_FILE,
            )  # fmt: skip

    def _follow(self, tracker: Tracker) -> None:
        sent: dict[Kind, int] = {"train": 0, "val": 0, **tracker.open(self.run_facts)}
        lines, self.sent = NewLines(self.run_facts.folder), sent
        while True:
            ended = self._ended.is_set()  # looked at before the lines: those written until then are read
            fresh = None
            for line in lines.read():
                kind: Kind = "val" if is_validation(line) else "train"
                if line["step"] > sent[kind]:
                    figures = {k: v for k, v in line.items() if k not in NOT_FIGURES}
                    tracker.log(line["step"], kind, figures | self._money(line["time"]))
                    sent[kind] = line["step"]
                    fresh = line["step"] if kind == "val" else fresh
            if fresh is not None:  # samples are those of the last evaluation alone
                self._send_samples(tracker, fresh)
            self._send_alerts(tracker)
            if ended:
                break
            self._ended.wait(POLL)
        assert self._ending is not None
        if self._ending.verdict != "DONE":
            tracker.alert(max(sent.values()), self._ending.verdict, self._ending.reason or "see the run's report")
        tracker.finish(self._ending)

    def _money(self, written: float) -> dict[str, float]:
        """What the run has cost, now and then; no line of an earlier attempt gets what was spent later."""
        if written < self._since or time.monotonic() - self._priced < MONEY:
            return {}
        self._priced = time.monotonic()
        amount = self.run_facts.spent()
        return {} if amount is None else {SPENT: amount}

    def _send_samples(self, tracker: Tracker, step: int) -> None:
        try:
            rows = read_samples(self.run_facts.folder)
        except ValueError:
            return  # damaged, which the report says
        if rows:
            tracker.samples(step, rows)

    def _send_alerts(self, tracker: Tracker) -> None:
        events = [event for event in read_interventions(self.run_facts.folder) if event["time"] >= self._since]
        for event in events[self._told :]:
            tracker.alert(event["step"], event["guard"], event["text"])
        self._told = len(events)

    def missing(self) -> int:
        """Lines of the file that the tracker has not."""
        sent = self.sent or {"train": 0, "val": 0}
        return sum(
            line["step"] > sent["val" if is_validation(line) else "train"]
            for line in NewLines(Path(self.run_facts.folder)).read()
        )
