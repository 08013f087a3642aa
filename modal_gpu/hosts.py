"""Several containers that train together: one Ray over them, and one run folder of which each has its own copy.

The volume is no shared disk: what a container writes others see after its commit and their reload. So a training stage
is a piece of its own, which begins with a reload; the leading host writes everything but the shards of other hosts'
ranks, and these commit their shards under the name that the leader gave the checkpoint.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import modal

from modal_gpu.job import Job
from ray_pipeline.errors import StageFailed
from ray_pipeline.records.integrity import manifest_files
from ray_pipeline.settings.run_folder import CHECKPOINTS, MANIFEST

RAY_PORT, NEWS_PORT = 6379, 6380
WAIT = 300.0  # seconds that the hosts wait for one another: a fresh one reads its image while it starts Ray
TRIES = 3  # of the leader, whose Ray may not come up at once
BEAT = 1.0


@contextmanager
def joined_hosts(job: Job, commit: Callable[[], None]) -> Iterator[bool]:
    """Join the containers of a cluster; True on the host that leads. Does nothing for one container alone.

    On the others the block is entered after the leader has ended.
    """
    if job.hosts == 1 or not in_cluster():
        yield True
        return
    cluster = modal.Cluster.from_context()
    # IPv4: Ray joins nodes by these addresses, and does not take Modal's IPv6 ones everywhere.
    addresses, rank = list(cluster.container_ips(family="ipv4")), cluster.container_rank()
    if rank > 0:
        follow(Path(job.runs_dir, job.run), addresses[0], addresses[rank], commit)
        yield False
        return
    _start_head(addresses[0])
    os.environ["RAY_ADDRESS"] = f"{addresses[0]}:{RAY_PORT}"
    news = News(Path(job.runs_dir, job.run), addresses[0])
    try:
        _wait_for_nodes(len(addresses))
        with news:
            yield True
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        _ray("stop", "--force")


def in_cluster() -> bool:
    """Whether this container is one of several."""
    try:
        return len(modal.Cluster.from_context().container_ips(family="ipv4")) > 1
    except modal.exception.Error:
        return False


def _ray(*words: str) -> None:
    found = subprocess.run(
        [str(Path(sys.executable).with_name("ray")), *words], capture_output=True, text=True, check=False
    )
    if found.returncode:
        last = (found.stderr.strip() or found.stdout.strip()).splitlines()[-1:] or ["no reason given"]
        raise StageFailed(f"ray {words[0]} failed on host {socket.gethostname()}: {last[0]}", found.stderr)


def _start_head(address: str) -> None:
    for left in reversed(range(TRIES)):
        try:
            _ray("start", "--head", f"--node-ip-address={address}", f"--port={RAY_PORT}", "--include-dashboard=false")
            return
        except StageFailed:
            if not left:
                raise
            _ray("stop", "--force")


def _wait_for_nodes(number: int) -> None:
    """Until every host has joined.

    Raises:
        StageFailed: one did not.
    """
    from ray_pipeline.launch.cluster import named_cluster

    until = time.monotonic() + WAIT
    while time.monotonic() < until:
        found = named_cluster()
        if found is not None and len(found.nodes) >= number:
            return
        time.sleep(1.0)
    raise StageFailed(f"of {number} hosts not all joined Ray within {WAIT:.0f} s.")


class News:
    """On the leading host: answers whoever asks with the names of the whole checkpoints, until the block ends."""

    def __init__(self, run_dir: Path, address: str):
        self.run_dir = run_dir
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((address, NEWS_PORT))
        self._socket.listen()
        self._thread = threading.Thread(target=self._answer, name="news", daemon=True)

    def __enter__(self) -> News:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(2 * BEAT)  # the others hear of the last checkpoint
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                names = [path.relative_to(self.run_dir).as_posix() for path in whole_checkpoints(self.run_dir)]
                connection.sendall("\n".join([*names, "."]).encode())


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """Those that carry their name."""
    return sorted(path for path in run_dir.glob(f"*/{CHECKPOINTS}/step_*") if path.is_dir())


def ask(address: str) -> list[str] | None:
    """The leader's checkpoints; None where nobody answers."""
    try:
        with socket.create_connection((address, NEWS_PORT), timeout=5.0) as connection:
            text = b""
            while chunk := connection.recv(65536):
                text += chunk
    except OSError:
        return None
    lines = text.decode().split("\n")
    return lines[:-1] if lines[-1] == "." else None


def follow(run_dir: Path, leader: str, own: str, commit: Callable[[], None]) -> None:
    """On a host that does not lead: join Ray, and make its ranks' shards last, until the leader ends."""
    until, heard, silent = time.monotonic() + WAIT, False, 0
    while True:
        try:
            _ray("start", f"--address={leader}:{RAY_PORT}", f"--node-ip-address={own}")
            break
        except StageFailed as error:
            if time.monotonic() > until:
                raise StageFailed(
                    f"host {own} could not join Ray at {leader} within {WAIT:.0f} s ({error}).", error.details
                ) from None
            time.sleep(2.0)
    try:
        while silent < 5 and (heard or time.monotonic() < until + WAIT):
            time.sleep(BEAT)
            names = ask(leader)
            silent = silent + 1 if names is None and heard else 0
            if names is not None:
                heard = True
                if name_shards(run_dir, names):
                    commit()
    finally:
        _ray("stop", "--force")


def name_shards(run_dir: Path, names: list[str]) -> bool:
    """Give this host's shards the names that the leader gave; drop those that it dropped. Whether anything changed."""
    changed, known = False, set(names)
    for aside in run_dir.glob(f"*/{CHECKPOINTS}/.step_*.partial"):
        final = aside.with_name(aside.name.removeprefix(".").removesuffix(".partial"))
        if final.relative_to(run_dir).as_posix() in known:
            final.mkdir(exist_ok=True)
            for shard in aside.iterdir():
                shard.replace(final / shard.name)
            shutil.rmtree(aside)
            changed = True
    for path in whole_checkpoints(run_dir):
        if path.relative_to(run_dir).as_posix() not in known:
            shutil.rmtree(path)
            changed = True
    return changed


def tidy_checkpoints(run_dir: Path, hosts: int) -> None:
    """Delete checkpoints of which a host's shards did not reach the volume before it was taken away."""
    if hosts == 1:
        return
    for path in whole_checkpoints(run_dir):
        if (missing := _missing_file(path)) is not None:
            print(f"{path.name}: {missing} did not reach the volume; the checkpoint is deleted", flush=True)
            shutil.rmtree(path)


def _missing_file(checkpoint: Path) -> str | None:
    """The first file of its manifest that is not there whole; sums are checked where it is loaded."""
    try:
        files = manifest_files(checkpoint)
    except ValueError:
        return MANIFEST
    for name, (_, size) in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return name
    return None
