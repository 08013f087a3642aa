"""The pages of docs/: their snippets print what they show, and the files they name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.docs_pages import DOCS, ROOT, difference, rewritten, snippets

PAGES = sorted(DOCS.glob("*.md"))
PAGE = "# A page\n\n```python\nx = 6\nprint(x)\n```\n\n```text\n{shown}\n```\n\n```python\nprint(7 * x)\n```\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_print_what_the_page_shows(page: Path) -> None:
    assert snippets(page.read_text(encoding="utf-8")) or page.stem in ("index", "design", "style", "tutorial")
    assert difference(page) == ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:model|ray_pipeline|scripts|tests|configs|docs)/[\w./-]+)`", text)
    linked = re.findall(r"\]\(([\w./-]+\.md)\)", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [name for name in linked if not (page.parent / name).exists()]
    assert missing == []


def test_output_that_is_not_printed_is_found_and_mended(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(shown="5"))
    assert difference(page) == "page.md:4: output line 1 is shown as '5', but is '6'"
    page.write_text(PAGE.format(shown="6"))
    assert difference(page) == "page.md:13: output line 1 is shown as '(nothing)', but is '42'"
    page.write_text(rewritten(page))
    assert difference(page) == ""
    assert "```text\n42\n```" in page.read_text()


def test_an_error_names_the_line_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        difference(page)
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 4)
