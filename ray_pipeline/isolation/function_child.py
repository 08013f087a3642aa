"""A process that calls functions for its parent: one JSON line in, one out. Imports what it is told and nothing else.

Lines in: {"call": "module:function", "arguments": [...], "seed": n}. Lines out: {"value": ...} or {"error": "..."}.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import IO, Any

from ray_pipeline.errors import UserError
from ray_pipeline.isolation.function_name import import_function

# A module's function of this name is called once, before any clock runs: it may import or load what takes long.
PREPARE = "prepare_process"
# The parent kills what overruns. Where the parent is dead, the alarm does, this much later.
GRACE_SECONDS = 5.0
# Of private memory (RLIMIT_DATA; unlike address space, it leaves out what CUDA merely reserves). A soft limit: a module
# that needs more raises it in `prepare_process`.
MEMORY_BYTES = 8 << 30


def _bound(name: str, timeout_seconds: float, offered: Mapping[str, Any]) -> Callable[..., Any]:
    """The function with those of the offered keywords that it takes.

    One that limits its own work (`timeout_seconds`) is told to be done before it would be killed.
    """
    function = import_function(name, "function")
    prepare = getattr(sys.modules.get(function.__module__), PREPARE, None)
    if prepare is not None:
        try:
            prepare()
        except Exception as error:  # noqa: BLE001  a user's function may raise anything
            raise UserError(f"{name}: {PREPARE}() of its module failed ({type(error).__name__}: {error}).") from None
    offered = {"timeout_seconds": 0.8 * timeout_seconds, **offered}
    taken = {key: value for key, value in offered.items() if key in inspect.signature(function).parameters}
    return partial(function, **taken) if taken else function


def _answer(function: Callable[..., Any], arguments: list[Any], seed: int) -> str:
    random.seed(seed)  # a function that draws gives the same in any process, in any order
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    try:
        value = function(*arguments)
        if isinstance(value, bool | int | float | str) or value is None:
            return json.dumps({"value": value})
        if hasattr(value, "item"):  # a number of numpy or torch
            return json.dumps({"value": value.item()})
        return json.dumps({"value": value}, ensure_ascii=False)
    except MemoryError:
        gib = resource.getrlimit(resource.RLIMIT_DATA)[0] / (1 << 30)
        hint = f"its process may take {gib:.3g} GiB, unless {PREPARE}() in its module raises RLIMIT_DATA"
        return json.dumps({"error": f"MemoryError: {hint}"})
    except Exception as error:  # noqa: BLE001  a user's function may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
        return json.dumps({"error": f"{type(error).__name__}: {str(error)[:500]}{place}"})


def _serve(lines: IO[str], out: IO[str], timeout_seconds: float, offered: Mapping[str, Any]) -> None:
    functions: dict[str, Callable[..., Any]] = {}
    own = os.getpid()
    for line in lines:
        order = json.loads(line)
        name = order["call"]
        try:
            if name not in functions:
                functions[name] = _bound(name, timeout_seconds, offered)
        except UserError as error:
            reply = json.dumps({"refused": str(error)})
        else:
            if order["arguments"] is None:  # asked only to import it
                reply = json.dumps({"value": None})
            else:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, timeout_seconds + GRACE_SECONDS)
                reply = _answer(functions[name], order["arguments"], order["seed"])
                signal.setitimer(signal.ITIMER_REAL, 0)
                if os.getpid() != own:
                    os._exit(0)  # the function forked and came back twice; one answer is enough
        out.write(reply + "\n")
        out.flush()


def _main() -> None:
    timeout_seconds, offered = float(sys.argv[1]), json.loads(sys.argv[2])
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    soft = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    # What the function prints goes to the log; the line protocol keeps a descriptor of its own.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # a process that is killed writes nothing that it still held back
    with os.fdopen(os.dup(0), encoding="utf-8") as lines:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _serve(lines, out, timeout_seconds, offered)


if __name__ == "__main__":
    _main()
