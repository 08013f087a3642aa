"""What a user can get wrong, and what to type then. Raised before workers start; the CLI prints the message alone and
exits with code 2."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

EXIT_FAILED, EXIT_USER_ERROR = 1, 2  # codes of the command line


class UserError(Exception):
    """A mistake the user can fix. The message gives the value, the reason and the way out."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`' (did you mean "x"?)'` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""


def first_line(error: BaseException) -> str:
    """What the error says, in a line; its name where it says nothing, as a TimeoutError does."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class StageFailed(Exception):
    """A stage that ended in an error which is not the user's. The message is the cause in a line or two.

    Attributes:
        details: the whole traceback, for a log file.
    """

    def __init__(self, cause: str, details: str = ""):
        super().__init__(cause, details)
        self.cause, self.details = cause, details

    def __str__(self) -> str:
        return self.cause


def program() -> str:
    """How this program is called, for messages that say what to type; in workers the form that works everywhere."""
    return "ray-pipeline" if os.path.basename(sys.argv[0]) == "ray-pipeline" else "python -m ray_pipeline.cli"


def command(*words: str | Path) -> str:
    """`python -m ray_pipeline.cli resume mine`: this program with arguments, as a shell takes them."""
    return " ".join([program(), *(shlex.quote(str(word)) for word in words)])


def resume_command(run_dir: Path, *options: str) -> str:
    """What goes on with the run in `run_dir`, from whichever folder it is typed."""
    return command("resume", run_dir.name, "--output-dir", run_dir.parent, *options)
