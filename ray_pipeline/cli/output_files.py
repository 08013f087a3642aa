"""Keeps files that a user asks to have written from replacing files that the same verb did not write."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ray_pipeline.errors import UserError

# How a page begins, line ends left out: today, and as it was written before. Its title follows.
PAGE_STARTS = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1"><title>',
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>',
)


def refuse_to_replace(option: str, path: Path, is_own: Callable[[Path], bool]) -> None:
    """Refuse an output file that is there already, unless an earlier call of the verb wrote it.

    Args:
        is_own: whether the verb wrote the existing file; given any file's path, it must not raise.
    Raises:
        UserError: naming the option and the file.
    """
    if path.exists() and not is_own(path):
        raise UserError(
            f"{option} {path}: there is another file already, which this verb did not write and does not replace. "
            "Give another path, or move that file away."
        )


def check_output_file(option: str, path: Path, is_own: Callable[[Path], bool]) -> None:
    """Refuse, before any work, a file that cannot be written or that the verb did not write. Arguments as above.

    Raises:
        UserError: naming the option and the path.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: is a folder, or lies in none. Give the path of a file to write.")
    refuse_to_replace(option, path, is_own)


def report_writers(options: dict[str, Any]) -> list[tuple[Any, Path]]:
    """(reporter, path) of everything that will be written.

    Raises:
        UserError: an unknown reporter, a path that is a folder or lies in a file, two reports in one file, or a file
            that is there and was not written by the same reporter.
    """
    from ray_pipeline.report.evaluation import get_reporter

    wanted = [(name, options[f"{name}_file"], f"--{name}") for name in ("json", "html") if options[f"{name}_file"]]
    for given in options["reports"]:
        name, equals, file = given.partition("=")
        if not equals or not file:
            raise UserError(f"--report {given}: write it as NAME=FILE, for example --report jsonl=answers.jsonl.")
        wanted.append((name, Path(file), "--report"))
    paths = [path.absolute() for _, path, _ in wanted]
    for _, path, option in wanted:
        if path.is_dir() or any(parent.is_file() for parent in path.absolute().parents):
            raise UserError(f"{option} {path}: is a folder, or lies in a file. Give the path of a file to write.")
        if paths.count(path.absolute()) > 1:
            raise UserError(f"{option} {path}: two reports would be written to this file. Give different ones.")
    writers = [(get_reporter(name), path) for name, path, _ in wanted]
    for name, path, option in wanted:
        refuse_to_replace(option, path, partial(_is_own_report, name))
    return writers


def _is_own_report(reporter: str, path: Path) -> bool:
    """Whether the built-in reporter wrote the file; other packages' files are told by nothing."""
    if reporter == "json":
        return has_keys(path, frozenset({"kind", "schema", "tasks"}))
    if reporter == "jsonl":
        return first_line_has_keys(path, frozenset({"task", "sample", "correct"}))
    return reporter == "html" and is_page(path, "Evaluation of ")


def is_page(path: Path, title: str) -> bool:
    """Whether the file is a page of ours whose title begins so."""
    starts = tuple(start + title for start in PAGE_STARTS)
    return (_text(path) or "").replace("\n", "").startswith(starts)


def has_keys(path: Path, keys: frozenset[str]) -> bool:
    """Whether the file is a JSON object with all of these keys."""
    found = _json(_text(path))
    return isinstance(found, dict) and keys <= found.keys()


def first_line_has_keys(path: Path, keys: frozenset[str]) -> bool:
    """Whether the file is empty, or its first line is a JSON object with all of these keys."""
    text = _text(path)
    found = _json((text or "").partition("\n")[0])
    return text == "" or (isinstance(found, dict) and keys <= found.keys())


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError):
        return None
