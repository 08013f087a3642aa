"""Which system calls an untrusted program is refused, as a seccomp filter (classic BPF). Data alone: nothing is called.

A seccomp filter needs no rights to set, holds in containers where namespaces may not be made, is passed on to every
child, and cannot be taken off again. What it lets through is bounded by rlimits and Landlock (`isolation.child`).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import NamedTuple

Table = dict[str, tuple[int, int | None]]
"""Number of each call: (x86_64, aarch64); None where aarch64 has no such call."""

NETWORK: Table = {
    # sendmsg and its kin may hold an address, and files that then count for no process (SCM_RIGHTS).
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "sendmsg": (46, 211), "sendmmsg": (307, 269), "recvmsg": (47, 212), "recvmmsg": (299, 243),
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
    "process_mrelease": (448, 448), "flock": (73, 32), "inotify_add_watch": (254, 27), "fanotify_init": (300, 262),
    # Shared memory, queues and semaphores of others: they are found by a number, which can be guessed.
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "msgctl": (71, 187), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191),
    "semtimedop": (220, 192), "mq_open": (240, 180), "mq_unlink": (241, 181),
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
CLOSE_RANGE = (436, 436)
FCNTL, IOCTL, SOCKETPAIR, SENDTO = (72, 25), (16, 29), (53, 199), (44, 206)
KILL, TGKILL, TKILL = (62, 129), (234, 131), (200, 130)
OPENAT, OPENAT2 = (257, 56), (437, 437)
OPEN_X86 = 2  # open without "at"; aarch64 never had it

MACHINES = {"x86_64": 0, "aarch64": 1}
_ARCHITECTURES = (0xC000003E, 0xC00000B7)  # AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN, _AND = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000  # x86_64's second table of the same calls begins here
_CLONE_THREAD, _CLONE_FILES = 0x00010000, 0x400
_WRITING = 0x1 | 0x2 | 0x40 | 0x200  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
_NAMELESS = 0x400000  # __O_TMPFILE: a file that no folder lists
FIRST_UNKNOWN = 470
"""Calls numbered from here on came after this table was made; what they can do is not known."""

# Commands that a program may need. Of the others, F_SETOWN and F_SETSIG, FIOSETOWN and SIOCSPGRP have the kernel send a
# signal, SIGKILL too, to any process of the user; leases hold up whoever opens a file.
FCNTL_ALLOWED = (0, 1, 2, 3, 4, 5, 6, 7, 1030)  # dup, its flags, its status, locks of the own files, dup with CLOEXEC
# Is it a terminal (TCGETS, TCGETS2), its size, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX.
IOCTL_ALLOWED = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
PRCTL_ALLOWED = (15, 16, 0x53564D41)  # a thread's name, and the C library's names of its memory
_UNIX, _STREAM, _TYPE_BITS = 1, 1, 0xF  # socketpair's family and type; the bits above are flags

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


def _only(number: int, argument: int, values: tuple[int, ...], *, bits: int = 0xFFFFFFFF) -> Iterator[Instruction]:
    """Refuse a call unless (the lower half of) an argument, those of its `bits`, is one of the values."""
    yield Instruction(_EQUAL, 0, len(values) + 4, number)
    yield Instruction(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)
    yield Instruction(_AND, 0, 0, bits)
    for index, value in enumerate(values):
        yield Instruction(_EQUAL, len(values) - index, 0, value)
    yield _refuse(errno.EPERM)
    yield Instruction(_LOAD, 0, 0, _NUMBER)


def _pairs_alone(machine: int) -> Iterator[Instruction]:
    """Sockets that lead nowhere: connected in pairs. Of streams alone, because datagrams can be addressed to others."""
    yield from _only(SOCKETPAIR[machine], 0, (_UNIX,))
    yield from _only(SOCKETPAIR[machine], 1, (_STREAM,), bits=_TYPE_BITS)
    for half in (0, 4):  # no address: the pointer is null
        yield Instruction(_EQUAL, 0, 4, SENDTO[machine])
        yield Instruction(_LOAD, 0, 0, _ARGUMENTS + 8 * 4 + half)
        yield Instruction(_EQUAL, 1, 0, 0)
        yield _refuse(errno.EPERM)
        yield Instruction(_LOAD, 0, 0, _NUMBER)


def _rules(machine: int, *, network: bool, files: bool) -> Iterator[Instruction]:
    tables = [FORBIDDEN, *([] if network else [NETWORK]), *([] if files else [FILE_CHANGES])]
    for table in tables:
        for numbers in table.values():
            number = numbers[machine]
            if number is not None:
                yield from _refused(number)
    # These hide their flags behind a pointer; "no such call" makes libc fall back to others, whose flags can be seen.
    for call in (CLONE3, OPENAT2, CLOSE_RANGE):
        yield from _refused(call[machine], errno.ENOSYS)
    # Threads alone, and such as share the table of open files: the disk they use is counted there.
    for flag in (_CLONE_THREAD, _CLONE_FILES):
        yield from _refused_where(CLONE[machine], 0, _ANY_BIT, flag, holds=False)
    yield from _only(PRCTL[machine], 0, PRCTL_ALLOWED)
    yield from _only(FCNTL[machine], 1, FCNTL_ALLOWED)
    yield from _only(IOCTL[machine], 1, IOCTL_ALLOWED)
    if not network:
        yield from _pairs_alone(machine)
    yield from _refused_where(PRLIMIT[machine], 0, _EQUAL, 0, holds=False)  # limits of itself only
    yield from _refused(TKILL[machine])
    for call in (KILL, TGKILL):
        yield from _refused_where(call[machine], 0, _EQUAL, OWN_PID, holds=False)
    refused_flags = _NAMELESS if files else _NAMELESS | _WRITING
    if machine == MACHINES["x86_64"]:
        yield from _refused_where(OPEN_X86, 1, _ANY_BIT, refused_flags, holds=True)
    yield from _refused_where(OPENAT[machine], 2, _ANY_BIT, refused_flags, holds=True)


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
        Instruction(_AT_LEAST, 0, 1, FIRST_UNKNOWN),
        _refuse(errno.ENOSYS),
        *_rules(index, network=network, files=files),
        Instruction(_RETURN, 0, 0, _ALLOW),
    ]
