"""Pages from the files that they are made of: templates, styles and scripts, which are written into the page."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ray_pipeline.records.units import percent

_FOLDER = Path(__file__).parent
_TEMPLATES = Environment(
    loader=FileSystemLoader(_FOLDER / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@cache
def _static(name: str) -> str:
    return (_FOLDER / "static" / name).read_text(encoding="utf-8")


def _style(*names: str) -> Markup:
    """Style sheets of `static/`, in one element."""
    return Markup("<style>\n{}\n</style>").format(Markup("\n".join(map(_static, names))))


def _script(*names: str) -> Markup:
    """Scripts of `static/`, in one element."""
    text = "\n".join(map(_static, names))
    assert "</script" not in text, "it would end the element"
    return Markup("<script>\n{}\n</script>").format(Markup(text))


_TEMPLATES.globals.update(style=_style, script=_script, percent=percent)


def page(template: str, **values: Any) -> str:
    """A template of `templates/` with its values; every one knows `style`, `script` and `percent`.

    Raises:
        jinja2.UndefinedError: a value is missing.
    """
    return _TEMPLATES.get_template(template).render(**values)
