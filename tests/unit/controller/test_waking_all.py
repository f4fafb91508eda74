# SPDX-License-Identifier: Apache-2.0
"""Whether all threads of a program may be woken: who would notice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from optpoline.controller import target as module
from optpoline.controller.target import Target
from optpoline.errors import ProcessGone
from optpoline.model import Addr
from optpoline.process import waking
from optpoline.process.thread_state import ThreadState, ThreadWhere
from optpoline.x86.syscalls import Disturbance

PID, SHARER = 10, 20
TIMED_FD, UNTIMED_FD, WHOLE_FD, PIPE_FD = range(3, 7)
ANSWERS = {
    TIMED_FD: Disturbance.TIMEOUT_AFRESH,
    UNTIMED_FD: Disturbance.NONE,
    WHOLE_FD: Disturbance.HARMFUL,
    PIPE_FD: Disturbance.NONE,
}
RUNNING, IN, BLOCKED = ThreadWhere.RUNNING, ThreadWhere.IN_SYSCALL, ThreadWhere.BLOCKED
FUTEX, READ, ACCEPT, EPOLL_WAIT, SIGSUSPEND, WRITE = 202, 0, 43, 232, 130, 1
Call = tuple[int, int]
"""Number, first argument."""


def make_thread(tid: int, where: ThreadWhere, call: Call, state: str) -> ThreadState:
    """Return what is seen of a thread."""
    return ThreadState(
        tid=tid,
        state=state,
        where=where,
        syscall_nr=call[0] if where is IN else -1,
        syscall_args=(call[1], 0, 0, 0, 0, 0) if where is IN else (),
        sp=Addr(0),
        pc=Addr(0),
        n_voluntary=0,
        n_nonvoluntary=0,
        tracer_pid=0,
    )


@pytest.mark.parametrize("is_sharer", [False, True])
@pytest.mark.parametrize(
    ("where", "call", "state", "may_wake", "may_wake_late"),
    [
        (RUNNING, (0, 0), "R", True, True),
        (BLOCKED, (0, 0), "S", True, True),
        (IN, (FUTEX, 0), "S", True, True),
        (IN, (WRITE, UNTIMED_FD), "S", False, False),
        (IN, (SIGSUSPEND, 0), "S", False, False),
        (IN, (SIGSUSPEND, 0), "T", False, False),
        (IN, (WRITE, 0), "T", True, True),
        (IN, (EPOLL_WAIT, 5), "S", False, True),
        (IN, (ACCEPT, TIMED_FD), "S", False, True),
        (IN, (ACCEPT, UNTIMED_FD), "S", True, True),
        (IN, (READ, TIMED_FD), "S", False, True),
        (IN, (READ, UNTIMED_FD), "S", True, True),
        (IN, (READ, WHOLE_FD), "S", False, False),
        (IN, (READ, PIPE_FD), "S", True, True),
    ],
)
def test_who_may_be_woken(
    monkeypatch: pytest.MonkeyPatch,
    *,
    where: ThreadWhere,
    call: Call,
    state: str,
    may_wake: bool,
    may_wake_late: bool,
    is_sharer: bool,
) -> None:
    harmless = make_thread(PID, IN, (FUTEX, 0), "S")
    looked_at = make_thread(SHARER if is_sharer else PID + 1, where, call, state)
    gone = PID + 2
    threads = {PID: [PID, gone], SHARER: []}
    threads[SHARER if is_sharer else PID].append(looked_at.tid)
    states = {PID: harmless, looked_at.tid: looked_at}

    def read(_pid: int, tid: int) -> ThreadState:
        if tid == gone:
            raise ProcessGone(tid)
        return states[tid]

    monkeypatch.setattr(module, "read_thread_state", read)
    monkeypatch.setattr(module, "read_state_char", lambda _pid, tid: states[tid].state)
    monkeypatch.setattr(module, "list_tids", lambda pid: threads[pid])
    monkeypatch.setattr(waking, "rank_receiving", lambda _pid, _tid, fd: ANSWERS[fd])
    program = SimpleNamespace(pid=PID, sharers=SimpleNamespace(look=lambda: (SHARER,)))
    target = cast(Target, program)
    assert Target.may_wake_all(target) is may_wake
    assert Target.may_wake_all(target, may_delay=True) is may_wake_late
