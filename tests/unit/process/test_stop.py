# SPDX-License-Identifier: Apache-2.0
"""What a stop tells of the threads that stand, and of its length."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import cast

import pytest

from optpoline.errors import OptpolineError, SiteChanged, StopTimeout
from optpoline.model import Addr
from optpoline.process import stop as module
from optpoline.process.memory import RemoteMemory
from optpoline.process.ptrace import StopCode, Tracer
from optpoline.process.sharers import SharerFinder
from optpoline.process.stop import Stop, Wake, stop_threads
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


class FakeStopper:
    """Lets one thread stand for a millisecond; fails in the middle.

    Attributes:
        fails_at: Where it fails: "stop", "release" or nowhere.
        begin_ns: When the thread was interrupted: so long ago that its stop has a length.
    """

    LENGTH_NS = 1_000_000

    def __init__(self, fails_at: str) -> None:
        """Stop nobody yet."""
        self.fails_at = fails_at
        self.begin_ns = 0

    def stop(self) -> None:
        """Interrupt the thread."""
        self.begin_ns = time.monotonic_ns() - self.LENGTH_NS
        self._fail("stop")

    def release(self) -> int:
        """Let it go on."""
        self._fail("release")
        return self.begin_ns + self.LENGTH_NS

    def reap_dead(self) -> None:
        """Reap nobody."""

    def _fail(self, at: str) -> None:
        """Fail there."""
        if self.fails_at == at:
            raise StopTimeout(self.LENGTH_NS, (PID,))


def stop_and_fail(stopper: FakeStopper, lengths_ns: list[int], error: OptpolineError) -> None:
    """Make a stop in which something fails."""
    memory, sharers = cast(RemoteMemory, None), SimpleNamespace(look=tuple)
    with stop_threads(
        os.getpid(),
        memory=memory,
        wake=Wake.NONE,
        sharers=cast(SharerFinder, sharers),
        on_end=lengths_ns.append,
    ):
        assert stopper.begin_ns
        raise error


@pytest.mark.parametrize("fails_at", ["stop", "block", "release"])
def test_length_of_a_stop_that_ends_in_an_error(
    fails_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopper = FakeStopper(fails_at)
    monkeypatch.setattr(module, "Stopper", lambda **_: stopper)
    lengths_ns: list[int] = []
    with pytest.raises(SiteChanged if fails_at == "block" else StopTimeout):
        stop_and_fail(stopper, lengths_ns, SiteChanged(Addr(0), b"", b""))
    (length_ns,) = lengths_ns
    assert length_ns == FakeStopper.LENGTH_NS or fails_at == "release"
    assert length_ns >= FakeStopper.LENGTH_NS
