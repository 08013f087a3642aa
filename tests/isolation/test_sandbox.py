"""Whatever a program tries, it is contained, it ends in time, and what it did is told."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time

import pytest

from ray_pipeline.errors import UserError
from ray_pipeline.isolation import child as sandbox_child
from ray_pipeline.isolation import filter as sandbox_filter
from ray_pipeline.isolation import sandbox
from ray_pipeline.isolation.sandbox import check_sandbox, run_judged, run_python, sandbox_problem

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


def test_a_program_computes_reads_and_prints():
    result = run_python("import sys\nprint(sys.stdin.read()[::-1])\nprint('é', file=sys.stderr)", stdin="añb")
    assert (result.status, result.exit_code, result.stdout, result.stderr) == ("ok", 0, "bña\n", "é\n")


def test_a_program_is_the_main_module_and_may_import_and_use_threads():
    source = """
import fractions, json, pickle, random, threading
class A:
    pass
assert __name__ == "__main__" and type(pickle.loads(pickle.dumps(A()))) is A
thread = threading.Thread(target=lambda: print(fractions.Fraction(1, 3)))
thread.start()
thread.join()
"""
    result = run_python(source)
    assert (result.status, result.stdout) == ("ok", "1/3\n"), result


def test_a_program_that_raises_is_an_error_with_its_own_traceback_alone():
    result = run_python("def f():\n    return 1 / 0\nf()")
    assert (result.status, result.exit_code) == ("error", 1)
    assert "ZeroDivisionError" in result.stderr and 'File "<program>", line 2' in result.stderr
    assert "sandbox" not in result.stderr
    assert run_python("raise SystemExit(3)").exit_code == 3
    assert run_python("this is no program").status == "error"


def test_a_program_that_hangs_is_killed():
    started = time.monotonic()
    assert run_python("import time\ntime.sleep(60)", wall_seconds=0.5).status == "timeout"
    assert run_python("while True: pass", cpu_seconds=1, wall_seconds=30).status == "timeout"
    # The soft limit's signal can be ignored; the hard one's cannot.
    deaf = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run_python(deaf, cpu_seconds=1, wall_seconds=30).status == "timeout"
    assert run_python("import os, time\nos.close(1); os.close(2); time.sleep(60)", wall_seconds=1).status == "timeout"
    assert time.monotonic() - started < 30


def test_ten_gigabytes_are_refused():
    result = run_python("x = bytearray(10 << 30)")
    assert (result.status, result.stderr) == ("memory", "MemoryError\n")
    assert run_python("x = []\nwhile True: x.append(bytearray(1 << 20))", memory_bytes=200 << 20).status == "memory"
    assert run_python("print(len(bytearray(64 << 20)))").status == "ok"


@pytest.mark.parametrize(
    "attempt",
    [
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "subprocess.run(['true'])",
        "os.kill(os.getppid(), 9)",
        "os.kill(0, 9)",
        "os.killpg(os.getpgrp(), 9)",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.sched_setaffinity(os.getppid(), {0})",
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "socket.create_connection(('127.0.0.1', 80))",
        "os.memfd_create('x')",
        "os.chmod('.', 0o777)",
        "os.utime('.')",
        "fcntl.fcntl(0, 8, os.getppid())",
        "fcntl.fcntl(0, 10, 9)",
        "fcntl.ioctl(0, 0x8901, struct.pack('i', os.getppid()))",
        "fcntl.ioctl(socket.socketpair()[0], 0x8902, struct.pack('i', os.getppid()))",
        "socket.socketpair(type=socket.SOCK_DGRAM)",
        "socket.socketpair()[0].sendto(b'x', '/tmp/x')",
        "socket.socketpair()[0].sendmsg([b'x'])",
        "os.open('.', os.O_TMPFILE | os.O_RDWR)",
    ],
)
def test_other_processes_and_the_network_are_out_of_reach(attempt):
    result = run_python(f"import fcntl, os, resource, socket, struct, subprocess\n{attempt}\nprint('done')")
    assert result.status == "error" and "PermissionError" in result.stderr, result


def test_a_fork_bomb_starts_nothing():
    source = """
import os
failed = 0
for _ in range(2000):
    try:
        os.fork()
    except OSError:
        failed += 1
print(failed)
"""
    assert run_python(source).stdout == "2000\n"


def test_what_was_taken_away_cannot_be_taken_back():
    source = """
import ctypes, os, resource
libc = ctypes.CDLL(None, use_errno=True)
def refused(*call):
    return libc.syscall(*call) < 0
ADDRESS_SPACE = resource.getrlimit(resource.RLIMIT_AS)
try:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 50, 1 << 50))
    print("limit raised")
except (ValueError, OSError):
    pass
assert resource.getrlimit(resource.RLIMIT_AS) == ADDRESS_SPACE
assert libc.prctl(1, 0) < 0             # the signal at the parent's death
assert libc.unshare(0x10000000) < 0     # a namespace in which it is root
assert libc.mount(b"none", b".", b"tmpfs", 0, 0) < 0
assert libc.setuid(0) < 0 or os.getuid() == 0
print("held", flush=True)
"""
    assert run_python(source).stdout == "held\n"


def test_sockets_are_allowed_only_where_asked_for():
    source = "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\nprint('bound')"
    assert run_python(source, network=True).stdout == "bound\n"
    assert run_python(source).status == "error"


def test_files_are_read_and_written_in_the_working_folder_alone(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s")
    source = f"""
import os
open("mine", "w").write("kept")
assert os.listdir(".") == ["mine"] and open("mine").read() == "kept"
secret, new = {str(secret)!r}, {str(tmp_path / "new")!r}
for path, mode in ((secret, "r"), (secret, "w"), (new, "w"), ("/etc/hostname", "a")):
    try:
        open(path, mode)
        print("opened", path, mode)
    except OSError as error:
        assert error.errno in (13, 2, 30), error
for change in (os.remove, os.truncate):
    try:
        change(secret, *([0] if change is os.truncate else []))
        print("changed")
    except OSError:
        pass
try:
    print(open(f"/proc/{{os.getppid()}}/environ").read())
except OSError:
    pass
"""
    result = run_python(source)
    if sandbox_child.landlock_version():
        assert (result.status, result.stdout) == ("ok", ""), result
    assert secret.read_text() == "s" and os.listdir(tmp_path) == ["secret"]


def test_a_kernel_without_landlock_runs_programs_only_where_that_is_allowed(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox_child, "landlock_version", lambda: 0)
    for refused in (check_sandbox, lambda: run_python(f"open({str(tmp_path / 'new')!r}, 'w')")):
        with pytest.raises(UserError, match=r"no Landlock\).*grpo.scoring.without_landlock=true"):
            refused()
    assert "no Landlock" in str(sandbox_problem()) and sandbox_problem(without_landlock=True) is None
    assert run_python("print(1)", without_landlock=True).stdout == "1\n"
    assert run_judged("f = int", "assert f('3') == 3", seconds=10, without_landlock=True)
    assert os.listdir(tmp_path) == []


def test_without_landlock_no_other_process_can_be_looked_into(monkeypatch):
    monkeypatch.setattr(sandbox_child, "landlock_version", lambda: 0)
    looks = (
        "def f(x):\n    import os\n    found = []\n    for pid in os.listdir('/proc'):\n        if pid.isdecimal():\n"
    )
    looks += "            try:\n                command = open(f'/proc/{pid}/cmdline').read()\n"
    looks += "                if 'isolation/child.py' in command and int(pid) != os.getpid():\n"
    looks += "                    found.append(pid)\n                    open(f'/proc/{pid}/mem', 'rb')\n"
    looks += "                    return 'opened'\n            except OSError:\n                pass\n"
    looks += "    return len(found)"
    assert run_judged(looks, "assert isinstance(f(0), int) and f(0) > 0", seconds=10, without_landlock=True)


def test_without_landlock_no_file_can_be_changed_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox_child, "landlock_version", lambda: 0)
    (tmp_path / "file").write_text("s")
    source = f"""
import os
os.chdir({str(tmp_path)!r})
attempts = [lambda: open("file", "w"), lambda: open("file", "r+"), lambda: open("new", "x"), lambda: os.remove("file"),
            lambda: os.rename("file", "other"), lambda: os.truncate("file", 0), lambda: os.mkdir("d"),
            lambda: os.symlink("file", "l"), lambda: os.link("file", "l"), lambda: os.open("file", os.O_RDWR)]
for attempt in attempts:
    try:
        attempt()
        print("changed")
    except PermissionError:
        pass
print(open("file").read())
"""
    assert run_python(source, without_landlock=True).stdout == "s\n"
    assert os.listdir(tmp_path) == ["file"]


def test_event_loops_and_temporary_files_work():
    loop = "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 3\nprint(asyncio.run(f()))"
    assert run_python(loop).stdout == "3\n"
    made = "import tempfile\nwith tempfile.TemporaryFile() as f:\n    f.write(b'x')\n"
    made += "with tempfile.NamedTemporaryFile() as f:\n"
    made += "    f.write(b'x')\nprint('made')"
    assert run_python(made).stdout == "made\n"


@pytest.mark.skipif(sandbox_child.landlock_version() < 6, reason="this kernel's Landlock has no scopes")
def test_signals_and_abstract_sockets_stay_inside_even_with_a_network():
    with socket.socket(socket.AF_UNIX) as listening:
        name = f"\0sandbox-test-{os.getpid()}"
        listening.bind(name)
        listening.listen()
        source = f"import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})\nprint('reached')"
        result = run_python(source, network=True)
    assert result.status == "error" and "PermissionError" in result.stderr


def test_a_crash_is_told():
    assert run_python("import os\nos.abort()").status == "killed"
    assert run_python("import ctypes\nctypes.string_at(0)").status == "killed"


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hidden")
    result = run_python("import os\nprint(sorted(os.environ))")
    assert "HF_TOKEN" not in result.stdout and "PATH'" not in result.stdout


def test_sets_are_printed_alike_every_time():
    source = "print({'a', 'b', 'c', 'd', 'e', 'f'})"
    assert len({run_python(source).stdout for _ in range(4)}) == 1


def test_a_machine_that_cannot_confine_runs_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(UserError, match=r"cannot be confined on this machine \(linux on riscv64\), so none is run"):
        check_sandbox()
    monkeypatch.undo()
    proof = tmp_path / "ran"
    broken = [sandbox_filter.Instruction(0xFFFF, 0, 0, 0)]  # a kernel that takes no filter
    monkeypatch.setattr(sandbox, "filter_program", lambda *_, **__: broken)
    with pytest.raises(UserError, match=f"{os.strerror(errno.EINVAL)}.*Leave out the reward"):
        run_python(f"open({str(proof)!r}, 'w')")
    assert not proof.exists()
