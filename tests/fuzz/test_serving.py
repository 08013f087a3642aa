"""Thousands of good and bad requests at once: none is answered with a 5xx or another's text, and memory comes back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random

import httpx
import psutil
import pytest

from tests.fuzz.made_requests import DOOR, NATIVE, QUESTIONS, Made, good_body, make
from tests.serving.made_servers import save_model

pytestmark = pytest.mark.slow

CLIENTS = 24
SHARE = float(os.environ.get("FUZZ_SHARE", "1"))  # of the requests, for a quick look
NO_ANSWER = 599  # stands for a connection that broke


@contextmanager
def served(engine: str, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The verb in a process of its own."""
    model = save_model(folder / "hf")
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ray_pipeline.cli", "serve", str(model), "--engine", engine, "--port", "0"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"chat page +(\S+)/", line):
                break
        else:
            pytest.fail((folder / "log").read_text()[-3000:])
        yield found[1], psutil.Process(process.pid)
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
    finally:
        process.terminate()
        process.wait(30)


def send(client: httpx.Client, made: Made) -> tuple[int, str]:
    """Status, and the text of a good request's answer; `NO_ANSWER` and the error where the connection broke."""
    began = time.monotonic()
    try:
        with client.stream(made.method, made.path, content=made.body, headers=made.headers) as answer:
            if made.leaves:
                next(answer.iter_bytes(), None)
                return answer.status_code, ""
            content = answer.read()
    except httpx.TransportError as error:
        return NO_ANSWER, f"{error!r} after {time.monotonic() - began:.1f} s"
    return answer.status_code, text_of(content) if made.question is not None and answer.status_code == 200 else ""


def text_of(content: bytes) -> str:
    """Thinking and answer of a chat completion, streamed or whole."""
    if content.startswith(b"{"):
        said = [json.loads(content)["choices"][0]["message"]]
    else:
        lines = [line for line in content.decode().split("\n") if line.startswith("data:") and "[DONE]" not in line]
        said = [choice["delta"] for line in lines for choice in json.loads(line[5:])["choices"]]
    fields = ("reasoning_content", "content")
    return "|".join("".join(one.get(name) or "" for one in said) for name in fields)


def attack(address: str, count: int, paths: tuple[str, ...], seed: int) -> list[tuple[Made, int, str]]:
    """Send `count` requests by `CLIENTS` clients at once."""
    made = [make(Random(f"{seed} {i}"), paths) for i in range(count)]

    def work(k: int) -> list[tuple[Made, int, str]]:
        out = []
        with httpx.Client(base_url=address, timeout=120, trust_env=False) as client:
            for one in made[k::CLIENTS]:
                out.append((one, *send(client, one)))
        return out

    with ThreadPoolExecutor(CLIENTS) as pool:
        return [one for part in pool.map(work, range(CLIENTS)) for one in part]


def resting(address: str, server: psutil.Process) -> tuple[int, int]:
    """Resident bytes and open files when nothing is written any more."""
    for _ in range(600):
        if httpx.get(f"{address}/health", trust_env=False).json().get("writing", 0) == 0:
            break
        time.sleep(0.1)
    time.sleep(3)
    return server.memory_info().rss, server.num_fds()


@pytest.mark.parametrize(
    ("engine", "count", "paths"),
    [("native", 10_000, NATIVE), ("llamacpp", 1_000, DOOR)],
    ids=["native", "llamacpp"],
)
def test_a_flood_of_good_and_bad_requests(tmp_path, engine, count, paths):
    count = int(count * SHARE)
    if engine == "llamacpp":
        pytest.importorskip("xllamacpp")
    with served(engine, tmp_path) as (address, server):
        with httpx.Client(base_url=address, timeout=120, trust_env=False) as client:
            alone = {
                q: text_of(client.post(NATIVE[0], json=good_body(NATIVE[0], q)).raise_for_status().content)
                for q in QUESTIONS
            }
        assert len(set(alone.values())) > len(QUESTIONS) // 2, "answers of this test's model are to differ"
        attack(address, max(200, count // 10), paths, seed=1)
        memory, files = resting(address, server)
        answers = attack(address, count, paths, seed=2)
        after, files_after = resting(address, server)
        print(engine, Counter(status for _, status, _ in answers), f"{memory >> 20} MiB, then {after >> 20} MiB")

        failed = [(m.method, m.path, (m.body or b"")[:300], code, text) for m, code, text in answers if code >= 500]
        assert failed == []
        for made, status, text in answers:
            if made.question is None:
                continue
            assert status == 200
            others = {answer for question, answer in alone.items() if question != made.question}
            # llama.cpp's rounding depends on what is written beside: another token may win, never another's text.
            assert text == alone[made.question] or (engine == "llamacpp" and text not in others)
        assert after <= memory * 1.05, f"{memory} bytes before, {after} after"
        assert files_after <= files + 4
        errors = [line for line in (tmp_path / "log").read_text().splitlines() if "Traceback" in line]
        assert errors == []
