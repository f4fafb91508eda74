# SPDX-License-Identifier: Apache-2.0
"""What a stop puts right of threads that came to it too late, whose ever they are."""

from __future__ import annotations

import os
import socket
import threading
from typing import cast

import pytest

from optpoline.process.memory import RemoteMemory
from optpoline.process.ptrace import StopCode, Tracer
from optpoline.process.sharers import SharerFinder
from optpoline.process.stopper import Stopper
from optpoline.x86.registers import REGISTERS_SIZE, Registers, decode_registers
from optpoline.x86.syscalls import ERESTARTNOHAND

_EINTR = 4
_SYS_READ = 0
TARGET = 1
"""Another process than the thread's."""


class _Tracer:
    """Tells that a thread has stopped in read(), with EINTR."""

    def __init__(self, fd: int) -> None:
        """Note what it reads."""
        self.regs = (
            decode_registers(bytes(REGISTERS_SIZE))
            ._replace(orig_rax=_SYS_READ, rdi=fd)
            .with_result(-_EINTR)
        )
        self.detached: list[int] = []

    def poll(self, _tid: int) -> StopCode:
        """Say so."""
        return StopCode(0)

    def read_registers(self, _tid: int) -> Registers:
        """Return its registers."""
        return self.regs

    def write_registers(self, _tid: int, regs: Registers) -> None:
        """Set them."""
        self.regs = regs

    def detach(self, tid: int, _signal: int) -> None:
        """Let it go."""
        self.detached.append(tid)


@pytest.mark.parametrize("field", ["_pending", "_left_seized"])
@pytest.mark.parametrize("is_socket", [False, True])
def test_late_thread_of_a_process_that_shares_the_memory(field: str, is_socket: bool) -> None:
    """Whether it reads from a socket is told by its own files, not the target's."""
    near, far = socket.socketpair()
    null = os.open(os.devnull, os.O_RDONLY)
    tracer = _Tracer(near.fileno() if is_socket else null)
    tid = threading.get_native_id()
    stopper = Stopper(
        pid=TARGET,
        memory=cast(RemoteMemory, None),
        tracer=cast(Tracer, tracer),
        sharers=SharerFinder(TARGET),
        wakes_all=False,
        timeout_ns=1,
    )
    getattr(stopper, field)[tid] = os.getpid()
    stopper.release()
    assert tracer.detached == [tid]
    # A socket may have a timeout to wait, with which the kernel answers EINTR to a stop.
    assert tracer.regs.result == (-ERESTARTNOHAND if is_socket else -_EINTR)
    near.close()
    far.close()
    os.close(null)
