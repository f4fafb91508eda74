# SPDX-License-Identifier: Apache-2.0
"""Tell runnable threads that may be interrupted from those in the middle of a transfer.

A runnable thread is not always a running one. Woken in the middle of a write to
a pipe it waits for a CPU, runs for microseconds inside the kernel, and sleeps
again: to interrupt it cuts the transfer short as if it were asleep. Its kernel
stack tells, which root may read while the thread is off its CPU. One that is on
a CPU is pushed off it: at real-time priority we take the CPU that we move to.
Else it is looked at again: in a blocking transfer it is soon seen asleep.

Limit: a thread that begins a transfer between the last look and its interruption
(microseconds) is cut short. So is, without root or real-time priority, one that
transfers at every look, and any where more threads are runnable than can be
looked at.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from optpoline.errors import ProcessGone
from optpoline.process.procfs import read_processor, read_state_char
from optpoline.process.thread_state import read_kernel_stack

__all__ = [
    "MAX_LOOKED_AT",
    "find_busy",
    "is_asleep_or_transferring",
    "is_transferring",
    "moving_between_cpus",
]

_N_LOOKS = 4
_LOOK_EVERY_S = 100e-6
"""A reader that empties a pipe wakes its writer for 10 to 50 us at a time."""

MAX_LOOKED_AT = 128
"""With more runnable threads than that all are busy: a look takes 15 us for each, and those
left alone would go on while the others wait for a CPU to stop on."""

# Calls that answer with part of what was asked for when they are interrupted. As the kernel
# names them: __x64_sys_recvfrom, ksys_write, do_writev, ...
_TRANSFER = re.compile(
    r"(?:sys|do)_(?:p?writev?|pwrite64|pwritev2|send(?:to|msg|mmsg|file|file64)"
    r"|recv(?:from|msg|mmsg)|splice|vmsplice|tee|copy_file_range)\+"
)
_SYSTEM_CALL = "entry_SYSCALL_64"
"""arch/x86/entry/entry_64.S: the one way into every 64-bit system call."""


def find_busy(runnable: dict[int, int]) -> set[int]:
    """Return which threads are to be stopped; the others sleep by now, or transfer data.

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
                stack = _read_stack(pid, tid) if is_runnable else ""
            except ProcessGone:
                is_runnable, stack = False, ""
            if is_runnable and not stack:
                continue  # on a CPU again
            del undecided[tid]
            if is_runnable and not _TRANSFER.search(stack):
                busy.add(tid)
    return busy | undecided.keys()


@contextmanager
def moving_between_cpus() -> Iterator[None]:
    """Let the functions of this module move the calling thread; at the end it is as before."""
    before = os.sched_getaffinity(0)
    try:
        yield
    finally:
        with suppress(OSError):  # its CPUs were taken away meanwhile
            os.sched_setaffinity(0, before)


def _read_stack(pid: int, tid: int) -> str:
    """Return a thread's kernel stack, having pushed it off its CPU if it is on one."""
    stack = read_kernel_stack(pid, tid)
    if not stack:
        with suppress(OSError):  # not one of ours
            os.sched_setaffinity(0, {read_processor(pid, tid)})
        stack = read_kernel_stack(pid, tid)
    return stack


def is_transferring(pid: int, tid: int) -> bool:
    """Tell whether a thread is off its CPU in a transfer, asleep or not."""
    try:
        return bool(_TRANSFER.search(_read_stack(pid, tid)))
    except ProcessGone:
        return False


def is_asleep_or_transferring(pid: int, tid: int) -> bool:
    """Tell whether a thread that was found busy must be left alone after all."""
    try:
        stack = _read_stack(pid, tid)
        if _TRANSFER.search(stack):
            return True
        # One that is off its CPU in its own code, the common case, takes one reading.
        may_sleep = not stack or _SYSTEM_CALL in stack
        return may_sleep and read_state_char(pid, tid) == "S"
    except ProcessGone:
        return False
