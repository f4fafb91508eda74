# SPDX-License-Identifier: Apache-2.0
"""Which processes can be forks of a program, when their memory may not be read.

What everybody may read of a process says enough about most others. A fork that has run no
other program

1. was started after what it is suspected of having;
2. is of a user that the program is, or could become: anybody if that has CAP_SETUID, or if
   the fork has gone into a user namespace of its own; and
3. has a parent of the family, or one young enough to have been of the family before it ran
   another program itself; or one that orphans are handed to, which is an ancestor of the
   program, or the first process of a namespace.

Who fails one of these once is no fork, whatever becomes of it.
"""

from __future__ import annotations

import os
import time

from optpoline.errors import AttachError, ProcessGone
from optpoline.process.procfs import ProcessStatus, read_start_time, read_status
from optpoline.process.sharers import SharerFinder

__all__ = ["Kinship", "now_ticks"]

_CAP_SETUID = 1 << 7  # include/uapi/linux/capability.h
_N_NS_PER_S = 1_000_000_000
_DEAD_STATES = "ZX"


def now_ticks() -> int:
    """Return the time in clock ticks since boot, as ``read_start_time`` does."""
    now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return now_ns * os.sysconf("SC_CLK_TCK") // _N_NS_PER_S


class Kinship:
    """What is known of one program's family.

    Args:
        pid: The program.
        since: Its forks before that do not count, in clock ticks since boot; None for
            its own start.
    """

    def __init__(self, pid: int, *, since: int | None = None) -> None:
        """Read what may change: who its ancestors are, and its user."""
        self._since = since or 0
        self._uids: frozenset[int] | None = None
        self._uid_map = b""
        self._elders = {pid}
        try:
            status = read_status(pid)
            self._since = read_start_time(pid) if since is None else since
            self._elders |= {*_find_ancestors(status), *SharerFinder(pid).look()}
        except ProcessGone:
            self._since = now_ticks()  # whose forks they are cannot be told any more
            return
        self._uid_map = _read_uid_map(pid)
        if self._uid_map and not status.cap_prm & _CAP_SETUID:
            self._uids = frozenset(status.uids)

    def is_kin(self, pid: int, start: int) -> bool:
        """Tell whether a process can be a fork of the program that has run no other.

        Args:
            pid: The process.
            start: When it was started, in clock ticks since boot.
        """
        if start < self._since:
            return False
        try:
            status = read_status(pid)
        except ProcessGone:
            return False
        except AttachError:
            return True
        if status.is_kernel_thread or (status.state in _DEAD_STATES and status.n_threads <= 1):
            return False
        if not self._may_have_uids(status):
            return False
        return status.ppid in self._elders or self._may_adopt(status.ppid)

    def _may_have_uids(self, status: ProcessStatus) -> bool:
        """Tell whether a fork of the program can be this user's."""
        if self._uids is None or self._uids >= frozenset(status.uids):
            return True
        return _read_uid_map(status.pid) != self._uid_map

    def _may_adopt(self, pid: int) -> bool:
        """Tell whether forks of the program can be children of a process that is no elder."""
        try:
            return read_start_time(pid) >= self._since or read_status(pid).ns_pids[-1] == 1
        except AttachError:
            return True  # gone by now, or out of our sight


def _find_ancestors(status: ProcessStatus) -> set[int]:
    """Return the processes that a process comes from, as far as they live."""
    ancestors: set[int] = set()
    while status.ppid not in ancestors:
        ancestors.add(status.ppid)
        if status.ppid:
            try:
                status = read_status(status.ppid)
            except AttachError:
                break
    return ancestors


def _read_uid_map(pid: int) -> bytes:
    """Return how users of a process's namespace are numbered; empty if it cannot be read."""
    try:
        with open(f"/proc/{pid}/uid_map", "rb", buffering=0) as file:
            return file.readall()
    except OSError:
        return b""
