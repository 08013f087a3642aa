"""Writing checkpoints beside training: it waits for a copy in memory, a thread does the rest.

The thread talks to the other ranks' over a gloo group of its own, so that its messages never meet training's. Files
are written aside, each rank's own part of them, get a manifest of SHA-256 sums and are renamed into place: a kill at
any moment leaves the checkpoints that were there, and the new one whole or not at all.
"""

from __future__ import annotations

import concurrent.futures
import errno
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from model.parallel.collectives import collective
from model.parallel.mesh import Mesh
from ray_pipeline.engine.checkpoints.checkpoint import WORLD, list_checkpoints, step_name
from ray_pipeline.engine.checkpoints.checkpoint_format import SOURCE_FOLDER, STATE_FILE, my_share, page, placed, stored
from ray_pipeline.engine.engine import Engine
from ray_pipeline.errors import UserError
from ray_pipeline.launch.rank_errors import lost_message
from ray_pipeline.records.artifacts import explain_write_error, manifest_entries, sync_to_disk, write_sealed, writing
from ray_pipeline.settings.run_folder import MANIFEST

BEST_FILE = "best.json"
TIMEOUT = timedelta(minutes=30)  # ranks wait for the slowest disk
GRACE = 5.0  # seconds a rank that lost a peer waits for its part of a checkpoint
T = TypeVar("T")


class CheckpointWriter:
    """Writes `folder/step_XXXXXXXX`, one at a time; keeps the newest `keep`, and the best where the trainer names one.

    Leave it through `with`: the end waits for what is in flight. Made on every rank alike.
    """

    def __init__(self, mesh: Mesh, folder: Path, *, keep: int):
        self.mesh, self.folder, self.keep = mesh, folder, keep
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if mesh.world > 1 else None
        self._staging: dict[str, Tensor] = {}  # kept from one save to the next: fresh memory costs more than the copy
        self._in_flight: Future[None] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._in_flight is not None:
            # The error that is on its way matters more than one in the thread, whom a lost peer may never answer.
            concurrent.futures.wait([self._in_flight], timeout=None if lost_message(error) is None else GRACE)

    def save(
        self,
        engine: Engine,
        step: int,
        extra: Mapping[str, Any],
        *,
        best: int | None = None,
        source: Mapping[str, bytes] | None = None,
    ) -> None:
        """Start writing the checkpoint of `step` (optimizer steps taken), after the one in flight is whole.

        Args:
            extra: what else the trainer needs to go on, as JSON. best: the step whose checkpoint is kept as the best.
            source: files of the source of batches, by name.
        Raises:
            UserError: the one before could not be written (disk full, no right to).
        """
        self.wait()
        self._stage(engine)
        contents = page(step, engine.config, extra)
        files = dict(source or {})
        self._in_flight = _in_thread(self._write, step, contents, best, files, engine.device)

    def name_best(self, figure: dict[str, Any]) -> None:
        """Keep the checkpoint of `figure["step"]` as the best, once what is in flight is whole. On every rank alike."""
        self._in_flight = _in_thread(self._keep_after, self._in_flight, figure)

    def wait(self) -> None:
        """Until the checkpoint in flight is whole; raises what went wrong with it."""
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()

    def _stage(self, engine: Engine) -> None:
        """Copy what this rank writes into memory of our own."""
        state = engine.state()
        mine = my_share({key: tensor.numel() * tensor.element_size() for key, tensor in state.items()}, self.mesh)
        if set(mine) != set(self._staging):
            pin = engine.device.type == "cuda"
            self._staging = {key: torch.empty(state[key].shape, dtype=state[key].dtype, pin_memory=pin) for key in mine}
        for key, copy in self._staging.items():
            copy.copy_(state[key].detach(), non_blocking=True)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)

    def _write(
        self, step: int, contents: dict[str, Any], best: int | None, source: dict[str, bytes], device: torch.device
    ) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # threads start on device 0, where DCP would open a context
        aside = self.folder / f".{step_name(step)}.partial"
        self._on_main(_begin, aside, source)
        state: dict[str, Any] = {
            key: placed(key, stored(key, tensor), self.mesh) for key, tensor in self._staging.items()
        }
        try:
            with collective(WORLD, "saving a checkpoint"):
                dcp.save(state, checkpoint_id=aside, process_group=self.group, no_dist=self.group is None)
        except CheckpointException as failure:  # a BaseException
            raise _cause(failure, aside) from failure
        entries = self._on_all(manifest_entries, aside, aside.glob(f"__{self.mesh.rank}_*"))
        self._on_main(self._publish, aside, step, contents, entries, best)

    def _on_main(self, action: Callable[..., None], *arguments: Any) -> None:
        """`action(*arguments)` on rank 0; the others wait for it, and raise its error too."""
        self._on_all(self._if_main, action, *arguments)

    def _if_main(self, action: Callable[..., None], *arguments: Any) -> None:
        if self.mesh.rank == 0:
            with writing(self.folder):
                action(*arguments)

    def _on_all(self, action: Callable[..., T], *arguments: Any) -> list[T]:
        """`action(*arguments)` on every rank; its values in rank order, or on every rank the first rank's error."""
        outcome: tuple[T | None, BaseException | None]
        try:
            outcome = (action(*arguments), None)
        except (OSError, UserError) as error:
            outcome = (None, error)
        outcomes: list[Any] = [outcome]
        if self.group is not None:
            outcomes = [None] * self.mesh.world
            with collective(WORLD, "all-gather for a checkpoint"):
                dist.all_gather_object(outcomes, outcome, group=self.group)
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [value for value, _ in outcomes]

    def _publish(
        self, aside: Path, step: int, contents: dict[str, Any], entries: list[dict[str, Any]], best: int | None
    ) -> None:
        """On rank 0: complete the folder, give it its name, drop those that are not kept."""
        (aside / STATE_FILE).write_text(json.dumps(contents) + "\n", encoding="utf-8")
        rest = manifest_entries(aside, [aside / STATE_FILE, aside / ".metadata", *aside.glob(f"{SOURCE_FOLDER}/*")])
        files = {name: entry for part in [*entries, rest] for name, entry in part.items()}
        write_sealed(aside / MANIFEST, {"files": files})
        sync_to_disk(aside)
        final = self.folder / step_name(step)
        before = self.folder / f".{final.name}.old"
        if final.exists():  # the same step again
            shutil.rmtree(before, ignore_errors=True)
            final.rename(before)
        aside.rename(final)
        sync_to_disk(self.folder)
        self._keep(best, contents["extra"].get("best"))

    def _keep_after(self, before: Future[None] | None, figure: dict[str, Any]) -> None:
        """Name the best checkpoint once what was in flight before is whole."""
        if before is not None:
            before.result()
        self._on_main(self._keep, figure["step"], figure)

    def _keep(self, best: int | None, figure: dict[str, Any] | None) -> None:
        mark, whole = self.folder / BEST_FILE, list_checkpoints(self.folder)
        chosen = None if best is None else self.folder / step_name(best)
        if chosen in whole and figure is not None:
            write_sealed(mark, {"checkpoint": chosen.name, **figure})
        else:
            mark.unlink(missing_ok=True)
        for old in whole[: -self.keep]:
            if old != chosen:
                _drop(old)
        for leftover in self.folder.glob(".step_*"):  # of a process that was killed while it wrote or dropped
            shutil.rmtree(leftover, ignore_errors=True)


def _begin(folder: Path, source: Mapping[str, bytes]) -> None:
    """Empty but for the files of the source of batches."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / SOURCE_FOLDER).mkdir(parents=True)
    for name, contents in source.items():
        (folder / SOURCE_FOLDER / name).write_bytes(contents)


def _drop(folder: Path) -> None:
    """Delete a checkpoint; at no moment does half of one carry its name."""
    gone = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def _cause(failure: CheckpointException, path: Path) -> Exception:
    """The first rank's error, as the user's where it is one: DCP wraps all of them."""
    rank, (error, _) = next(iter(failure.failures.items()))
    if "inline_container" in str(error):  # torch's writer was cut short; it does not tell by what
        error = OSError(errno.ENOSPC, "a write was cut short")
    if isinstance(error, OSError):
        return explain_write_error(error, path)
    return RuntimeError(f"{path.name}: rank {rank} could not write its part: {type(error).__name__}: {error}")


def _in_thread(action: Callable[..., None], *arguments: Any) -> Future[None]:
    """Run `action(*arguments)` in a daemon thread, as a process that ends in an error must not wait for a lost peer."""
    future: Future[None] = Future()

    def body() -> None:
        try:
            action(*arguments)
        except BaseException as error:  # noqa: BLE001  it is raised again where the result is asked for
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=body, name="checkpoint", daemon=True).start()
    return future
