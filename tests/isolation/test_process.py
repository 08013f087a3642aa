"""A confined process while it runs: what it uses too much of, others beside it, and that nothing of it stays."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ray_pipeline.isolation import sandbox
from ray_pipeline.isolation.sandbox import run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


def test_a_huge_file_and_many_files_are_stopped():
    one = run_python("f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 20))")
    assert one.status == "error" and "File too large" in one.stderr
    many = "i = 0\nwhile True:\n    open(str(i), 'wb').write(bytes(1 << 20))\n    i += 1"
    assert run_python(many).status == "disk"
    empty = "i = 0\nwhile True:\n    open(str(i), 'w').close()\n    i += 1"
    assert run_python(empty).status == "disk"
    deleted = (
        "import os\nkept = []\nwhile True:\n    kept.append(open('a', 'wb'))\n    kept[-1].write(bytes(8 << 20))\n"
    )
    deleted += "    kept[-1].flush()\n    os.remove('a')"
    assert run_python(deleted).status == "disk"
    several = "import os\nfor i in range(200):\n    with open('a', 'wb') as f:\n        f.write(bytes(1 << 20))\n"
    several += "    os.remove('a')"
    assert run_python(several).status == "ok"


def test_a_bomb_of_threads_is_stopped():
    bomb = "import threading, time\nthreading.stack_size(32768)\nwhile True:\n"
    bomb += "    threading.Thread(target=time.sleep, args=(60,)).start()"
    assert run_python(bomb, memory_bytes=8 << 30).status == "threads"
    some = "import threading\nts = [threading.Thread(target=print) for _ in range(40)]\n[t.start() for t in ts]"
    assert run_python(some).status == "ok"


def test_a_program_that_prints_for_ever_is_stopped():
    result = run_python("while True: print('x' * 1000)")
    assert result.status == "output"
    assert 0 < len(result.stdout) <= sandbox.OUTPUT_BYTES + 1


def test_nothing_is_left_behind(tmp_path):
    # In a process of its own: nobody else opens or closes a file meanwhile.
    script = """
import os
from ray_pipeline.isolation.sandbox import run_python

before = sorted(os.listdir("/proc/self/fd"))
for source in ("print(1)", "import time; time.sleep(60)", "open('a', 'w').write('x')", "1/0"):
    run_python(source, wall_seconds=1)
assert sorted(os.listdir("/proc/self/fd")) == before, (before, sorted(os.listdir("/proc/self/fd")))
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert os.listdir(tmp_path) == []


def test_a_program_dies_with_its_parent(tmp_path):
    source = "import time\nprint('on', flush=True)\ntime.sleep(120)"
    script = f"from ray_pipeline.isolation.sandbox import run_python\nrun_python({source!r}, wall_seconds=120)"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    child = _child_of(parent.pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _alive(child):
        time.sleep(0.05)
    assert not _alive(child)


def _child_of(pid: int) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if found and b"isolation/child.py" in Path(f"/proc/{found[0]}/cmdline").read_bytes():
            time.sleep(0.5)
            return int(found[0])
        time.sleep(0.02)
    raise AssertionError("no child")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_programs_run_side_by_side_from_threads():
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda i: run_python(f"print({i} * 2)").stdout, range(8)))
    assert results == [f"{2 * i}\n" for i in range(8)]
    assert threading.active_count() < 20
