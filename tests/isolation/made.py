"""Functions that tests call in processes of their own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

PREPARED: list[int] = []


def prepare_process():
    PREPARED.append(os.getpid())


def prepared():
    return PREPARED.count(os.getpid())


def double(value):
    return 2 * value


def hangs(seconds):
    time.sleep(seconds)


def hangs_deaf(seconds):
    """Ignores what asks it to end, and leaves a process behind that hangs as well."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
    with open(os.environ["MADE_PIDS"], "a") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    time.sleep(seconds)


def raises(text):
    raise ValueError(text)


def exits(code):
    os._exit(code)


def crashes(number):
    os.kill(os.getpid(), number)


def allocates(gib):
    return len(bytearray(gib << 30))


def forks():
    return "child" if os.fork() == 0 else "parent"


def leaves():
    raise SystemExit(1)


def prints(text):
    print(text)
    os.write(1, b"raw\n")
    return input.__name__


def draws():
    return random.random()


def process():
    return os.getpid()


def strange():
    return object()


def limited(*, timeout_seconds):
    return timeout_seconds
