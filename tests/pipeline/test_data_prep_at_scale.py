"""Half a gigabyte of text goes through DATA_PREP in flat memory, and killed at random moments to the same bytes."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.pipeline.driving import TOY, finish, kill, start

pytestmark = pytest.mark.slow
LIMIT = 3 << 29  # bytes in all processes together: 1.5 GiB
KILLS = 5


def documents(seed: int, size: int) -> Iterator[dict[str, str]]:
    """Records of about `size` bytes in all; words as frequent as words are (Zipf), no two documents the same."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(30_000)]
    weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(words))))
    for number in itertools.count():
        text = f"{number}: " + " ".join(rng.choices(words, cum_weights=weights, k=rng.randint(20, 400)))
        size -= len(text) + 13
        if size < 0:
            return
        yield {"text": text}


def memory(root: psutil.Process) -> int:
    """Bytes of a process and all below it; what several share (the object store, libraries) is counted once."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


class Watch(threading.Thread):
    """The largest memory of a process and all below it, while it runs."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.root, self.peak = psutil.Process(pid), 0
        self.start()

    def run(self) -> None:
        while self.root.is_running() and self.root.status() != psutil.STATUS_ZOMBIE:
            self.peak = max(self.peak, memory(self.root))
            time.sleep(0.3)


def command(data: Path) -> tuple[str, ...]:
    settings = ("--set", "data.tokens_per_shard=4000000")
    return ("run", "--config", str(TOY), "--run-name", "big", "--until", "data_prep", "--data", str(data), *settings)


def prepared(folder: Path) -> dict[str, dict]:
    """SHA-256 of every file that DATA_PREP made."""
    (path,) = (folder / "big").glob("data_prep-*/manifest.json")
    return json.loads(path.read_text())["files"]


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("big") / "big.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in documents(0, 500_000_000))
    return path


@pytest.fixture(scope="module")
def unbroken(big, tmp_path_factory) -> tuple[dict[str, dict], float, int]:
    """(files, seconds, peak memory) of a run that nothing disturbs."""
    folder, begun = tmp_path_factory.mktemp("unbroken"), time.monotonic()
    process = start(*command(big), folder=folder)
    watch = Watch(process.pid)
    process.wait(timeout=3000)
    assert finish(process, folder) == 0
    return prepared(folder), time.monotonic() - begun, watch.peak


def test_memory_stays_flat(unbroken):
    _, seconds, peak = unbroken
    print(f"\n500 MB of jsonl: {seconds:.0f} s, {peak / 2**20:.0f} MiB in all processes")
    assert 2**28 < peak < LIMIT


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(unbroken, big, tmp_path):
    files, seconds, _ = unbroken
    rng, moments = random.Random(time.time_ns()), []
    for _ in range(KILLS):
        process = start(*command(big), folder=tmp_path)
        moments.append(round(rng.uniform(10, max(20.0, seconds / 6)), 1))
        with suppress(subprocess.TimeoutExpired):
            process.wait(moments[-1])
        if process.poll() is None:
            kill(process)
    process = start(*command(big), folder=tmp_path)
    process.wait(timeout=3000)
    assert finish(process, tmp_path) == 0, moments
    assert prepared(tmp_path) == files, moments


def test_a_json_array_of_50_mb_is_prepared(tmp_path):
    path = tmp_path / "array.json"
    path.write_text(json.dumps(list(documents(1, 50_000_000)), indent=1))
    process = start(*command(path), folder=tmp_path / "run")
    watch = Watch(process.pid)
    process.wait(timeout=900)
    assert finish(process, tmp_path / "run") == 0
    print(f"\n50 MB array: {watch.peak / 2**20:.0f} MiB in all processes")
    assert watch.peak < LIMIT
