"""The seccomp filter as data: interpreted as the kernel does, on every system call of both machines."""

from __future__ import annotations

import errno
import os

import pytest

from ray_pipeline.isolation import filter as sandbox_filter
from ray_pipeline.isolation.filter import MACHINES, OWN_PID, filter_program


def _verdict(program, machine: str, number: int, arguments=(0,) * 6) -> int:
    """What the kernel would answer: the filter, interpreted. Loads take the lower halves of 64-bit arguments."""
    values = {0: number, 4: {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]}
    values |= {16 + 8 * i: value & 0xFFFFFFFF for i, value in enumerate(arguments)}
    values |= {20 + 8 * i: value >> 32 for i, value in enumerate(arguments)}
    place = register = 0
    while True:
        code, jump_true, jump_false, operand = program[place]
        place += 1
        if code == 0x20:
            register = values[operand]
        elif code == 0x54:
            register &= operand
        elif code == 0x06:
            return operand
        else:
            holds = {
                0x15: register == operand,
                0x35: register >= operand,
                0x45: bool(register & operand),
            }[code]
            place += jump_true if holds else jump_false


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_refuses_what_its_tables_say_and_nothing_else(machine):
    index = MACHINES[machine]
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    program = filter_program(machine, network=False, files=True)
    listed = {numbers[index] for numbers in (sandbox_filter.FORBIDDEN | sandbox_filter.NETWORK).values()} - {None}
    names = "CLONE CLONE3 PRCTL PRLIMIT KILL TGKILL TKILL OPENAT2 CLOSE_RANGE FCNTL IOCTL SOCKETPAIR SENDTO"
    special = {getattr(sandbox_filter, name)[index] for name in names.split()}
    for number in range(sandbox_filter.FIRST_UNKNOWN):
        if number not in special:
            assert _verdict(program, machine, number) == (refuse if number in listed else allow), number
    for number in (sandbox_filter.FIRST_UNKNOWN, 600, 0x3FFFFFFF):
        assert _verdict(program, machine, number) == 0x00050000 | errno.ENOSYS
    assert not listed & special
    thread, child = 0x003D0F00, 0x01200011  # the flags of pthread_create and of fork in glibc
    assert _verdict(program, machine, sandbox_filter.CLONE[index], (thread & ~0x400, 0)) == refuse  # own open files
    assert _verdict(program, machine, sandbox_filter.CLONE[index], (thread, 0)) == allow
    assert _verdict(program, machine, sandbox_filter.CLONE[index], (child, 0)) == refuse
    assert _verdict(program, machine, sandbox_filter.CLONE3[index]) == 0x00050000 | errno.ENOSYS
    assert _verdict(program, machine, sandbox_filter.KILL[index], (123, 9)) == refuse
    own = [i._replace(operand=123) if i.operand == OWN_PID else i for i in program]
    assert _verdict(own, machine, sandbox_filter.KILL[index], (123, 9)) == allow
    assert _verdict(program, machine, 0x40000000 + 57) == refuse


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_without_landlock_lets_files_be_read_only(machine):
    index = MACHINES[machine]
    program = filter_program(machine, network=True, files=False)
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    openat = sandbox_filter.OPENAT[index]
    assert _verdict(program, machine, openat, (0, 0, os.O_RDONLY | os.O_CLOEXEC)) == allow
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_CREAT, os.O_RDONLY | os.O_TRUNC):
        assert _verdict(program, machine, openat, (0, 0, flags)) == refuse
    assert _verdict(program, machine, sandbox_filter.NETWORK["socket"][index]) == allow


@pytest.mark.parametrize("machine", MACHINES)
def test_commands_that_send_signals_and_sockets_that_lead_elsewhere_are_refused(machine):
    index = MACHINES[machine]
    program = filter_program(machine, network=False, files=True)
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM

    def verdict(name, *arguments):
        given = (*arguments, *(0,) * (6 - len(arguments)))
        return _verdict(program, machine, getattr(sandbox_filter, name)[index], given)

    for command in (8, 10, 15, 1024, 1026, 1031):  # F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY, F_SETPIPE_SZ
        assert verdict("FCNTL", 0, command) == refuse, command
    assert all(verdict("FCNTL", 0, command) == allow for command in sandbox_filter.FCNTL_ALLOWED)
    for command in (0x8901, 0x8902, 0x5452, 0x5412, 0x540E):  # FIOSETOWN, SIOCSPGRP, FIOASYNC, TIOCSTI, TIOCSCTTY
        assert verdict("IOCTL", 0, command) == refuse, command
    assert all(verdict("IOCTL", 0, command) == allow for command in sandbox_filter.IOCTL_ALLOWED)
    assert verdict("PRCTL", 1) == verdict("PRCTL", 4) == refuse and verdict("PRCTL", 15) == allow
    unix, inet, stream, datagram, close_on_exec = 1, 2, 1, 2, 0o2000000
    assert verdict("SOCKETPAIR", unix, stream | close_on_exec) == allow
    assert verdict("SOCKETPAIR", unix, datagram) == verdict("SOCKETPAIR", inet, stream) == refuse
    assert verdict("SENDTO", 3, 9, 1, 0, 0) == allow
    assert verdict("SENDTO", 3, 9, 1, 0, 1) == verdict("SENDTO", 3, 9, 1, 0, 1 << 32) == refuse
    assert verdict("OPENAT", 0, 0, os.O_RDWR) == allow and verdict("OPENAT", 0, 0, 0x410000 | os.O_RDWR) == refuse
