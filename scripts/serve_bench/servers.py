"""Servers in processes of their own. All but the one that is asked are halted, so that none takes another's time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

START_SECONDS = 600.0


class Server:
    """One of them.

    Args:
        model: what it calls the model. command: with `{port}` in it.
    """

    def __init__(self, name: str, model: str, command: Sequence[str], log: Path, threads: int):
        self.name, self.model = name, model
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address, self.log = f"http://127.0.0.1:{port}", log
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [word.format(port=port) for word in command], stdout=out, stderr=out, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def wait(self) -> None:
        """Until it answers.

        Raises:
            RuntimeError: it ended, or does not; the message ends with what it wrote.
        """
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if httpx.get(f"{self.address}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        raise RuntimeError(f"{self.name} does not serve:\n{self.log.read_text()[-3000:]}")

    def halt(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def ours(engine: str, model: Path, slots: int, threads: int, *more: str) -> list[str]:
    """The verb's command line."""
    return [
        sys.executable, "-m", "ray_pipeline.cli", "serve", str(model), "--engine", engine, "--port", "{port}",
        "--slots", str(slots), "--threads", str(threads), *more,
    ]  # fmt: skip


def theirs(model: Path, *more: str) -> list[str]:
    """`transformers serve`."""
    program = Path(sys.executable).parent / "transformers"
    return [str(program), "serve", str(model), "--port", "{port}", "--host", "127.0.0.1", "--device", "cpu", *more]
