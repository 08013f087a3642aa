"""Facts of source code, counted on code whose numbers are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.code_facts import code_facts, read_source

SOURCE = """\
import os, sys
from pathlib import Path

class Shop(Base, metaclass=Meta):
    def total(self, prices, *rest, tax=0.1, **more):
        amount = 0
        for price in prices:
            if price > 0 and tax:
                amount += price
            elif price == 0:
                continue
        return amount

def first(items, /, key):
    try:
        while True:
            with key:
                return [i for i in items if i and i > 1]
    except KeyError:
        match items:
            case [a]:
                return a
            case _:
                return None

async def outer():
    def inner():
        return 1 if x else 2
    return inner
"""


def test_functions_are_counted_as_by_hand():
    facts = code_facts(SOURCE, "shop.py")
    assert (facts.lines, facts.imports) == (29, ["os", "sys", "pathlib"])
    assert facts.classes == {"Shop": ["Base"]}
    found = {f.name: (f.line, f.lines, f.branches, f.loops, f.complexity, f.nesting) for f in facts.functions}
    assert found == {
        "Shop.total": (5, 8, 2, 1, 5, 2),  # 1 + for + if + and + elif
        "first": (14, 11, 2, 2, 7, 3),  # 1 + except + case + while + comprehension + its if + and
        "outer": (26, 4, 0, 0, 1, 0),
        "outer.inner": (27, 2, 1, 0, 2, 0),
    }
    assert facts.functions[0].arguments == ["self", "prices", "*rest", "tax", "**more"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"def f(:\n", "line 1: no Python (invalid syntax)"),
        (b"\x89PNG\xff", "no UTF-8 text (byte 0)"),
        (b"x = 1\0", "zero byte"),
        (b"x = " + b"-" * 200_000 + b"1", "nested too deeply"),
        (b"#" * 1_000_001, "more than the 1000000"),
    ],
)
def test_what_is_no_python_is_refused(tmp_path: Path, data, said):
    path = tmp_path / "file.py"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        code_facts(read_source(path), str(path))
    assert said in str(error.value)


def test_what_is_no_file_is_refused(tmp_path: Path):
    for path, said in ((tmp_path, "is a folder"), (tmp_path / "none.py", "no such file")):
        with pytest.raises(UserError, match=said):
            read_source(path)
