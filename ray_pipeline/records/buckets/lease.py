"""Keeps a run's bucket like its copy while one process works on it, and others away meanwhile."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray_pipeline.errors import StageFailed, UserError, resume_command
from ray_pipeline.records.buckets.bucket import Bucket
from ray_pipeline.records.buckets.kept_run import LEASE, KeptRun
from ray_pipeline.records.progress import ask_to_stop
from ray_pipeline.settings.run_folder import CHECKPOINTS

SECONDS = 120.0  # that a lease holds unless it is renewed
EVERY, LOOK = 20.0, 1.0  # seconds between two times that all is sent; a new checkpoint is sent at once
SETTLES = 1.0  # seconds after which a lease that is still ours is ours: stores know no lock
LOG = logging.getLogger(__name__)


class Lease:
    """The right to work on a run; clocks of machines may differ by less than it holds."""

    def __init__(self, bucket: Bucket, copy: str = ""):
        self.bucket, self.copy, self.mine = bucket, copy, secrets.token_hex(8)

    def take(self) -> bool:
        """Enter this process; whether the last one worked on the same copy, and was killed.

        Raises:
            UserError: another one works on the run.
        """
        with self.bucket.explained():
            before = self._refuse_other()
            self._write()
            time.sleep(SETTLES)
            self._refuse_other()
        return before is not None and before["copy"] == self.copy

    def renew(self) -> bool:
        """Hold it longer; False where somebody else has taken it."""
        found = self._read()
        if found is not None and found["id"] != self.mine:
            return False
        self._write()
        return True

    def give_back(self) -> None:
        """Let others go on at once."""
        found = self._read()
        if found is not None and found["id"] == self.mine:
            self.bucket.delete([LEASE])

    def _refuse_other(self) -> dict[str, Any] | None:
        """The lease that lies there, which is this process's or has run out; None: nobody left one."""
        found = self._read()
        if found is not None and found["id"] != self.mine and time.time() < found["until"]:
            raise UserError(
                f"{self.bucket.address}: process {found['pid']} on {found['host']} is working on this run. Wait for it "
                f"or stop it; if it was killed, it counts as gone in {found['until'] - time.time():.0f} s."
            )
        return found

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.bucket.read(LEASE, 0))
            return {name: found[name] for name in ("id", "copy", "host", "pid")} | {"until": float(found["until"])}
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # nobody's, or half written
            return None

    def _write(self) -> None:
        about = {"id": self.mine, "copy": self.copy, "host": socket.gethostname(), "pid": os.getpid()}
        self.bucket.write(LEASE, json.dumps(about | {"until": time.time() + SECONDS}).encode())


@contextmanager
def kept(run: KeptRun) -> Iterator[None]:
    """Bring the run here, and send what is written until the block ends, however it ends.

    A store that does not answer stops nothing: the copy is whole, and is sent later.

    Raises:
        UserError: the run cannot be brought, or another process works on it.
        StageFailed: at the end not all of it could be sent.
    """
    lease, over = Lease(run.bucket, run.copy_id), threading.Event()
    newest_here = lease.take()
    try:
        run.bring(checkpoints=True, newest_here=newest_here)
        thread = threading.Thread(target=_repeat, args=(run, lease, over), name="bucket", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            over.set()
            thread.join()
            try:
                _send_last(run, lease)
            except StageFailed as error:  # what ended the block is told in its place
                LOG.warning("%s", error)
            raise
        over.set()
        thread.join()
        _send_last(run, lease)
    finally:
        with suppress(Exception):  # it runs out by itself, and would hide what ended the block
            lease.give_back()


def _repeat(run: KeptRun, lease: Lease, over: threading.Event) -> None:
    known, sent, told = _checkpoints(run), time.monotonic(), False
    while not over.wait(LOOK):
        now = _checkpoints(run)
        if now == known and time.monotonic() < sent + EVERY:
            continue
        known, sent = now, time.monotonic()
        try:
            if not lease.renew():
                ask_to_stop(run.copy, f"another process works on {run.bucket.address}")
                return
            if run.copy.is_dir():
                run.push()
            told = False
        except Exception as error:  # noqa: BLE001  a store's: the next time may go well
            if not told:
                LOG.warning("%s is not reached, training goes on: %s", run.bucket.address, error)
            told = True


def _send_last(run: KeptRun, lease: Lease) -> None:
    if not run.copy.is_dir():
        return
    try:
        if not lease.renew():
            raise UserError(f"{run.bucket.address}: another process works on it now")
        run.push()
    except Exception as error:  # noqa: BLE001  a store's
        raise StageFailed(
            f"{error} Not all of the run is in the bucket; it is whole in {run.copy}. Send it with: "
            f"{resume_command(run.copy)}"
        ) from None


def _checkpoints(run: KeptRun) -> frozenset[str]:
    return frozenset(str(path) for path in run.copy.glob(f"*/{CHECKPOINTS}/step_*"))
