"""Tests in one process, the program they try in another. Runs in the tests' process of `sandbox.run_judged`.

The program's process sees what it is called with, and nothing of the tests: no expected value, no token, no frame that
holds them. What it answers is compared here.
"""

from __future__ import annotations

import ast
import builtins
import types
from typing import Any

from ray_pipeline.isolation.remote import TESTS, Peer


def namespace(tests: str, offered: list[list[Any]]) -> dict[str, Any]:
    """Names that the tests use, from those that the program offers.

    A program that defines `abs` or `all` does not change what these do in the tests, unless the tests use nothing else
    of it: then the exercise was to write it.
    """
    used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    found = {name: value for name, value in offered if name in used}
    own = {name: value for name, value in found.items() if not hasattr(builtins, name)}
    called = {name for name, value in own.items() if not isinstance(value, types.ModuleType)}
    return own if called else found


def judge(channel: tuple[int, int], solution: str, tests: str) -> None:
    """Run the tests against the program in the other process; returns where they reach their end."""
    peer = Peer(*channel, serves=False)
    space = {"__name__": TESTS, **namespace(tests, peer.ask("load", solution))}
    exec(compile(tests, "<tests>", "exec", dont_inherit=True), space)
