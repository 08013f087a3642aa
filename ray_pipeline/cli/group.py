"""Finds a verb by name, runs it, and turns what the user got wrong into one message and an exit code."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from ray_pipeline.errors import EXIT_FAILED, EXIT_USER_ERROR, StageFailed, UserError, did_you_mean, program

# verb -> (module, command). The order is the order of `--help`.
VERBS = {
    "run": ("run", "run"),
    "resume": ("resume", "resume"),
    "sweep": ("sweep", "sweep"),
    "plan": ("plan", "plan"),
    "status": ("status", "status"),
    "compare": ("compare", "compare"),
    "profile": ("profile", "profile"),
    "watch": ("watch", "watch"),
    "logs": ("logs", "logs"),
    "generate": ("generate", "generate"),
    "chat": ("chat", "chat"),
    "serve": ("serve", "serve"),
    "engine": ("engine", "engine"),
    "solve": ("solve", "solve"),
    "explain": ("explain", "explain"),
    "eval": ("eval", "evaluate"),
    "export": ("export", "export"),
    "convert": ("convert", "convert"),
    "teacher-topk": ("teacher_topk", "teacher_topk"),
    "inspect-batch": ("inspect_batch", "inspect_batch"),
    "config-show": ("config_show", "config_show"),
    "verify-parallel": ("verify_parallel", "verify_parallel"),
    "modal": ("modal", "modal_group"),
    "doctor": ("doctor", "doctor"),
    "test": ("smoke", "smoke_test"),
    "verify-cuda": ("doctor", "doctor"),
    "version": ("version", "version"),
}
HIDDEN = ("verify-cuda",)
# Verbs that older pipelines of this kind have, and what to use here.
RETIRED = {
    "run-rust": "there is one engine, on PyTorch; use `run` (with `--backend cpu` or `--backend cuda`).",
    "run-mlx": "there is one engine, on PyTorch; on a Mac use `run --backend cpu`.",
}
# What may be wrong with a path that somebody gave, or with the disk; anything else is a fault of ours.
PATH_ERRORS = frozenset(
    (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO)
)
SIGNAL_BASE = 128  # shells report a program that a signal ended as 128 + the signal's number
STOPPING = (signal.SIGTERM, signal.SIGHUP)  # of a scheduler, `kill`, or a terminal that closes; Ctrl-C is Python's own


class Interrupted(Exception):
    """Ctrl-C or a STOPPING signal in a verb that can say how to go on."""


@contextmanager
def stopping_signals() -> Iterator[list[int]]:
    """Make the first STOPPING signal what Ctrl-C is, which Ray lets through; further ones do not disturb the end.

    Gives the list that the signal's number is put into. Does nothing in a thread, or where a signal is ignored already
    (nohup) or has a handler of somebody else's.
    """

    def stop(number: int, _: FrameType | None) -> None:
        for other in ours:
            signal.signal(other, signal.SIG_IGN)
        came.append(number)
        raise KeyboardInterrupt

    came: list[int] = []
    main_thread = threading.current_thread() is threading.main_thread()
    ours = [number for number in STOPPING if main_thread and signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield came
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


class VerbGroup(click.Group):
    """Verbs as modules, imported when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs that `--help` shows."""
        return [name for name in VERBS if name not in HIDDEN]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of one verb."""
        if cmd_name not in VERBS:
            return None
        module, attribute = VERBS[cmd_name]
        return getattr(importlib.import_module(f"ray_pipeline.cli.{module}"), attribute)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a suggestion for an unknown verb."""
        if args and args[0] in RETIRED:
            raise UserError(f"{args[0]}: {RETIRED[args[0]]}")
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            hint = did_you_mean(args[0], VERBS)
            verbs = ", ".join(self.list_commands(ctx))
            raise UserError(f'"{args[0]}" is not a verb{hint}. The verbs are {verbs}.')
        return super().resolve_command(ctx, args)


@click.group(cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
def cli() -> None:
    """Train a DeepSeek-style reasoning model: data, pretraining, SFT, GRPO, distillation, export.

    Without options, `run` trains the tiny recipe on this machine.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = list(arguments) if arguments is not None else None
    return guarded(lambda: cli.main(args=args, prog_name=program(), standalone_mode=False))


def guarded(call: Callable[[], Any]) -> int:
    """What `call` returns as an exit code; what it ends in as one message and the code for it."""
    came: list[int] = []
    try:
        with stopping_signals() as came:
            code = call()
    except UserError as error:
        return _fail(str(error))
    except StageFailed as error:
        print(f"Failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 0
    except click.UsageError as error:
        where = f" See `{error.ctx.command_path} --help`." if error.ctx else ""
        return _fail(f"{error.format_message()}{where}")
    except click.ClickException as error:
        return _fail(error.format_message())
    except Interrupted as error:
        print(f"\n{error}", file=sys.stderr)
        return SIGNAL_BASE + (came or [signal.SIGINT])[0]
    except (click.Abort, KeyboardInterrupt):
        print("\nStopped.", file=sys.stderr)
        return SIGNAL_BASE + (came or [signal.SIGINT])[0]
    except BrokenPipeError:
        # The reader (head, less) has seen enough; what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in PATH_ERRORS or error.filename is None:
            raise
        path = str(error.filename)
        shown = path if len(path) <= 200 else f"{path[:100]}...{path[-60:]}"
        return _fail(f"{shown}: {error.strerror}. Give another path, or fix this one.")
    return _exit_code(code)


def _exit_code(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _fail(message: str) -> int:
    print(f"Error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR
