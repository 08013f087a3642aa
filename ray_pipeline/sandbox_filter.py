"""Which system calls an untrusted program is refused, as a seccomp filter (classic BPF). Data alone: nothing is called.

A seccomp filter needs no rights to set, holds in containers where namespaces may not be made, is passed on to every
child, and cannot be taken off again. What it lets through is bounded by rlimits and Landlock (`sandbox_child`).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import NamedTuple

Table = dict[str, tuple[int, int | None]]
"""Number of each call: (x86_64, aarch64); None where aarch64 has no such call."""

NETWORK: Table = {
    # A pair of connected sockets (socketpair) has no address, so it leads nowhere and is allowed.
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242),
}  # fmt: skip
FORBIDDEN: Table = {
    # Other programs. Threads are made by clone, see `_rules`.
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # Other processes of the same user: the trainer above all.
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "move_pages": (279, 239), "migrate_pages": (256, 238),
    "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # Memory that the limit of address space does not see.
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # Ways around this filter: io_uring opens sockets and files by itself, a user namespace gives capabilities back.
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "unshare": (272, 97),
    "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "open_by_handle_at": (304, 265),
    "mount": (165, 40), "open_tree": (428, 428), "fsopen": (430, 430), "personality": (135, 92),
    # Changes to files that Landlock does not govern.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "utimensat": (280, 88), "futimesat": (261, None), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "removexattrat": (466, 466), "file_setattr": (469, 469), "truncate": (76, 45),
}  # fmt: skip
# Without Landlock no file may be changed at all.
FILE_CHANGES: Table = {
    "creat": (85, None), "mkdir": (83, None), "mkdirat": (258, 34), "unlink": (87, None), "unlinkat": (263, 35),
    "rmdir": (84, None), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None),
    "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None), "mknodat": (259, 33),
}  # fmt: skip
CLONE, CLONE3, PRCTL, PRLIMIT = (56, 220), (435, 435), (157, 167), (302, 261)
KILL, TGKILL, TKILL = (62, 129), (234, 131), (200, 130)
OPENAT, OPENAT2 = (257, 56), (437, 437)
OPEN_X86 = 2  # open without "at"; aarch64 never had it

MACHINES = {"x86_64": 0, "aarch64": 1}
_ARCHITECTURES = (0xC000003E, 0xC00000B7)  # AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000  # x86_64's second table of the same calls begins here
_CLONE_THREAD, _PR_SET_PDEATHSIG = 0x00010000, 1
_WRITING = 0x1 | 0x2 | 0x40 | 0x200  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC

OWN_PID = -1
"""Stands for the confined process's id, which is known only once it runs."""


class Instruction(NamedTuple):
    """One struct sock_filter: operation, how far to jump where the test holds and where it does not, operand."""

    code: int
    jump_true: int
    jump_false: int
    operand: int


def _refuse(error: int) -> Instruction:
    return Instruction(_RETURN, 0, 0, _ERRNO | error)


def _refused(number: int, error: int = errno.EPERM) -> Iterator[Instruction]:
    yield Instruction(_EQUAL, 0, 1, number)
    yield _refuse(error)


def _refused_where(number: int, argument: int, test: int, value: int, *, holds: bool) -> Iterator[Instruction]:
    """Refuse a call where (the lower half of) an argument passes the test, or where it does not."""
    yield Instruction(_EQUAL, 0, 4, number)
    yield Instruction(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)
    yield Instruction(test, 0 if holds else 1, 1 if holds else 0, value)
    yield _refuse(errno.EPERM)
    yield Instruction(_LOAD, 0, 0, _NUMBER)


def _rules(machine: int, *, network: bool, files: bool) -> Iterator[Instruction]:
    tables = [FORBIDDEN, *([] if network else [NETWORK]), *([] if files else [FILE_CHANGES])]
    for table in tables:
        for numbers in table.values():
            number = numbers[machine]
            if number is not None:
                yield from _refused(number)
    # clone3 hides its flags behind a pointer; "no such call" makes libc fall back to clone, whose flags can be seen.
    yield from _refused(CLONE3[machine], errno.ENOSYS)
    yield from _refused_where(CLONE[machine], 0, _ANY_BIT, _CLONE_THREAD, holds=False)
    yield from _refused_where(PRCTL[machine], 0, _EQUAL, _PR_SET_PDEATHSIG, holds=True)
    yield from _refused_where(PRLIMIT[machine], 0, _EQUAL, 0, holds=False)  # limits of itself only
    yield from _refused(TKILL[machine])
    for call in (KILL, TGKILL):
        yield from _refused_where(call[machine], 0, _EQUAL, OWN_PID, holds=False)
    if not files:
        yield from _refused(OPENAT2[machine], errno.ENOSYS)
        if machine == MACHINES["x86_64"]:
            yield from _refused_where(OPEN_X86, 1, _ANY_BIT, _WRITING, holds=True)
        yield from _refused_where(OPENAT[machine], 2, _ANY_BIT, _WRITING, holds=True)


def filter_program(machine: str, *, network: bool, files: bool) -> list[Instruction]:
    """The filter, with `OWN_PID` where the process's own id belongs.

    Args:
        machine: a key of `MACHINES`. network: sockets are allowed. files: files may be changed (where Landlock says).
    """
    index = MACHINES[machine]
    return [
        Instruction(_LOAD, 0, 0, _ARCHITECTURE),
        Instruction(_EQUAL, 1, 0, _ARCHITECTURES[index]),
        Instruction(_RETURN, 0, 0, _KILL_PROCESS),  # a program may not switch to 32-bit calls, numbered otherwise
        Instruction(_LOAD, 0, 0, _NUMBER),
        Instruction(_AT_LEAST, 0, 1, _X32),
        _refuse(errno.EPERM),
        *_rules(index, network=network, files=files),
        Instruction(_RETURN, 0, 0, _ALLOW),
    ]
