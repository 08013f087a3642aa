"""The files that pages are made of: templates, styles and scripts, which are written into the page."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FOLDER = Path(__file__).parent
TEMPLATES = Environment(
    loader=FileSystemLoader(FOLDER / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@cache
def _static(name: str) -> str:
    return (FOLDER / "static" / name).read_text(encoding="utf-8")


def style(*names: str) -> Markup:
    """Style sheets of `static/`, in one element."""
    return Markup("<style>\n{}\n</style>").format(Markup("\n".join(map(_static, names))))


def script(*names: str) -> Markup:
    """Scripts of `static/`, in one element."""
    text = "\n".join(map(_static, names))
    assert "</script" not in text, "it would end the element"
    return Markup("<script>\n{}\n</script>").format(Markup(text))
