"""Watching a call on Modal from here: its log, its end, what Ctrl-C means, and silence."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import modal

from modal_gpu.failures import SILENCE, UNANSWERED, explained, way_on
from modal_gpu.files import VolumeCopy, fetch
from modal_gpu.job import Outcome, State
from modal_gpu.run_registry import Registry
from ray_pipeline.errors import EXIT_FAILED, StageFailed, UserError, command, first_line

ASK_EVERY = 2.0
GIVE_UP = 300.0  # seconds of silence
MENU = "\nThe run goes on. [d]etach and leave it, [s]top it, or go on [w]atching? "


class Detached(Exception):
    """Somebody leaves; the run goes on."""


class _Asked:
    """Asks how a call ended, in a thread, so that Ctrl-C and silence are noticed while an answer is waited for."""

    def __init__(self, call: str):
        self.call = call
        self.heard = time.monotonic()
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self.ended = threading.Event()
        self.trouble = ""
        self._thread = threading.Thread(target=self._ask, name="call", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Ask no more. The answer that is waited for comes soon; cut off by the end of the program, it is a trace."""
        self.ended.set()
        self._thread.join(2 * ASK_EVERY)

    def _ask(self) -> None:
        call = modal.FunctionCall.from_id(self.call)
        while not self.ended.is_set():
            try:
                self.outcome = call.get(timeout=ASK_EVERY)
                self.ended.set()
            except TimeoutError:
                self.heard = time.monotonic()
            except UNANSWERED as error:
                self.trouble = first_line(error)
                time.sleep(1.0)
            except BaseException as error:  # noqa: BLE001  what ended the call is raised here
                self.error = error
                self.ended.set()


class LogPrinter:
    """Prints what the containers of a run print, piece by piece, in a thread."""

    def __init__(self, run: str, write: Callable[[str], None]):
        self.run, self.write = run, write
        self._over = threading.Event()
        self._shown: set[str] = set()
        self._thread = threading.Thread(target=self._follow, name="log", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Show what is still on its way, for a few seconds at most."""
        self._over.set()
        self._thread.join(5.0)

    def _follow(self) -> None:
        while True:
            over = self._over.is_set()
            try:
                state = Registry().read(self.run)
                if state is not None and state.piece and state.piece not in self._shown:
                    self._shown.add(state.piece)
                    for entry in modal.FunctionCall.from_id(state.piece).logs.stream():
                        self.write(entry.message)
                    continue
            except modal.exception.Error:  # a log is not worth a run; what matters is told by the call
                time.sleep(ASK_EVERY)
            if over:
                return
            self._over.wait(1.0)


def watch(state: State, run_dir: Path) -> int:
    """Show the log until the call ends, fetch the outputs, and say how it ended. Returns the run's exit code.

    Raises:
        UserError, StageFailed: what went wrong there, with what was fetched and the next command.
    """
    printer = LogPrinter(state.run, _write)
    try:
        outcome = _wait(state)
    except Detached:
        print(f"\nLeft alone: {state.run} goes on. {way_on(state.run)}")
        return 0
    finally:
        printer.stop()
    return finish(outcome, state, run_dir)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _wait(state: State) -> Outcome:
    call = state.call
    while True:
        outcome = _ending_of(call, state)
        if outcome.moved is None:
            return outcome
        call = outcome.moved


def _ending_of(call: str, state: State) -> Outcome:
    asked = _Asked(call)
    try:
        _until_ended(asked, call, state)
    finally:
        asked.leave()
    if asked.error is not None:
        return _bad_end(asked.error)
    assert asked.outcome is not None
    return asked.outcome


def _until_ended(asked: _Asked, call: str, state: State) -> None:
    """Wait, tell of silence, and ask what Ctrl-C is to mean."""
    told = False
    while True:
        try:
            if asked.ended.wait(0.2):
                return
            silent = time.monotonic() - asked.heard
            if silent > SILENCE and not told:
                told = True
                why = f" ({asked.trouble})" if asked.trouble else ""
                print(f"Modal does not answer{why}; the run goes on there, and it is asked again.", file=sys.stderr)
            elif silent < ASK_EVERY:
                told = False
            if silent > GIVE_UP:
                raise UserError(f"Modal did not answer for {silent:.0f} s. {way_on(state.run)}")
        except KeyboardInterrupt:
            choose(call, state)


def choose(call: str, state: State) -> None:
    """After Ctrl-C: return to go on watching.

    Raises:
        Detached: leave; so it is where nobody can be asked. KeyboardInterrupt: stopped.
    """
    if not sys.stdin.isatty():
        raise Detached
    try:
        answer = input(MENU).strip().lower()[:1]
    except (EOFError, OSError, KeyboardInterrupt):  # the terminal may be gone
        raise Detached from None
    if answer == "s":
        stop(call, state)
        raise KeyboardInterrupt
    if answer != "w":
        raise Detached


def stop(call: str, state: State) -> None:
    """End a run there: its piece, its conductor; the lock goes with the call."""
    with explained(f" {way_on(state.run)}"):
        registry = Registry()
        known = registry.read(state.run)
        for each in dict.fromkeys([known.piece if known else "", known.call if known else "", call]):
            if each:
                modal.FunctionCall.from_id(each).cancel(terminate_containers=True)
        ended = Outcome(EXIT_FAILED, "it was stopped")
        registry.note(state.run, outcome=asdict(ended), phase="stopped", piece="")
        registry.unlock(state.run, call)


def _bad_end(error: BaseException) -> Outcome:
    """Of a conductor that did not return."""
    name = type(error).__name__
    if name in ("InputCancellation", "RemoteError") or "cancel" in str(error).lower():
        return Outcome(EXIT_FAILED, "it was stopped")
    if name == "FunctionTimeoutError":
        return Outcome(EXIT_FAILED, "its time on Modal was up")
    if name == "OutputExpiredError":
        return Outcome(EXIT_FAILED, "Modal no longer keeps how it ended")
    return Outcome(EXIT_FAILED, f"its container ended: {name}: {first_line(error)}")


def finish(outcome: Outcome, state: State, run_dir: Path, *, checkpoints: bool = False) -> int:
    """Fetch what there is, and say how it ended."""
    fetched = ""
    try:
        with explained():
            volume = modal.Volume.from_name(state.volume)
            fetched = fetch(VolumeCopy(volume), state.run, run_dir.parent, checkpoints=checkpoints).describe(run_dir)
    except KeyboardInterrupt:
        again = command("modal", "pull", state.run, "--output-dir", run_dir.parent)
        raise UserError(f"The run on Modal has ended; not all of it was fetched. Go on with: {again}") from None
    except UserError as error:
        if outcome.error is None:
            raise
        fetched = f"Nothing was fetched ({error})"
    if outcome.error is None:
        print(fetched)
        return outcome.exit_code
    resume = command("resume", state.run, "--output-dir", run_dir.parent)
    log = command("modal", "logs", state.run)
    raise (UserError if outcome.user_error else StageFailed)(
        f"run {state.run} on Modal: {outcome.error.rstrip('.')}. {fetched}. Its log: `{log}`. Go on with: {resume}"
    )
