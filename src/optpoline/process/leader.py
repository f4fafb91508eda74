# SPDX-License-Identifier: Apache-2.0
"""A process of which some threads, or all, have exited or are about to.

``/proc/PID`` shows the first thread. Once that one has exited (pthread_exit in
``main``) it is a zombie until the last thread goes: its memory map is empty, and
so are its files. Everything is still there under the id of any other thread:
``/proc/TID`` is looked up by thread, though only processes are listed.
"""

from __future__ import annotations

from pathlib import Path

from optpoline.errors import OptpolineError
from optpoline.process.procfs import list_every_tid, list_tids, read_state_char

__all__ = ["find_live_tid", "is_exiting"]

_PROC = Path("/proc")
_DEAD_STATES = "ZXx"
_PF_EXITING = 0x4  # include/linux/sched.h; field 9 of /proc/PID/stat
_SIGKILL_BIT = 1 << 8


def find_live_tid(pid: int, *, proc_root: Path = _PROC) -> int:
    """Return a thread whose directory shows the process: its first one if that lives.

    A process that is gone, or all dead, keeps its own id: whoever reads on meets that.

    Args:
        pid: The process.
        proc_root: Where procfs is mounted.
    """
    try:
        if read_state_char(pid, pid, proc_root=proc_root) not in _DEAD_STATES:
            return pid
        tids = list_every_tid(pid, proc_root=proc_root)
    except OptpolineError:
        return pid
    for tid in tids:
        try:
            if read_state_char(pid, tid, proc_root=proc_root) not in _DEAD_STATES:
                return tid
        except OptpolineError:
            continue  # it has exited meanwhile
    return pid


def is_exiting(pid: int, *, proc_root: Path = _PROC) -> bool:
    """Say whether no thread of a process will run its code again.

    Between a kill, or exit_group(), and the end of a thread it can be neither stopped
    nor told from one that sleeps; but SIGKILL is pending for it, or it is flagged.

    Args:
        pid: The process.
        proc_root: Where procfs is mounted.
    """
    try:
        tids = list_tids(pid, proc_root=proc_root)
    except OptpolineError:
        return True
    return all(_is_ending(proc_root / str(pid) / "task" / str(tid)) for tid in tids)


def _is_ending(task_dir: Path) -> bool:
    """Say whether a thread is dead, or will be without running its code again."""
    try:
        fields = (task_dir / "stat").read_text(errors="replace").rpartition(")")[2].split()
        status = (task_dir / "status").read_text(errors="replace")
    except OSError:
        return True
    if not fields or fields[0] in _DEAD_STATES or int(fields[6]) & _PF_EXITING:
        return True
    pending = (line for line in status.splitlines() if line.startswith("SigPnd:"))
    return any(int(line.split()[1], 16) & _SIGKILL_BIT for line in pending)
