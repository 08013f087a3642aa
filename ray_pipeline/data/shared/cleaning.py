"""Documents made clean, named by their content, and dealt to training or validation. Pure functions of the text."""

from __future__ import annotations

import hashlib
import re
import unicodedata

# Control and format characters carry no text; tab and newline do. Joiners stay: scripts and emoji need them.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff\ufffe\uffff]")
# Characters of old that part lines, pages or records; taken out, they would glue the words beside them.
_BREAKS = re.compile("[\x0b\x0c\x1c-\x1e\x85]")
# Looked for from the first blank of a run alone, or a long run that ends in a letter takes the square of its length.
_TRAILING = re.compile(r"(?<![ \t\u00a0\u3000])[ \t\u00a0\u3000]++(?=\n|$)")
_BLANK_LINES = re.compile(r"\n{3,}")


def clean_text(text: str) -> str:
    """NFC, one kind of line end, which page breaks become too, no control characters, no trailing white space, at most
    one blank line in a row.

    Cleaning twice changes nothing more. White space inside lines stays: code and verse mean something by it.
    """
    text = _BREAKS.sub("\n", text.replace("\r\n", "\n").replace("\r", "\n")).replace("\x1f", " ")
    text = _CONTROL.sub("", text)
    text = unicodedata.normalize("NFC", text)
    text = _TRAILING.sub("", text)
    return _BLANK_LINES.sub("\n\n", text).strip("\n").rstrip()


def content_hash(text: str) -> str:
    """32 hex digits that name a document by its content."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def hash_fraction(digest: str) -> float:
    """A number in [0, 1) from a content hash, the same for the same document in every run and corpus."""
    return int(digest[:12], 16) / 16**12


def validation_members(digests: list[str], fraction: float) -> list[bool]:
    """Which documents are held out: those whose hash falls below `fraction`.

    Of two documents or more, at least one goes to either side: the lowest hash to validation, the highest to training.
    """
    fractions = [hash_fraction(digest) for digest in digests]
    chosen = [value < fraction for value in fractions]
    if len(digests) >= 2:
        if not any(chosen):
            chosen[fractions.index(min(fractions))] = True
        if all(chosen):
            chosen[fractions.index(max(fractions))] = False
    return chosen
