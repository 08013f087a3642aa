"""What a user can get wrong. Raised before workers start; the CLI prints the message alone and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend. The message gives the value, the reason and the way out."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`' (did you mean "x"?)'` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""


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
