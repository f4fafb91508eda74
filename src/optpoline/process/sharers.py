# SPDX-License-Identifier: Apache-2.0
"""Find other processes that run in the same address space.

A vfork child, and a process made by clone(CLONE_VM) without CLONE_THREAD,
execute the target's text without being in its thread list. They are looked for
where they can be: among the children of its threads, theirs in turn, and its
parent. The parent of a running vfork child sleeps uninterruptibly until the
child executes another program or exits.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable

from optpoline.errors import AttachError, OptpolineError, ProcessGone
from optpoline.process.leader import find_live_tid
from optpoline.process.procfs import list_tids, read_maps, read_status

__all__ = ["find_sharers", "has_same_memory"]

_SYS_KCMP = 312
_KCMP_VM = 1
_libc = ctypes.CDLL(None, use_errno=True)


def find_sharers(pid: int, *, tids: Iterable[int] | None = None) -> tuple[int, ...]:
    """Return the other processes in the address space of a process.

    Args:
        pid: The process.
        tids: Only look among the children of these threads; None for all of
            its threads and its parent.

    Raises:
        ProcessGone: if the process does not exist.
    """
    if tids is None:
        tids = list_tids(pid)
        candidates = [read_status(pid).ppid]
    else:
        candidates = []
    seen, sharers = {0, 1, pid}, []
    candidates += [child for tid in tids for child in _list_children(pid, tid)]
    while candidates:
        candidate = candidates.pop()
        if candidate in seen:
            continue
        seen.add(candidate)
        if not has_same_memory(pid, candidate):
            continue
        sharers.append(candidate)
        try:
            for tid in list_tids(candidate):
                candidates += _list_children(candidate, tid)
            candidates.append(read_status(candidate).ppid)
        except ProcessGone:
            sharers.remove(candidate)
    return tuple(sorted(sharers))


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


def _list_children(pid: int, tid: int) -> list[int]:
    """Return the processes a thread has started and that still exist."""
    try:
        with open(f"/proc/{pid}/task/{tid}/children", "rb", buffering=0) as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []  # the thread is gone; its children are its siblings' now
