# SPDX-License-Identifier: Apache-2.0
"""Find other processes that run in the same address space.

A vfork child, and a process made by clone(CLONE_VM) without CLONE_THREAD,
execute the target's text without being in its thread list. Nothing leads to them: with
CLONE_PARENT, or when their parent has exited, they are children of somebody else. So all
processes are looked at, once each. Where exec has laid out code and stack tells most of
them apart at little cost, kcmp(2) the rest.
"""

from __future__ import annotations

import ctypes
import errno
import os

from optpoline.errors import AttachError, OptpolineError, ProcessGone, Unsettled
from optpoline.process.births import BirthWatch
from optpoline.process.leader import find_live_tid
from optpoline.process.procfs import read_layout, read_maps, read_start_time

__all__ = ["SharerFinder", "find_sharers", "has_same_memory"]

_SYS_KCMP = 312
_KCMP_VM = 1
_MAX_PASSES = 640
"""Looks at those who are new, until there is none; one takes 0.2 ms, 1 ms at most. Threads
count as well: at 23,000 of them a second one look in ten saw nobody started meanwhile, and
64 looks were too few, now and then, to let go of such a program."""

_libc = ctypes.CDLL(None, use_errno=True)


class SharerFinder:
    """Finds the processes in one process's address space, and remembers them.

    The first look takes some 30 ms for 1,000 processes, one soon after it less than 1 ms.

    Args:
        pid: The process.
    """

    def __init__(self, pid: int) -> None:
        """Know nobody yet."""
        self._pid = pid
        self._births = BirthWatch()
        self._known: dict[int, int] = {}
        self._unasked: set[int] = set()

    def find(self) -> tuple[int, ...]:
        """Return all of them.

        Raises:
            ProcessGone: if the process does not exist.
            Unsettled: if others are started faster than they can be looked at.
        """
        for _ in range(_MAX_PASSES):
            found = self.look()
            if self._births.is_current:
                return found
        raise Unsettled

    def look(self) -> tuple[int, ...]:
        """Return those that one look finds, and those that were found before and remain.

        That is all of them if no thread of any ran meanwhile; otherwise one may have
        started another that does not show.

        Raises:
            ProcessGone: if the process does not exist.
        """
        for pid in tuple(self._known):
            if not self._is_known(pid):
                del self._known[pid]
        # Kept across an error, for who is new is told once.
        self._unasked |= set(self._births.list_new()) - {self._pid}
        layout = _find_layout(self._pid) if self._unasked else ()
        if self._unasked and not any(layout):
            raise ProcessGone(self._pid)  # it has no memory any more, as threads of the kernel
        while self._unasked:
            pid = next(iter(self._unasked))
            try:
                if _find_layout(pid) == layout:
                    start_time = read_start_time(pid)
                    if has_same_memory(self._pid, pid):
                        self._known[pid] = start_time
            except ProcessGone:
                pass
            self._unasked.discard(pid)
        return tuple(sorted(self._known))

    def _is_known(self, pid: int) -> bool:
        """Tell whether a process that was found is the same, and runs the same program."""
        try:
            return read_start_time(pid) == self._known[pid] and has_same_memory(self._pid, pid)
        except ProcessGone:
            return False


def find_sharers(pid: int) -> tuple[int, ...]:
    """Return the other processes in the address space of a process.

    Raises:
        ProcessGone: if the process does not exist.
        Unsettled: if others are started faster than they can be looked at.
    """
    return SharerFinder(pid).find()


def has_same_memory(pid: int, other_pid: int) -> bool:
    """Say whether two processes run in one address space.

    Raises:
        OptpolineError: if the kernel cannot tell.
    """
    # A first thread that has exited has no memory: one that lives answers for its process.
    tid, other_tid = find_live_tid(pid), find_live_tid(other_pid)
    result = int(_libc.syscall(_SYS_KCMP, tid, other_tid, _KCMP_VM, 0, 0))
    if result >= 0:
        return result == 0
    number = ctypes.get_errno()
    # ESRCH: one of them is gone. EPERM: other credentials than ours, while whoever
    # shares memory without an exec has kept the target's, which we may trace.
    if number in (errno.ESRCH, errno.EPERM):
        return False
    if number == errno.ENOSYS:
        # Built without CONFIG_KCMP. A plain fork has the same map too; stopping it
        # as well does no harm.
        try:
            return read_maps(pid) == read_maps(other_pid)
        except AttachError:
            return False
    raise OptpolineError(
        f"cannot compare the memory of processes {pid} and {other_pid}: {os.strerror(number)}"
    )


def _find_layout(pid: int) -> tuple[int, ...]:
    """Return where code and stack of a process were laid out, zeros if it has no memory."""
    layout = read_layout(pid)
    if not any(layout) and (tid := find_live_tid(pid)) != pid:
        return read_layout(tid)
    return layout
