"""What has been done in a run folder, and under which identity. No torch, no Ray.

    run_dir/
      config.yaml          the settings the run was accepted with
      run.json             uid, and per stage its present identity and the settings behind it
      .lock                held by the one process that works on the run
      <stage>-<identity>/  a stage's outputs, with record.json beside them
      <stage>-<identity>.again/  a finished stage that is run again, until it is whole and takes that one's place

A stage's folder and record carry its identity (`ray_pipeline.dag.identity`), so outputs made under other settings are
never taken for present ones, and come back into use when the settings do.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, TextIO

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # what pydantic reads before Python 3.12

from ray_pipeline.dag.invocations import read_invocations
from ray_pipeline.errors import UserError
from ray_pipeline.launch.stage_context import StageResult
from ray_pipeline.records.artifacts import write_sealed, writing
from ray_pipeline.records.guard_file import read_interventions
from ray_pipeline.records.integrity import read_sealed
from ray_pipeline.records.metrics_file import damaged_files
from ray_pipeline.records.progress import read_progress
from ray_pipeline.settings.run_folder import CONFIG_FILE, LOCK, RECORD, REPORT_FILE, RUN_FILE, rerun_folder
from ray_pipeline.settings.schema import STAGES, PipelineFields

Status = Literal["running", "done", "failed", "learned_nothing"]


@dataclass
class Record:
    """A stage's entry in the ledger. `seconds` counts all attempts; times are Unix seconds."""

    stage: str
    identity: str
    status: Status
    wandb_id: str = ""
    attempt: int = 1
    started: float = 0.0
    finished: float | None = None
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    learned: bool | None = None
    weights_digest: str | None = None
    upstream: dict[str, str] = field(default_factory=dict)
    ranks: int = 1
    error: str | None = None
    error_log: str | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the outputs are whole. A stage that learned nothing is finished too: it would learn nothing again."""
        return self.status in ("done", "learned_nothing")

    def result(self, folder: Path) -> StageResult:
        """What downstream stages are given."""
        return StageResult(folder, dict(self.metrics), dict(self.baselines), self.learned)


def read_record(folder: Path) -> Record | None:
    """The record beside a stage's outputs, or None where nothing was started.

    Raises:
        UserError: it is damaged.
    """
    if not (folder / RECORD).exists():
        return None
    way_out = "Delete it and resume: the stage goes on from its newest checkpoint."
    values = read_sealed(folder / RECORD, way_out)
    known = {name: value for name, value in values.items() if name in Record.__dataclass_fields__}
    try:
        return TypeAdapter(Record).validate_python(known)
    except ValidationError as error:
        raise UserError(f"{folder / RECORD}: damaged ({error.errors()[0]['msg']}). {way_out}") from None


def write_record(folder: Path, record: Record) -> None:
    """Atomically, beside the outputs."""
    write_sealed(folder / RECORD, asdict(record))


def begin_record(folder: Path, record: Record) -> Record:
    """Enter an attempt as running; time and number of earlier attempts are kept."""
    before = read_record(folder)
    if before is not None:
        record.attempt = before.attempt + 1
        record.seconds = before.seconds
        if before.status == "running":  # killed: it lived until its last sign of life
            seen = (read_progress(folder) or {}).get("time", before.started)
            record.seconds += max(0.0, seen - before.started)
    record.started = time.time()
    write_record(folder, record)
    return record


def close_record(folder: Path, record: Record, status: Status, **values: Any) -> Record:
    """Enter how an attempt ended."""
    record.status, record.finished = status, time.time()
    record.seconds = round(record.seconds + record.finished - record.started, 3)
    for name, value in values.items():
        setattr(record, name, value)
    write_record(folder, record)
    return record


def settle(folder: Path) -> None:
    """Put a finished new attempt in the place of the finished one before it; also after a kill halfway through."""
    rerun, old = rerun_folder(folder), folder.with_name(f".{folder.name}.old")
    record = read_record(rerun)
    with writing(folder):
        if record is not None and record.is_finished:
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            rerun.rename(folder)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def refuse_foreign_run(run_dir: Path) -> None:
    """Refuse a folder that has files of a run's names and is no run.

    Raises:
        UserError: naming what is there.
    """
    if (run_dir / RUN_FILE).exists() or any(run_dir.glob(f"*-*/{RECORD}")):
        return
    for name in (CONFIG_FILE, REPORT_FILE):
        if (run_dir / name).exists():
            raise UserError(
                f"{run_dir / name}: is there, but no {RUN_FILE} beside it, so this folder is not a run, and its files "
                "are not replaced. Give another --run-name or --output-dir."
            )


class _RunValues(TypedDict):
    uid: str
    created: NotRequired[float]
    chain: NotRequired[list[str]]
    stages: NotRequired[dict[str, dict[str, Any]]]
    sources: NotRequired[dict[str, str]]
    reruns: NotRequired[dict[str, int]]


def _read_run(path: Path) -> Mapping[str, Any]:
    way_out = "Delete it and resume: finished stages are found again by their folders' names."
    values = read_sealed(path, way_out)
    try:
        return TypeAdapter(_RunValues).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{path}: damaged ({error.errors()[0]['msg']}). {way_out}") from None


class RunFile:
    """run.json: the run's uid, which stages it has and, per stage, its present identity and the settings behind it."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / RUN_FILE
        self.exists = self.path.exists()
        stored: Mapping[str, Any] = _read_run(self.path) if self.exists else {}
        self.uid: str = stored.get("uid") or uuid.uuid4().hex
        self.created: float = stored.get("created") or time.time()
        self.chain: list[str] = stored.get("chain") or list(PipelineFields.model_fields["stages"].default)
        self.stages: dict[str, dict[str, Any]] = stored.get("stages", {})
        self.sources: dict[str, str] = stored.get("sources", {})
        self.reruns: dict[str, int] = stored.get("reruns", {})

    def save(self) -> None:
        """Atomically."""
        keys = ("uid", "created", "chain", "stages", "sources", "reruns")
        write_sealed(self.path, {key: getattr(self, key) for key in keys})

    def wandb_id(self, stage: str, identity: str) -> str:
        """The same over every resume; another one when the stage is started afresh."""
        parts = [self.uid, stage, identity, str(self.reruns.get(identity, 0))]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


class RunLock:
    """One process at a time works on a run folder. The kernel lets go when that process ends, however it ends.

    kind: what the folder holds, and `name_option` names another one, in messages.
    """

    def __init__(self, run_dir: Path, *, kind: str = "run", name_option: str = "--run-name"):
        self.run_dir, self.kind, self.name_option = run_dir, kind, name_option
        self._file: TextIO | None = None

    def __enter__(self) -> RunLock:
        with writing(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._file = (self.run_dir / LOCK).open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise self._refusal() from None
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}))
        self._file.flush()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._file is not None
        self._file.close()

    def _refusal(self) -> UserError:
        holder = lock_holder(self.run_dir) or {}
        who = f"process {holder['pid']} on {holder['host']}" if "pid" in holder else "another process"
        return UserError(
            f"{self.run_dir}: {who} is working on this {self.kind}. Wait for it or stop it, then resume; or start "
            f"another {self.kind} with {self.name_option}."
        )


def lock_holder(run_dir: Path) -> dict[str, Any] | None:
    """Pid and host of the process that works on the run now; None when nobody does."""
    path = run_dir / LOCK
    if not path.exists():
        return None
    with path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            with suppress(ValueError):  # half written, or damaged
                found = json.loads(file.read())
                return found if isinstance(found, dict) else {}
            return {}
    return None


def read_status(run_dir: Path) -> dict[str, Any]:
    """The run as plain data for `status`: stages in order with progress, figures, seconds, digests and folders.

    A stage's status is pending, running, interrupted, done, learned_nothing or failed.
    """
    run, holder = RunFile(run_dir), lock_holder(run_dir)
    stages = []
    for name in (name for name in STAGES if name in run.chain):
        present = run.stages.get(name)
        if present is None:
            stages.append({"stage": name, "status": "pending"})
            continue
        folder = run_dir / present["folder"]
        record = read_record(folder)
        entry: dict[str, Any] = {"stage": name, "status": "pending", "identity": present["identity"]}
        if record is not None:
            entry |= asdict(record)
            if record.status == "running" and holder is None:
                entry["status"] = "interrupted"
        entry |= {"folder": str(folder), "progress": read_progress(folder), "damaged": damaged_files(folder)}
        entry["guards"] = read_interventions(folder)
        stages.append(entry | _rerun(folder, holder))
    return {
        "run": run_dir.name,
        "run_dir": str(run_dir),
        "created": run.created,
        "worked_on_by": holder,
        "invocations": read_invocations(run_dir),
        "stages": stages,
    }


def _rerun(folder: Path, holder: dict[str, Any] | None) -> dict[str, Any]:
    """How far the attempt is that will replace a finished stage; nothing where there is none."""
    record = read_record(rerun_folder(folder))
    if record is None:
        return {}
    status = "interrupted" if record.status == "running" and holder is None else record.status
    place = rerun_folder(folder)
    return {"again": {"status": status, "error": record.error, "folder": str(place), "progress": read_progress(place)}}


def worked_on_last(stages: list[dict[str, Any]], stage: str | None = None) -> dict[str, Any] | None:
    """Of `read_status`'s stages the one that works, or was worked on last; of `stage` alone where it is given."""
    begun = [entry for entry in stages if "attempt" in entry and stage in (None, entry["stage"])]
    return max(begun, key=lambda entry: entry.get("started") or 0.0, default=None)


def attempt_folder(entry: dict[str, Any]) -> Path:
    """Where such a stage works, or has worked: beside its finished attempt while that is being replaced."""
    return Path(entry["again"]["folder"] if "again" in entry else entry["folder"])
