"""A page of the report as a person has it before them: everything drawn, nothing beside the screen or over another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.serving.browser import page_at

SIDEWAYS = """() => [...document.querySelectorAll("main *")].filter(one => {
  const box = one.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1 && !one.closest(".uplot");
}).map(one => one.tagName + "." + one.className)"""
# Pairs of boxes that stand beside each other and share more than a pixel.
OVERLAPS = """() => [".card", "figure", ".name, .track, .value", "h2", "h3", "nav a"].flatMap(what => {
  const boxes = [...document.querySelectorAll(what)].map(one => one.getBoundingClientRect()).filter(box => box.width);
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1
  ).map(() => what));
})"""


def look_at(browser: Any, report: Path, width: int, scheme: str, picture: Path | None = None) -> list[str]:
    """Scroll through the page; an error in its console fails. Returns the ids of its sections.

    Args:
        picture: where to write what was seen, from top to bottom.
    """
    size = {"width": width, "height": 2000}
    with page_at(browser, report.as_uri(), viewport=size, color_scheme=scheme) as page:
        page.evaluate("() => document.querySelectorAll('details').forEach(one => { one.open = true; })")
        for place in page.locator(".plot").all():
            place.scroll_into_view_if_needed()
            place.locator("canvas").wait_for()
        kinds = page.evaluate("() => [...new Set([...document.querySelectorAll('.plot')].map(p => p.dataset.kind))]")
        assert set(kinds) == {"chart", "experts", "step"}
        assert page.evaluate(SIDEWAYS) == [] and page.evaluate(OVERLAPS) == []
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        if picture is not None:
            page.screenshot(path=picture, full_page=True)
        return page.evaluate("() => [...document.querySelectorAll('h2')].map(one => one.id)")
