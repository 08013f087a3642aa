"""What `chat` shows and asks: a line to type, an answer as it is written, thinking dimmed or hidden."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from ray_pipeline.reasoning.stream import ThinkStream

PROMPT = "> "


class Screen:
    """A terminal with history and editing; plain lines where input or output is a file or a pipe."""

    def __init__(self, *, hide_thinking: bool = False):
        self.console = Console(highlight=False, soft_wrap=True)
        self.hide_thinking = hide_thinking
        self._thinking = ""  # of the last answer
        self._read = self._reader()

    def _reader(self) -> Callable[[], str]:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return lambda: input()
        from prompt_toolkit import PromptSession

        session: PromptSession[str] = PromptSession()
        return lambda: session.prompt(PROMPT)

    def ask(self) -> str | None:
        """The next line; None at its end (Ctrl-D)."""
        while True:
            try:
                return self._read()
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                self.note("/quit or Ctrl-D ends the chat.")

    def note(self, text: str) -> None:
        """Say something that the model did not."""
        self.console.print(Text(text, style="cyan"))

    def warn(self, text: str) -> None:
        """Say what went wrong."""
        self.console.print(Text(text, style="yellow"))

    def turn_thinking(self) -> None:
        """Show thinking from now on, and that of the last answer; or hide it."""
        self.hide_thinking = not self.hide_thinking
        self.note(f"Thinking is {'hidden' if self.hide_thinking else 'shown'}.")
        if not self.hide_thinking and self._thinking.strip():
            self.console.print(Text(self._thinking.strip(), style="dim"))

    @contextmanager
    def answering(self) -> Iterator[Callable[[str], None]]:
        """Gives a function that prints the pieces of an answer; a line that was begun is ended in any case."""
        stream, self._thinking, begun = ThinkStream(), "", False

        def show(piece: str, *, last: bool = False) -> None:
            nonlocal begun
            begun = begun or bool(piece)
            for event in stream.finish() if last else stream.feed(piece):
                if event.kind in ("open", "thinking"):
                    self._thinking += event.text if event.kind == "thinking" else ""
                    if not self.hide_thinking:
                        self._print(event.text, "dim")
                elif event.kind == "close":
                    self._print(self._folded() if self.hide_thinking else event.text, "dim")
                else:
                    self._print(event.text, "")

        try:
            yield show
        finally:
            show("", last=True)
            if stream.state == "thinking" and self.hide_thinking:
                self._print(self._folded(), "dim")
            if begun:
                self.console.print()

    def _folded(self) -> str:
        return f"(thought for {len(self._thinking.split())} words; /think shows them)\n"

    def _print(self, text: str, style: str) -> None:
        self.console.print(Text(text, style=style), end="")
