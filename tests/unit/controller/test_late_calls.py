# SPDX-License-Identifier: Apache-2.0
"""Who may have a call before it that a controller injected that is dead by now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import cast

import pytest

from optpoline.controller import late_calls as module
from optpoline.controller.late_calls import may_call_late, wait_for_late_calls
from optpoline.controller.target import Target
from optpoline.model import Addr, Mapping
from optpoline.process.stop import Wake
from optpoline.process.thread_state import ThreadState, ThreadWhere
from optpoline.x86.syscalls import SYS_MMAP

VDSO = Mapping(
    start=Addr(0x7000),
    end=Addr(0x9000),
    perms="r-xp",
    offset=0,
    inode=0,
    device="00:00",
    path="[vdso]",
)
IN, BLOCKED, RUNNING = ThreadWhere.IN_SYSCALL, ThreadWhere.BLOCKED, ThreadWhere.RUNNING


@pytest.mark.parametrize(
    ("state", "where", "pc", "expected"),
    [
        ("R", RUNNING, 0, True),
        ("D", IN, 0x7500, True),
        ("S", IN, 0x7500, True),
        ("t", IN, 0x7500, True),  # held at the entry by a controller that is about to die
        ("D", IN, 0x6FFF, False),
        ("S", IN, 0x9000, False),
        ("T", IN, 0x7500, False),
        ("Z", RUNNING, 0, False),
        ("D", BLOCKED, 0x7500, False),  # a page fault
    ],
)
def test_may_call_late(state: str, where: ThreadWhere, pc: int, expected: bool) -> None:
    assert may_call_late(make_thread(1, state, where, pc), VDSO) is expected


def make_thread(tid: int, state: str, where: ThreadWhere, pc: int) -> ThreadState:
    """Return what is seen of a thread."""
    return ThreadState(
        tid=tid,
        state=state,
        where=where,
        syscall_nr=SYS_MMAP if where is IN else -1,
        syscall_args=(),
        sp=Addr(0),
        pc=Addr(pc),
        n_voluntary=0,
        n_nonvoluntary=0,
        tracer_pid=0,
    )


class Program:
    """A program with one busy thread, one in a transfer, and many that sleep elsewhere.

    Attributes:
        in_stop: Threads whose kernel stacks were read while the busy one stood.
    """

    BUSY, TRANSFERRING, FIRST_ASLEEP, N_THREADS = 1, 2, 3, 2000

    def __init__(self) -> None:
        """Look at nobody yet."""
        self.pid = self.BUSY
        self.maps = (VDSO,)
        self.stop_timeout_ns = 0
        self.in_stop: list[int] = []
        self.n_stops = 0

    @contextmanager
    def stop(self, wake: Wake) -> Iterator[SimpleNamespace]:
        """Stop the busy thread only."""
        assert wake is Wake.NONE
        self.n_stops += 1
        asleep = tuple(range(self.TRANSFERRING, self.N_THREADS + 1))
        yield SimpleNamespace(stopped=(SimpleNamespace(tid=self.BUSY),), asleep=asleep)

    def list_tids(self, _pid: int) -> tuple[int, ...]:
        """Return all threads."""
        return tuple(range(self.BUSY, self.N_THREADS + 1))

    def read_thread_state(self, _pid: int, tid: int) -> ThreadState:
        """Return where one is."""
        if tid >= self.FIRST_ASLEEP:
            return make_thread(tid, "S", IN, 0x1000)
        return make_thread(tid, "R", RUNNING, 0)

    def read_state_char(self, pid: int, tid: int) -> str:
        """Return its state letter."""
        return self.read_thread_state(pid, tid).state

    def is_transferring(self, _pid: int, tid: int) -> bool:
        """Note that its kernel stack is read."""
        self.in_stop.append(tid)
        return tid == self.TRANSFERRING


def test_sleepers_that_were_seen_are_not_looked_at_in_the_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = Program()
    for name in ("list_tids", "read_thread_state", "read_state_char", "is_transferring"):
        monkeypatch.setattr(module, name, getattr(program, name))
    wait_for_late_calls(cast(Target, program))
    assert program.n_stops == 1
    assert program.in_stop == [Program.TRANSFERRING]
