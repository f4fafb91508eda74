# SPDX-License-Identifier: Apache-2.0
"""Which calls may be disturbed, and what a frame says about one that was."""

from __future__ import annotations

import pytest

from optpoline.x86.registers import REGISTERS_SIZE, Registers, decode_registers
from optpoline.x86.syscalls import (
    Disturbance,
    has_temporary_mask,
    is_restartable_eintr,
    rank_disturbance,
    undisturbed,
)

NO_ARGS = (0,) * 6


def _regs(nr: int, result: int) -> Registers:
    regs = decode_registers(bytes(REGISTERS_SIZE))._replace(orig_rax=nr, rip=0x1002)
    return regs.with_result(result)


@pytest.mark.parametrize(
    ("nr", "args", "expected"),
    [
        (0, NO_ARGS, Disturbance.NONE),  # read
        (1, NO_ARGS, Disturbance.HARMFUL),  # write
        (43, NO_ARGS, Disturbance.SOCKET_TIMEOUT_AFRESH),  # accept
        (45, NO_ARGS, Disturbance.SOCKET_TIMEOUT_AFRESH),  # recvfrom
        (45, (0, 0, 0, 0x100, 0, 0), Disturbance.HARMFUL),  # MSG_WAITALL
        (47, (0, 0, 0x100, 0, 0, 0), Disturbance.HARMFUL),
        (202, (0, 128, 0, 0, 0, 0), Disturbance.NONE),  # futex wait, private
        (202, (0, 128, 0, 0x1000, 0, 0), Disturbance.RESTART_BLOCK),
        (202, (0, 393, 0, 0x1000, 0, 0), Disturbance.RESTART_BLOCK),  # bitset, clock realtime
        (230, (0, 1, 0, 0, 0, 0), Disturbance.NONE),  # clock_nanosleep, absolute
        (230, NO_ARGS, Disturbance.RESTART_BLOCK),
        (35, NO_ARGS, Disturbance.RESTART_BLOCK),
        (7, NO_ARGS, Disturbance.RESTART_BLOCK),
        (232, NO_ARGS, Disturbance.TIMEOUT_AFRESH),
        (232, (0, 0, 0, 2**32 - 1, 0, 0), Disturbance.NONE),  # epoll_wait without a timeout
        (72, (0, 7, 0, 0, 0, 0), Disturbance.NONE),  # F_SETLKW
        (271, (0, 0, 0, 0x1000, 8, 0), Disturbance.HARMFUL),  # ppoll with a mask
        (271, (0, 0, 0x1000, 0, 8, 0), Disturbance.NONE),  # the kernel keeps its timeout
        (270, (0, 0, 0, 0, 0, 0x1000), Disturbance.HARMFUL),  # pselect6 with a mask
        (270, (0, 0, 0, 0, 0x1000, 0), Disturbance.NONE),  # select
        (281, (0, 0, 0, 0, 0x1000, 8), Disturbance.HARMFUL),  # epoll_pwait with a mask
        (281, NO_ARGS, Disturbance.TIMEOUT_AFRESH),
        (281, (0, 0, 0, 2**32 - 1, 0, 8), Disturbance.NONE),  # without a timeout
        (441, (0, 0, 0, 0x1000, 0, 8), Disturbance.TIMEOUT_AFRESH),  # epoll_pwait2
        (441, NO_ARGS, Disturbance.NONE),
        (426, (4, 0, 1, 1, 0, 0), Disturbance.NONE),  # io_uring_enter
        (426, (4, 1, 1, 1, 0, 0), Disturbance.HARMFUL),  # which has submitted something
        (426, (4, 0, 2, 1, 0, 0), Disturbance.HARMFUL),  # may have one of two
        (426, (4, 0, 1, 1, 0x1000, 8), Disturbance.HARMFUL),  # with a mask
        (426, (4, 0, 1, 9, 0x1000, 24), Disturbance.HARMFUL),  # perhaps with one
        (426, (4, 0, 1, 0x49, 0, 64), Disturbance.HARMFUL),  # in a region, at its begin
        (130, NO_ARGS, Disturbance.HARMFUL),  # rt_sigsuspend
        (40, NO_ARGS, Disturbance.HARMFUL),  # sendfile
        (9999, NO_ARGS, Disturbance.HARMFUL),
    ],
)
def test_rank(nr: int, args: tuple[int, ...], expected: Disturbance) -> None:
    assert rank_disturbance(nr, args) is expected
    assert not has_temporary_mask(nr, args) or expected is Disturbance.HARMFUL


@pytest.mark.parametrize(
    ("nr", "result", "is_socket", "expected"),
    [
        (232, -4, False, True),
        (232, -514, False, False),
        (3, -4, False, False),  # close: a second one would close another file
        (0, -4, False, False),
        (0, -4, True, True),
        (45, -4, False, True),
        (2**64 - 1, -4, True, False),
    ],
)
def test_eintr(nr: int, result: int, is_socket: bool, expected: bool) -> None:
    assert is_restartable_eintr(_regs(nr, result), is_socket=is_socket) is expected


@pytest.mark.parametrize("result", [-512, -513, -514])
def test_restart_is_written_out(result: int) -> None:
    regs = undisturbed(_regs(202, result))
    assert (regs.rax, regs.rip) == (202, 0x1000)


def test_restart_block_becomes_eintr() -> None:
    regs = undisturbed(_regs(35, -516))
    assert (regs.result, regs.rip) == (-4, 0x1002)


@pytest.mark.parametrize(("nr", "result"), [(2**64 - 1, -512), (0, 5), (0, -9)])
def test_others_are_left_alone(nr: int, result: int) -> None:
    assert undisturbed(_regs(nr, result)) == _regs(nr, result)
