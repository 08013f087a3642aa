"""The tutorial's commands print what the page shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import tutorial
from scripts.tutorial import Block, alike, blocks, difference, run

FIRST = "```console last=1\n$ echo a; echo 3.5 s\n$ x=4\n4 s\n```\n"
TEXT = f"# A page\n\n{FIRST}\n```console any\n$ echo $x \\\n    of 5\n```\n"


def test_blocks_are_typed_into_one_shell_and_compared_but_for_numbers(tmp_path: Path) -> None:
    found = blocks(TEXT)
    assert [block.line for block in found] == [3, 9]
    assert found[0] == Block(("echo a; echo 3.5 s", "x=4"), "4 s\n", " last=1", 3)
    printed = run(found, tmp_path)
    assert printed == ["a\n3.5 s\n", "4 of 5\n"]
    assert difference(found, printed) == ""
    assert difference(found, ["a\nnothing\n", "b\n"]).startswith(
        "tutorial.md:3: shown is\n4 s\nbut printed was\nnothing"
    )
    assert difference(found, ["a\n4 s\n", "\n"]) == "tutorial.md:9: nothing was printed"
    assert [block.text(block.part(output)) for block, output in zip(found, printed, strict=True)] == [
        "```console last=1\n$ echo a; echo 3.5 s\n$ x=4\n3.5 s\n```",
        "```console any\n$ echo $x \\\n    of 5\n4 of 5\n```",
    ]


def test_a_command_that_fails_ends_it_with_the_line_of_the_page(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^tutorial\.md:1: exit code 3\nfirst\n"):
        run(blocks("```console\n$ echo first; exit 3\n```\n"), tmp_path)


def test_tables_of_another_width_are_alike() -> None:
    assert alike("┏━━━┳━━━┓\n│ a │ 1.5 s │\n", "┏━━━━━┳━━━┓\n│ a   │ 22 s │\n")
    assert alike("│ 1 min 26 s │\n", "│       16 s │\n") and alike("2 h 01 min 3 s left\n", "4 min 10 s left\n")
    assert not alike("a 1\n", "b 1\n") and not alike("a\n", "a\na\n")


def test_every_block_of_the_page_shows_something() -> None:
    found = blocks(tutorial.PAGE.read_text(encoding="utf-8"))
    assert len(found) > 8 and all(block.commands and block.shown.strip() for block in found)


@pytest.mark.slow
def test_the_page_shows_what_its_commands_print(tmp_path: Path) -> None:
    found = blocks(tutorial.PAGE.read_text(encoding="utf-8"))
    assert difference(found, run(found, tmp_path)) == ""
