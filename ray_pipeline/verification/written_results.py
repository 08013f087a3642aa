"""The file of results: written while layouts are verified, and gone on with by the next call of the same code."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import ray_pipeline
from ray_pipeline.layout.layout import Layout, Refusal
from ray_pipeline.records.artifacts import write_text
from ray_pipeline.records.integrity import file_sha256
from ray_pipeline.verification.cases import Case, Tolerance
from ray_pipeline.verification.compare import Comparison, Result

EVERY = 30.0  # seconds between two writes of the file
KEYS = frozenset({"passed", "layouts", "refused"})
DECIDES = ("machine", "python", "torch", "deepspeed")  # of what a machine has: another one of these may change a result
ROOT = Path(ray_pipeline.__path__[0]).parent


def imported_files() -> set[str]:
    """Files of this project that this process has imported: `model/config.py`."""
    own = (module for name, module in list(sys.modules.items()) if name.split(".")[0] in ("model", "ray_pipeline"))
    return {Path(module.__file__).relative_to(ROOT).as_posix() for module in own if module.__file__}


def digest(file: str) -> str:
    """SHA-256 of one of this project's files; empty if there is none."""
    path = ROOT / file
    return file_sha256(path) if path.is_file() else ""


class WrittenResults:
    """Results of many cases in one JSON file.

    Args:
        path: None keeps nothing.
        refused: rule -> layouts that the table refuses.
        machine, tolerances: where the results come from and what they were held to.

    Those in the file count as long as the tolerances, the packages that `DECIDES` names and every file of this project
    that the ranks had imported are the same. What they never imported (a verb, a report) may change.
    """

    def __init__(
        self,
        path: Path | None,
        refused: Mapping[str, Sequence[tuple[Layout, Refusal]]],
        machine: Mapping[str, Any],
        tolerances: Mapping[str, Tolerance],
    ):
        self.path, self._refused, self._machine = path, refused, dict(machine)
        self._tolerances = {precision: asdict(tolerance) for precision, tolerance in tolerances.items()}
        self._code: dict[str, str] = {}
        self._written = time.monotonic()

    def passed(self, cases: Iterable[Case]) -> list[Result]:
        """Of those cases that the file says passed, with the code and packages of today."""
        if self.path is None or not self.path.exists():
            return []
        stored = json.loads(self.path.read_text(encoding="utf-8"))
        if not isinstance(stored.get("code"), dict):  # written by an earlier version
            return []
        same_packages = all(stored["machine"].get(name) == self._machine.get(name) for name in DECIDES)
        same_code = all(digest(file) == known for file, known in stored["code"].items())
        if not (same_packages and same_code and stored["tolerances"] == self._tolerances):
            return []
        self._code = stored["code"]
        entries = {entry["case"]: entry for entry in stored["layouts"] if entry["passed"]}
        return [_result(case, entries[name]) for case in cases if (name := _name(case)) in entries]

    def write(self, results: Sequence[Result], files: Iterable[str], *, now: bool = False) -> None:
        """Write the file, if the last time is long enough ago or it shall be `now`.

        Args:
            files: of this project, that the results come from.

        Raises:
            UserError: it cannot be written.
        """
        if self.path is None or (not now and time.monotonic() < self._written + EVERY):
            return
        refused = [
            {"rule": rule, "flags": layout.flags(), "reason": str(refusal)}
            for rule, found in self._refused.items()
            for layout, refusal in found
        ]
        self._code |= {file: digest(file) for file in sorted(files) if file not in self._code}
        whole = {
            "passed": all(result.passed for result in results), "machine": self._machine,
            "tolerances": self._tolerances, "code": self._code,
            "layouts": [{"case": _name(result.case), **result.as_dict()} for result in results], "refused": refused,
        }  # fmt: skip
        write_text(self.path, json.dumps(whole, indent=1) + "\n")
        self._written = time.monotonic()


def _name(case: Case) -> str:
    return hashlib.sha256(repr(case).encode()).hexdigest()[:16]


def _result(case: Case, entry: Mapping[str, Any]) -> Result:
    compared = {field.name: entry[field.name] for field in fields(Comparison)}
    return Result(case, entry["seconds"], Comparison(**compared))
