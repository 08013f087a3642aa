"""The launcher's watch over its ranks: one that froze is named within a minute, with every rank's Python stack.

Frozen is a rank that gives no sign of life (its process is stopped, its machine hangs), and one that stands still, uses
no CPU and waits for nothing known, while another waits for it. One that computes, reads or writes is slow, not frozen,
however long it takes. A frozen one is ended, so that the stage fails, or starts again where restarts are left.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ray_pipeline.launch.heartbeat import (
    STACKS_WANTED,
    end_here,
    is_here,
    process_stat,
    python_stack,
    stack_file,
)
from ray_pipeline.launch.rank_errors import ERRORS, FROZEN, last_status, rank_text, status_text
from ray_pipeline.records.artifacts import write_json

SECONDS = 40.0
POLL = 1.0
MOST_OF_A_POLL = 3.0  # the watch itself may have been stopped: what it did not see does not count
COLLECT_SECONDS = 8.0
# A rank whose thread stays at one line still moves if it computed for this share of the time, which is more than the
# threads beside it need, or read and wrote more than this.
CPU_SHARE, IO_BYTES = 0.05, 1 << 20
Beats = Mapping[int, dict[str, Any]]


class FrozenWatch:
    """`with FrozenWatch(stage_folder, seconds): ...` around the wait for the ranks of a launch. Seconds 0: no watch."""

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.errors, self.seconds = folder, folder / ERRORS, seconds
        self._last: dict[int, tuple[Any, float]] = {}  # rank -> what it said last, and CPU seconds then
        self._quiet: dict[int, float] = {}
        self._told: set[tuple[int, int]] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="frozen-watch", daemon=True)

    def __enter__(self) -> FrozenWatch:
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self.seconds:
            self._thread.join(timeout=COLLECT_SECONDS)

    def _run(self) -> None:
        before = time.monotonic()
        with suppress(FileNotFoundError):  # the folder of errors goes with the launch
            while not self._ended.wait(min(POLL, self.seconds / 4)):
                now = time.monotonic()
                self.look(min(now - before, MOST_OF_A_POLL))
                before = now

    def look(self, passed: float) -> None:
        """Read every rank's signs of life, `passed` seconds after the last time; report and end those that froze."""
        beats = self._read(passed)
        frozen = {r: why for r, why in self._frozen(beats).items() if (r, beats[r]["pid"]) not in self._told}
        if not frozen:
            return
        self._told |= {(rank, beats[rank]["pid"]) for rank in frozen}
        stacks = self._collect(beats, frozen)
        self._report(frozen, stacks)
        self._ask({rank: beats[rank] for rank in frozen}, end=True)
        end_here({rank: beats[rank] for rank in frozen})

    def _read(self, passed: float) -> dict[int, dict[str, Any]]:
        beats = {}
        for path in self.errors.glob("beat-*.json"):
            try:
                beat = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):  # just begun, or just ended
                continue
            rank, said = int(path.stem.removeprefix("beat-")), (beat["pid"], beat["beat"])
            beats[rank] = beat
            seen = process_stat(beat["pid"]) if is_here(beat) else None
            cpu = seen[1] if seen else 0.0
            last, cpu_then = self._last.get(rank, (None, 0.0))
            # A thread that cannot run beside one that computes, in a function which lets no other in, is no sign.
            busy = seen is not None and seen[0] not in "Tt" and cpu - cpu_then > 1.0
            if said != last or busy:
                self._last[rank], self._quiet[rank] = (said, cpu), 0.0
            else:
                self._quiet[rank] = self._quiet.get(rank, 0.0) + passed
        return beats

    def _frozen(self, beats: Beats) -> dict[int, str]:
        """Rank -> why it is held for frozen."""
        out = {}
        alive = [rank for rank in beats if self._quiet[rank] < self.seconds / 2]
        waiting = [rank for rank in alive if beats[rank].get("for_ranks")]
        for rank, beat in beats.items():
            if self._quiet[rank] >= self.seconds:
                # Without anybody else alive the launch is over, and this file is what a kill left.
                if is_here(beat) or (alive and beat["machine"] not in {beats[r]["machine"] for r in alive}):
                    out[rank] = f"it has given no sign of life for {self._quiet[rank]:.0f} s: {_stopped(beat)}"
                continue
            others = [one for one in waiting if one != rank]
            if others and self._stands_still(beat):
                out[rank] = (
                    f"it has stood still at {beat['at']} for {beat['still']:.0f} s, without computing, while "
                    f"rank {others[0]} waits for it"
                )
        return out

    def _stands_still(self, beat: Mapping[str, Any]) -> bool:
        """At one line for too long, without waiting for anything that has a limit of its own, and without moving."""
        still = beat.get("still", 0.0)
        if still < self.seconds or beat["for_ranks"] or beat["for_others"]:
            return False
        return beat["cpu"] < CPU_SHARE * still and beat["bytes"] < IO_BYTES

    def _ask(self, frozen: Beats, *, end: bool) -> None:
        wanted = {"id": f"{time.time_ns()}", "frozen": {str(r): beat for r, beat in frozen.items()}, "end": end}
        write_json(self.errors / STACKS_WANTED, wanted, durable=False)

    def _collect(self, beats: Beats, frozen: Mapping[int, str]) -> dict[int, str]:
        """Every rank's stack: from itself, from a rank beside it, or from here."""
        for rank in beats:
            stack_file(self.errors, rank).unlink(missing_ok=True)
        self._ask({rank: beats[rank] for rank in frozen}, end=False)
        deadline = time.monotonic() + COLLECT_SECONDS
        files = {rank: stack_file(self.errors, rank) for rank in sorted(beats)}
        while time.monotonic() < deadline and not all(path.exists() for path in files.values()):
            time.sleep(0.1)
        out = {}
        for rank, path in files.items():
            if path.exists():
                out[rank] = path.read_text(encoding="utf-8").strip()
            else:
                out[rank] = python_stack(beats[rank]["pid"]) if is_here(beats[rank]) else "no answer from its machine"
        return out

    def _report(self, frozen: Mapping[int, str], stacks: Mapping[int, str]) -> None:
        texts = []
        for rank, why in frozen.items():
            status = last_status(self.folder, rank)
            where = "before its work began" if status is None else f"in {status_text(status)}"
            texts.append(f"{rank_text(rank, status)} is frozen {where}: {why}")
        whole = "\n\n".join(f"rank {rank}:\n{stack}" for rank, stack in stacks.items())
        page = {"ranks": sorted(frozen), "text": "; ".join(texts), "stacks": whole, "time": time.time()}
        write_json(self.errors / FROZEN, page, durable=False)


def _stopped(beat: Mapping[str, Any]) -> str:
    if not is_here(beat):
        return "its machine does not answer, or its process is stopped"
    seen = process_stat(beat["pid"])
    if seen is not None and seen[0] in "Tt":
        return f"process {beat['pid']} is stopped (SIGSTOP, or a debugger)"
    return f"process {beat['pid']} does not run (state {seen[0] if seen else '?'})"
