# SPDX-License-Identifier: Apache-2.0
"""Wait for system calls that a killed controller put a thread on, and that are still to come.

The kernel lets such a thread go when the controller dies, but it may have to wait for a CPU
or a lock before it makes the call. Who looks before that finds nothing, and then there is a
descriptor or a mapping; or closes a descriptor whose number the program uses for another
file by the time the thread closes it too.

A call that is injected gets its number at the entry stop, inside the kernel
(``process/inject.py``). So it is over, or never comes, once its thread has been seen

* to stop at our request, or for job control: both are on the way back to user code; or
* asleep, but not in a call of the vDSO's ``syscall`` instruction: the calls that the vDSO
  itself makes there (they read clocks) do not sleep; or
* in the middle of a transfer, from which a stop leaves it alone: none of ours is one.

A thread that is runnable is stopped to be seen; no other is, and no worker of the kernel: calls
are injected into none.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import closing

from optpoline.controller.target import Target
from optpoline.errors import ProcessGone, StopTimeout
from optpoline.model import Mapping
from optpoline.process.busy import is_transferring, moving_between_cpus
from optpoline.process.procfs import RUNS_NO_CODE, list_tids, read_state_char
from optpoline.process.stop import Wake
from optpoline.process.thread_state import ThreadState, ThreadWhere, read_thread_state

__all__ = ["may_call_late", "wait_for_late_calls", "wait_for_late_calls_of"]

_FIRST_PAUSE_S = 0.001
_MAX_PAUSE_S = 0.05
_AFTER_THE_CALL = "TZXx"
"""States of threads that are stopped for job control, or dead: not inside a call any more."""


def wait_for_late_calls(target: Target) -> None:
    """Wait until no thread is about to make, or in, a call that a dead controller injected.

    To be called before looking for what that one has left. No controller may be at work.

    Args:
        target: The process.

    Raises:
        ProcessGone: if there is no such process.
        PermissionDenied: if a thread that runs cannot be traced.
        StopTimeout: if a thread was in such a call all the time.
    """
    vdso = next((m for m in target.maps if m.path == "[vdso]"), None)
    if vdso is not None:  # else nothing can have been injected
        _wait(target, vdso)


def wait_for_late_calls_of(pid: int, *, stop_timeout_s: float = 2.0) -> None:
    """Do so for a process that is looked at for nothing else.

    Args:
        pid: The process.
        stop_timeout_s: How long its threads may take.

    Raises:
        ProcessGone: as ``wait_for_late_calls``.
        PermissionDenied: likewise.
        StopTimeout: likewise.
    """
    with closing(Target(pid, stop_timeout_s=stop_timeout_s)) as target:
        wait_for_late_calls(target)


def _wait(target: Target, vdso: Mapping) -> None:
    """Look at threads until each was seen outside."""
    begin_ns = time.monotonic_ns()
    pause_s = _FIRST_PAUSE_S
    outside: set[int] = set()
    while _look(target.pid, vdso, outside):
        # Nobody runs in here who could start another: who is listed are all there are.
        with target.stop(Wake.NONE) as stop:
            outside |= {thread.tid for thread in stop.stopped}
            # A kernel stack takes long to read, and most of thousands were seen outside before.
            unseen = [tid for tid in stop.asleep if tid not in outside]
            with moving_between_cpus():
                outside |= {tid for tid in unseen if is_transferring(target.pid, tid)}
            left = _look(target.pid, vdso, outside)
        if not left:
            return
        waited_ns = time.monotonic_ns() - begin_ns
        if waited_ns >= target.stop_timeout_ns:
            raise StopTimeout(waited_ns, left, pid=target.pid)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _MAX_PAUSE_S)


def _look(pid: int, vdso: Mapping, outside: set[int]) -> tuple[int, ...]:
    """Add threads that are seen outside; return the others."""
    for tid in _others(pid, outside):
        try:
            if (
                may_call_late(read_thread_state(pid, tid), vdso)
                and read_state_char(pid, tid) not in RUNS_NO_CODE
            ):
                continue
        except ProcessGone:
            pass  # it has exited meanwhile
        outside.add(tid)
    return _others(pid, outside)


def _others(pid: int, outside: Collection[int]) -> tuple[int, ...]:
    """Return the threads of a process that are not among those."""
    return tuple(tid for tid in list_tids(pid) if tid not in outside)


def may_call_late(thread: ThreadState, vdso: Mapping) -> bool:
    """Tell whether a thread, as it was seen, may have an injected call before it or be in it.

    Args:
        thread: What was seen of it; it was not stopped by us.
        vdso: Where the ``syscall`` instruction is that calls are injected at.
    """
    if thread.state in _AFTER_THE_CALL:
        return False
    if thread.where is ThreadWhere.RUNNING:
        return True  # in the kernel or not, that is not to be seen
    return thread.where is ThreadWhere.IN_SYSCALL and vdso.start <= thread.pc < vdso.end
