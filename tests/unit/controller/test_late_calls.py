# SPDX-License-Identifier: Apache-2.0
"""Who may have a call before it that a controller injected that is dead by now."""

from __future__ import annotations

import pytest

from optpoline.controller.late_calls import may_call_late
from optpoline.model import Addr, Mapping
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
    thread = ThreadState(
        tid=1,
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
    assert may_call_late(thread, VDSO) is expected
