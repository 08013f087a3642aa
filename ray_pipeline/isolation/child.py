"""Runs one untrusted program: takes every right away from its own process, then executes the program in it.

Started by `sandbox.py` as a script of its own, outside of the package: the standard library alone, and nothing of the
parent's memory. The order of work comes as JSON through a file descriptor.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import types
from typing import Any

OUT_OF_MEMORY = 86
"""Exit code of a program that ended in MemoryError."""

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 1, 4, 38, 22, 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # Landlock's calls, numbered alike everywhere
# LANDLOCK_ACCESS_FS_*
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_FILE, _TRUNCATE = (1 << bit for bit in (1, 2, 3, 5, 8, 14))
# Rights that each version of Landlock knows: 13 in the first, then REFER, TRUNCATE, (sockets), IOCTL_DEV.
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_RIGHTS_NOW = 16
# Later versions govern TCP as well (bind and connect), and keep abstract sockets and signals inside.
_WITH_NETWORK, _WITH_SCOPES = 4, 6
_TCP, _SCOPES = 0b11, 0b11


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def landlock_version() -> int:
    """The kernel's Landlock, 0 where it has none."""
    return max(0, int(_libc().syscall(_CREATE_RULESET, None, 0, 1)))


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    if not os.path.exists(path):
        return
    if not os.path.isdir(path):
        rights &= _READ_FILE | _WRITE_FILE  # the kernel takes no other right for a file
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, place))
        _checked(libc.syscall(_ADD_RULE, ruleset, 1, rule, 0))
    finally:
        os.close(place)


def _ruleset(version: int, handled: int, *, network: bool) -> bytes:
    """struct landlock_ruleset_attr, as long as this version of the kernel knows it."""
    tcp = 0 if network else _TCP
    if version >= _WITH_SCOPES:
        return struct.pack("=QQQ", handled, tcp, _SCOPES)
    return struct.pack("=QQ", handled, tcp) if version >= _WITH_NETWORK else struct.pack("=Q", handled)


def restrict_files(readable: list[str], writable: str, *, network: bool) -> None:
    """Landlock: files below `readable` can be read, files in `writable` made and changed, all others not opened.

    Where the kernel's Landlock knows how, it also keeps signals and abstract sockets inside the process.
    """
    libc, version = _libc(), landlock_version()
    handled = (1 << _RIGHTS.get(version, _RIGHTS_NOW)) - 1
    attributes = _ruleset(version, handled, network=network)
    ruleset = _checked(libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0))
    reading = _READ_FILE | _READ_DIR
    for path in readable:
        _allow(libc, ruleset, path, reading)
    _allow(libc, ruleset, "/dev/null", _READ_FILE | _WRITE_FILE)
    _allow(libc, ruleset, writable, (reading | _WRITE_FILE | _REMOVE_FILE | _MAKE_FILE | _TRUNCATE) & handled)
    _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
        # A second more of hard CPU limit: the soft one says by its signal what it was, but the signal can be ignored.
        spare = 1 if name == "RLIMIT_CPU" else 0
        resource.setrlimit(kind, (min(value, most), min(value + spare, most)))


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Root keeps its files but may no longer raise limits, mount, or send signals to others."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))  # _LINUX_CAPABILITY_VERSION_3, itself
    _checked(libc.capset(header, ctypes.create_string_buffer(24)))


def _set_filter(libc: ctypes.CDLL, instructions: list[list[int]]) -> None:
    own = os.getpid()
    packed = b"".join(struct.pack("=HBBI", *i[:3], own if i[3] < 0 else i[3]) for i in instructions)
    program = _Filter(len(instructions), packed)
    _checked(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program)))


def confine(order: dict[str, Any]) -> None:
    """Give up rights, the ones needed to give up the others last.

    Raises:
        OSError: the kernel does not know one of them.
    """
    libc = _libc()
    _checked(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL))
    if os.getppid() != order["parent"]:
        os._exit(1)  # the parent died before the line above
    _limit(order["limits"])
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _drop_capabilities(libc)
    if order["landlock"]:
        restrict_files(order["readable"], order["writable"], network=order["network"])
    else:
        # /proc is open to reading then: at least no other program of the user may look into this one's memory.
        _checked(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))
    _set_filter(libc, order["filter"])


def execute(source: str, channel: list[int]) -> None:
    """Run the program as `__main__`; its traceback starts with its own lines.

    Args:
        channel: file descriptors that it finds under this name, if there are any.
    """
    main = types.ModuleType("__main__")
    if channel:
        main.__dict__["channel"] = tuple(channel)
    sys.modules["__main__"] = main
    sys.argv = ["program"]
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), main.__dict__)
    except MemoryError:
        sys.stderr.write("MemoryError\n")
        sys.exit(OUT_OF_MEMORY)
    except Exception as error:  # noqa: BLE001  it may raise anything
        import traceback

        inner = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, inner)
        sys.exit(1)


def _main() -> None:
    order_file, ready = int(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(order_file, encoding="utf-8") as file:
        order = json.load(file)
    confine(order)
    os.write(ready, b"1")  # from here on, whatever happens is the program's doing
    os.close(ready)
    for name, source in order["modules"].items():
        sys.modules[name] = types.ModuleType(name)
        exec(compile(source, name, "exec", dont_inherit=True), sys.modules[name].__dict__)
    execute(order["source"], order["channel"])


if __name__ == "__main__":
    _main()
