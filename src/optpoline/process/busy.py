# SPDX-License-Identifier: Apache-2.0
"""Tell runnable threads that run their own code from those in a system call.

A runnable thread is not always a running one. Woken in the middle of a transfer
it waits for a CPU, runs for microseconds inside the kernel, and sleeps again:
to interrupt it cuts the transfer short as if it were asleep. Its kernel stack
tells, which root may read while the thread is off its CPU. One that is on a CPU
is looked at again: in a blocking transfer it is soon seen asleep.

Limit: a thread that is inside a transfer and on a CPU at every look, or that
begins one between the last look and its interruption (microseconds), is cut
short. So is, without root, one that waits for a CPU all the while, and any where
more threads are runnable than can be looked at.
"""

from __future__ import annotations

import time

from optpoline.errors import ProcessGone
from optpoline.process.procfs import ThreadWhere, read_preempted_where, read_state_char

__all__ = ["MAX_LOOKED_AT", "find_busy", "is_in_call"]

_N_LOOKS = 4
_LOOK_EVERY_S = 100e-6
"""A reader that empties a pipe wakes its writer for 10 to 50 us at a time."""

MAX_LOOKED_AT = 128
"""With more runnable threads than that all are busy: a look takes 15 us for each, and those
left in calls would come out of them while the others wait for a CPU to stop on."""


def find_busy(runnable: dict[int, int]) -> set[int]:
    """Return which threads are to be stopped because they run their own code.

    The others have fallen asleep meanwhile or wait for a CPU in a system call.

    Args:
        runnable: Threads that were runnable when listed: tid to pid.
    """
    if len(runnable) > MAX_LOOKED_AT:
        return set(runnable)
    busy: set[int] = set()
    undecided = dict(runnable)
    for look in range(_N_LOOKS):
        if look:
            if not undecided:
                break
            time.sleep(_LOOK_EVERY_S)
        for tid, pid in tuple(undecided.items()):
            try:
                is_runnable = read_state_char(pid, tid) == "R"
                where = read_preempted_where(pid, tid)
            except ProcessGone:
                is_runnable, where = False, ThreadWhere.BLOCKED
            if not is_runnable or where is not ThreadWhere.RUNNING:
                del undecided[tid]
            if is_runnable and where is ThreadWhere.BLOCKED:
                busy.add(tid)
    return busy | undecided.keys()


def is_in_call(pid: int, tid: int) -> bool:
    """Tell whether a thread that was busy is seen asleep or off its CPU in a call now."""
    try:
        where = read_preempted_where(pid, tid)
        if where is ThreadWhere.RUNNING:
            return read_state_char(pid, tid) == "S"
    except ProcessGone:
        return False
    return where is ThreadWhere.IN_SYSCALL
