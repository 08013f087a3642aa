"""Which runs there are on Modal, and who works on them: a Dict of Modal's, the same from every machine."""

from __future__ import annotations

import time
from dataclasses import asdict, fields
from typing import Any

import modal

from modal_gpu.failures import UNANSWERED
from modal_gpu.job import State

NAME = "ray-pipeline-runs"


class Registry:
    """States by run, and a lock for each that holds across containers and machines."""

    def __init__(self, name: str = NAME):
        self._dict = modal.Dict.from_name(name, create_if_missing=True)

    def read(self, run: str) -> State | None:
        """What is known of a run; None where it was never launched, or nobody asked for it in a week."""
        found = self._dict.get(run)
        if found is None:
            return None
        known = {entry.name for entry in fields(State)}
        return State(**{name: value for name, value in found.items() if name in known})

    def write(self, state: State) -> None:
        """Replace what is known."""
        state.updated = time.time()
        self._dict[state.run] = asdict(state)

    def note(self, run: str, **values: Any) -> None:
        """Change some of it. Notes are for people: one that is lost stops nothing."""
        state = self.read(run) or State(run)
        for name, value in values.items():
            setattr(state, name, value)
        self.write(state)

    def runs(self) -> list[str]:
        """Names of all that are known."""
        return sorted(str(key) for key in self._dict.keys() if "/" not in str(key))  # noqa: SIM118

    def ask_to_stop(self, run: str) -> None:
        """Let the run save and end; apart from its state, which others write too."""
        self._dict[f"{run}/stop"] = True

    def stop_wanted(self, run: str) -> bool:
        """Whether somebody asked."""
        return bool(self._dict.get(f"{run}/stop"))

    def forget_stop(self, run: str) -> None:
        """A run that is begun again is meant to run."""
        self._dict.pop(f"{run}/stop", None)

    def holder(self, run: str) -> str | None:
        """Id of the call that works on the run; None where nobody does, or the call is over."""
        found = self._dict.get(f"{run}/lock")
        return str(found) if found and call_lives(str(found)) else None

    def lock(self, run: str, call: str) -> str | None:
        """Take the run for a call; the id of the other call that has it, or None when it is taken."""
        key = f"{run}/lock"
        if self._dict.put(key, call, skip_if_exists=True):
            return None
        other = str(self._dict.get(key))
        if other == call:  # this call, begun again in another container
            return None
        if other != "None" and call_lives(other):
            return other
        self._dict.pop(key, None)
        return None if self._dict.put(key, call, skip_if_exists=True) else str(self._dict.get(key))

    def take_over(self, run: str, call: str) -> None:
        """Take it for a call, and end the other one that has it: nobody waits for that any more."""
        while (other := self.lock(run, call)) is not None:
            modal.FunctionCall.from_id(other).cancel(terminate_containers=True)

    def hand_over(self, run: str, call: str) -> None:
        """Give the lock to the call that goes on."""
        self._dict[f"{run}/lock"] = call

    def unlock(self, run: str, call: str) -> None:
        """Let go, if it is this call's."""
        if self._dict.get(f"{run}/lock") == call:
            self._dict.pop(f"{run}/lock", None)


def call_lives(call: str) -> bool:
    """Whether a call has not ended yet.

    Raises:
        modal.exception.Error: Modal does not answer. Who took that for an end would take a run from its holder.
    """
    try:
        modal.FunctionCall.from_id(call).get(timeout=0)
    except TimeoutError:
        return True
    except UNANSWERED:
        raise
    except Exception:  # noqa: BLE001  its results are gone, its time was up, or what the function raised there
        return False
    return False
