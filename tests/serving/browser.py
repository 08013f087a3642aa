"""A headless Chromium for the chat page; tests that need it are skipped, with the reason, where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# What Chromium says of answers that the page is there to show: refused requests, and a server that is gone.
EXPECTED = ("the server responded with a status of 4",)


@contextmanager
def browser() -> Iterator[Any]:
    """One of the system's, or playwright's own where it was installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'ray-pipeline[dev]'")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next((found for name in NAMES if (found := shutil.which(name))), own)
        if not Path(path).exists():
            pytest.skip("needs a browser: install chromium or google-chrome, or run `playwright install chromium`")
        started = playwright.chromium.launch(executable_path=path)
        yield started
        started.close()


@contextmanager
def page_at(started: Any, address: str, **settings: Any) -> Iterator[Any]:
    """The page, in a profile of its own; no error may appear in its console.

    Args:
        settings: of `browser.new_context`: viewport, color_scheme ...
    """
    context = started.new_context(permissions=["clipboard-read", "clipboard-write"], **settings)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
    page.goto(address)
    yield page
    context.close()
    assert [error for error in errors if not any(text in error for text in EXPECTED)] == []
