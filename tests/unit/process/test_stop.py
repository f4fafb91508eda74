# SPDX-License-Identifier: Apache-2.0
"""What a stop tells of the threads that stand."""

from __future__ import annotations

from typing import cast

from optpoline.process.memory import RemoteMemory
from optpoline.process.ptrace import StopCode, Tracer
from optpoline.process.sharers import SharerFinder
from optpoline.process.stop import Stop, Wake
from optpoline.process.stopper import Stopper, Tracee
from optpoline.process.tracer_thread import TracerThread
from optpoline.x86.registers import REGISTERS_SIZE, decode_registers

PID = 1


def make_tracee(tid: int) -> Tracee:
    """Return a thread that stands at an address of its own."""
    regs = decode_registers(bytes(REGISTERS_SIZE))._replace(rip=0x1000 + tid)
    return Tracee(pid=PID, tid=tid, code=StopCode(0), regs=regs)


def tids_of(stop: Stop) -> list[int]:
    """Return who stands."""
    return [thread.tid for thread in stop.stopped]


def test_threads_are_told_once_until_more_stand() -> None:
    stopper = Stopper(
        pid=PID,
        memory=cast(RemoteMemory, None),
        tracer=cast(Tracer, None),
        sharers=SharerFinder(PID),
        wakes_all=False,
        timeout_ns=1,
    )
    stop = Stop(cast(TracerThread, None), stopper, None, Wake.NONE)
    assert tids_of(stop) == []
    stopper.tracees[2] = make_tracee(2)
    assert tids_of(stop) == [2]
    before = stop.stopped
    assert before[0].pc == 0x1002
    assert stop.stopped is before
    stopper.tracees[3] = make_tracee(3)
    assert tids_of(stop) == [2, 3]
    stopper.tracees = {}  # as it is when all were let go on
    assert tids_of(stop) == []
