#!/usr/bin/env python3
"""Runs the commands of docs/tutorial.md in a throw-away folder and compares what they print with what the page shows.

python scripts/tutorial.py            # half an hour on two cores; exit code 1 and the first line that differs
python scripts/tutorial.py --write    # put what the commands print into the page

A command block is fenced as `console`; its lines that begin with `$ ` are typed into one shell, the rest is what comes
out. Words behind `console` say what of it the page shows: `last=8` or `first=5` lines, and `any` where it is a model's
own words, of which only that there are some is compared. Numbers differ from machine to machine and are not compared.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
WIDTH = 100  # columns of the terminal that the commands print to
MARK = "\x1e"
_BLOCK = re.compile(r"```console(?P<words>[^\n]*)\n(?P<body>.*?)```", re.DOTALL)
_COMMAND = re.compile(r"^\$ (?:.*\\\n)*.*\n", re.MULTILINE)  # with the lines that a backslash continues
_TIME = r"(?:\d+ h )?(?:\d+ min )?\d+(?:\.\d+)? (?:s|min)\b"  # a unit more on a slower machine
_NUMBER = re.compile(rf"{_TIME}|[\d.,]*\d[\d.,]*|[━─]+|\s+")


@dataclass(frozen=True)
class Block:
    """Commands of the page with the output that it shows behind them."""

    commands: tuple[str, ...]
    shown: str
    words: str
    line: int

    def part(self, printed: str) -> str:
        """What the page shows of an output."""
        lines = [line.rstrip() for line in printed.strip("\n").splitlines()]
        asked = re.search(r"(first|last)=(\d+)", self.words)
        if asked:
            count = int(asked[2])
            lines = lines[:count] if asked[1] == "first" else lines[-count:]
        return "".join(line + "\n" for line in lines)

    def text(self, output: str) -> str:
        """The block with this output."""
        return f"```console{self.words}\n" + "".join(f"$ {line}\n" for line in self.commands) + f"{output}```"


def blocks(text: str) -> list[Block]:
    """The command blocks of a page, in order."""
    found = []
    for match in _BLOCK.finditer(text):
        commands = tuple(command[2:].rstrip("\n") for command in _COMMAND.findall(match["body"]))
        shown = _COMMAND.sub("", match["body"])
        found.append(Block(commands, shown, match["words"], text.count("\n", 0, match.start()) + 1))
    return found


def alike(shown: str, printed: str) -> bool:
    """Whether two outputs say the same, whatever their numbers, times and the width of their tables."""
    return [_NUMBER.sub(" ", line).strip() for line in shown.splitlines()] == [
        _NUMBER.sub(" ", line).strip() for line in printed.splitlines()
    ]


def run(found: list[Block], folder: Path) -> list[str]:
    """Type the blocks' commands into one shell in `folder`; what each block printed.

    Raises:
        SystemExit: a command failed.
    """
    script = ["set -e", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for number, block in enumerate(found):
        script += [f"printf '{MARK}'", f"echo '{number + 1}/{len(found)}: {block.line}' >&3", *block.commands]
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": paths, "COLUMNS": str(WIDTH), "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    done = subprocess.run(
        ["bash", "-c", "exec 3>&2 2>&1\n" + "\n".join(script)], cwd=folder, env=environment, stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL, text=True, check=False,
    )  # fmt: skip
    printed = [part.replace(f"{folder}/", "") for part in done.stdout.split(MARK)[1:]]
    if done.returncode:
        sys.exit(f"{PAGE.name}:{found[len(printed) - 1].line}: exit code {done.returncode}\n{printed[-1]}")
    return printed


def difference(found: list[Block], printed: list[str]) -> str:
    """The first block that shows something else than what its commands print; empty where all agree."""
    for block, output in zip(found, map(str, printed), strict=True):
        part = block.part(output)
        if "any" in block.words.split():
            if not part.strip():
                return f"{PAGE.name}:{block.line}: nothing was printed"
        elif not alike(block.shown, part):
            return f"{PAGE.name}:{block.line}: shown is\n{block.shown}but printed was\n{part}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put what the commands print into the page")
    write = parser.parse_args().write
    text = PAGE.read_text(encoding="utf-8")
    found = blocks(text)
    with tempfile.TemporaryDirectory(prefix="tutorial-") as folder:
        printed = run(found, Path(folder))
    if write:
        outputs = iter(zip(found, printed, strict=True))

        def filled(_: re.Match[str]) -> str:
            block, output = next(outputs)
            return block.text(block.part(output))

        PAGE.write_text(_BLOCK.sub(filled, text), encoding="utf-8")
        return 0
    wrong = difference(found, printed)
    print(f"FAIL {wrong}" if wrong else f"PASS {PAGE.name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
