"""Runs a program for as long as the process that asked for it lives, and ends all that the program started with it.

A script of its own (`engine_process` starts it), in a session of its own: the standard library alone. Standard input is
a pipe that nobody writes to; it ends when the parent does, however the parent ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = 10.0  # to put its shared memory and sockets away


def _end_all() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)  # this process too


def _wait(program: subprocess.Popen[bytes]) -> None:
    print(f"[ended with exit code {program.wait()}]", flush=True)
    _end_all()


def main() -> None:
    """Run the words of the command line."""
    program = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    waiting = threading.Thread(target=_wait, args=(program,), daemon=True)
    waiting.start()
    while os.read(0, 4096):
        pass
    program.terminate()
    waiting.join(GRACE_SECONDS)
    _end_all()


if __name__ == "__main__":
    main()
