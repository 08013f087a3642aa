"""A run that is worked on elsewhere, as a folder here: its small files, copied again as they change.

Whatever gives a run's files (`RunFiles`) is read: a bucket, a volume of Modal's.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ray_pipeline.errors import UserError, first_line
from ray_pipeline.records.artifacts import atomic_path
from ray_pipeline.records.buckets.bucket import STAGE
from ray_pipeline.settings.run_folder import (
    CONFIG_FILE,
    GUARDS_FILE,
    INVOCATIONS_FILE,
    LOGS,
    METRICS_FILE,
    PROGRESS_FILE,
    RECORD,
    RUN_FILE,
    SAMPLES_FILE,
)

EVERY = 5.0  # seconds between looks
OVERLAP = 256  # bytes of a file that grows which are read again, to see that it is the same file
STATUS = r"status-\d+\.json"  # where each rank stands, in errors/
# What progress is told by, by its path below the run; nothing else is read, however large a run is.
SHOWN = re.compile(
    rf"({RUN_FILE}|{CONFIG_FILE}|{INVOCATIONS_FILE})"
    rf"|{STAGE}/({RECORD}|{PROGRESS_FILE}|{METRICS_FILE}|{SAMPLES_FILE}|{GUARDS_FILE}|errors/{STATUS})"
    rf"|{STAGE}/{LOGS}/(stage|rank-\d+)\.jsonl"
)


class RunFiles(Protocol):
    """The files of one run, somewhere else."""

    def files(self) -> Mapping[str, tuple[int, object]]:
        """Path below the run -> bytes, and what changes when the file does."""
        ...

    def read(self, name: str, start: int) -> bytes:
        """A file's bytes from `start` on."""
        ...


class Mirror:
    """Keeps `folder` like the run that `source` has.

    Attributes:
        trouble: why the last look failed; empty where it did not.
    """

    def __init__(self, source: RunFiles, folder: Path, name: str):
        self.source, self.folder, self.name = source, folder, name
        self.trouble = ""
        self._known: dict[str, tuple[int, object]] = {}
        self._over = threading.Event()

    def look(self) -> None:
        """Copy what has changed, and drop what is no longer there.

        Raises:
            UserError: it cannot be read, or is no run.
        """
        try:
            there = {name: facts for name, facts in self.source.files().items() if SHOWN.fullmatch(name)}
            if RUN_FILE in there and CONFIG_FILE in there:
                self._bring(there)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  each store has errors of its own
            raise UserError(f"{self.name}: cannot be read ({type(error).__name__}: {first_line(error)}).") from None
        if RUN_FILE not in there or CONFIG_FILE not in there:
            raise UserError(
                f"{self.name}: holds no run (no {RUN_FILE} or {CONFIG_FILE} is there). Give the address of a run's "
                "own folder, such as s3://BUCKET/runs/RUN."
            )

    def _bring(self, there: Mapping[str, tuple[int, object]]) -> None:
        for name in self._known.keys() - there.keys():
            (self.folder / name).unlink(missing_ok=True)
            del self._known[name]
        for name, facts in there.items():
            if self._known.get(name) != facts:
                self._update(self.folder / name, name)
                self._known[name] = facts

    def _update(self, target: Path, name: str) -> None:
        """A file of lines that has grown gets what is new, as whoever reads it goes on where it stopped."""
        had = target.stat().st_size if target.exists() else 0
        if had and name.endswith(".jsonl"):
            overlap = min(had, OVERLAP)
            came = self.source.read(name, had - overlap)
            with target.open("r+b") as file:
                file.seek(had - overlap)
                if file.read() == came[:overlap]:
                    file.write(came[overlap:])
                    return
        data = self.source.read(name, 0)
        with atomic_path(target, durable=False) as aside:
            aside.write_bytes(data)

    def start(self) -> None:
        """Look again and again, in a thread, until `stop`."""
        threading.Thread(target=self._repeat, name="mirror", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def _repeat(self) -> None:
        while not self._over.wait(EVERY):
            try:
                self.look()
                self.trouble = ""
            except UserError as error:
                self.trouble = str(error)
