"""The file of results: written while layouts are verified, and gone on with by the next call of the same code."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import model
import ray_pipeline
from ray_pipeline.layout.layout import Layout, Refusal
from ray_pipeline.records.artifacts import write_text
from ray_pipeline.verification.cases import Case, Tolerance
from ray_pipeline.verification.compare import Comparison, Result

EVERY = 30.0  # seconds between two writes of the file
KEYS = frozenset({"passed", "layouts", "refused"})


def code_digest() -> str:
    """SHA-256 of the source of both packages: results of other code say nothing about this one."""
    digest = hashlib.sha256()
    for package in (model, ray_pipeline):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{root.name}/{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


class WrittenResults:
    """Results of many cases in one JSON file.

    Args:
        path: None keeps nothing.
        refused: rule -> layouts that the table refuses.
        machine, tolerances: where the results come from and what they were held to; with the digest of the code they
            decide whether those in the file still count.
    """

    def __init__(
        self,
        path: Path | None,
        refused: Mapping[str, Sequence[tuple[Layout, Refusal]]],
        machine: Mapping[str, Any],
        tolerances: Mapping[str, Tolerance],
    ):
        self.path, self._refused = path, refused
        held_to = {precision: asdict(tolerance) for precision, tolerance in tolerances.items()}
        self._of = {"machine": dict(machine), "tolerances": held_to, "code": code_digest() if path else ""}
        self._written = time.monotonic()

    def passed(self, cases: Iterable[Case]) -> list[Result]:
        """Of those cases that the file says passed, with this code on this machine."""
        if self.path is None or not self.path.exists():
            return []
        stored = json.loads(self.path.read_text(encoding="utf-8"))
        if {name: stored.get(name) for name in self._of} != self._of:
            return []
        entries = {entry["case"]: entry for entry in stored["layouts"] if entry["passed"]}
        return [_result(case, entries[name]) for case in cases if (name := _name(case)) in entries]

    def write(self, results: Sequence[Result], *, now: bool = False) -> None:
        """Write the file, if the last time is long enough ago or it shall be `now`.

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
        whole = {
            "passed": all(result.passed for result in results), **self._of,
            "layouts": [{"case": _name(result.case), **result.as_dict()} for result in results], "refused": refused,
        }  # fmt: skip
        write_text(self.path, json.dumps(whole, indent=1) + "\n")
        self._written = time.monotonic()


def _name(case: Case) -> str:
    return hashlib.sha256(repr(case).encode()).hexdigest()[:16]


def _result(case: Case, entry: Mapping[str, Any]) -> Result:
    compared = {field.name: entry[field.name] for field in fields(Comparison)}
    return Result(case, entry["seconds"], Comparison(**compared))
