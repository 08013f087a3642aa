#!/usr/bin/env python3
"""Runs the snippets of the pages in docs/ and compares what they print with what the page shows.

python scripts/docs_pages.py                  # every page: PASS, or the first line that differs
python scripts/docs_pages.py docs/mla.md      # one page
python scripts/docs_pages.py --write          # put what the snippets print into the pages

A snippet is a fenced block of Python; the fenced block of text behind it is its output. The snippets of a page run one
after another in one namespace, so a later one goes on from an earlier one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
_SNIPPET = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    """One block of a page: its code, the output that the page shows (None: it shows none), its first line."""

    code: str
    output: str | None
    line: int


def snippets(text: str) -> list[Snippet]:
    """The snippets of a page, in order."""
    return [
        Snippet(found["code"], found["output"], text.count("\n", 0, found.start()) + 2)
        for found in _SNIPPET.finditer(text)
    ]


def outputs(page: Path) -> Iterator[tuple[Snippet, str]]:
    """Run a page; yields every snippet with what it printed. An error in a snippet is raised with the page's line."""
    namespace: dict[str, Any] = {"__name__": f"docs.{page.stem}"}
    for snippet in snippets(page.read_text(encoding="utf-8")):
        printed = io.StringIO()
        # Empty lines before the code, so that a traceback names the page's own line.
        code = compile("\n" * (snippet.line - 1) + snippet.code, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        yield snippet, printed.getvalue()


def difference(page: Path) -> str:
    """The first line that a page shows and its snippets do not print, or the reverse; empty where they agree."""
    for snippet, printed in outputs(page):
        shown = (snippet.output or "").splitlines()
        got = printed.splitlines()
        for number in range(max(len(shown), len(got))):
            a = shown[number] if number < len(shown) else "(nothing)"
            b = got[number] if number < len(got) else "(nothing)"
            if a != b:
                return f"{page.name}:{snippet.line}: output line {number + 1} is shown as {a!r}, but is {b!r}"
    return ""


def rewritten(page: Path) -> str:
    """The page's text with the outputs that its snippets have now."""
    printed = iter([got for _, got in outputs(page)])

    def block(found: re.Match[str]) -> str:
        got = next(printed)
        return f"```python\n{found['code']}```\n" + (f"\n```text\n{got}```\n" if got else "")

    return _SNIPPET.sub(block, page.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="default: every page in docs/")
    parser.add_argument("--write", action="store_true", help="put what the snippets print into the pages")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    failed = 0
    for page in arguments.pages or sorted(DOCS.glob("*.md")):
        if arguments.write:
            page.write_text(rewritten(page), encoding="utf-8")
        wrong = difference(page)
        failed += bool(wrong)
        print(f"FAIL {wrong}" if wrong else f"PASS {page.name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
