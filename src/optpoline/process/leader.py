# SPDX-License-Identifier: Apache-2.0
"""A process of which some threads, or all, have exited or are about to.

``/proc/PID`` shows the first thread. Once that one has exited (pthread_exit in
``main``) it is a zombie until the last thread goes: its memory map is empty, and
so are its files. Everything is still there under the id of any other thread:
``/proc/TID`` is looked up by thread, though only processes are listed. Workers of the
kernel are no threads of it in this: one of which nothing else is left has ended.
"""

from __future__ import annotations

from pathlib import Path

from optpoline.errors import OptpolineError
from optpoline.process.proc_files import read_stat_fields, read_status_fields
from optpoline.process.procfs import (
    RUNS_NO_CODE,
    decode_state_char,
    list_every_tid,
    list_tids,
    read_state_char,
)

__all__ = ["find_live_tid", "has_ended", "is_exiting"]

_PROC = Path("/proc")
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
        if read_state_char(pid, pid, proc_root=proc_root) not in RUNS_NO_CODE:
            return pid
        tids = list_every_tid(pid, proc_root=proc_root)
    except OptpolineError:
        return pid
    for tid in tids:
        try:
            if read_state_char(pid, tid, proc_root=proc_root) not in RUNS_NO_CODE:
                return tid
        except OptpolineError:
            continue  # it has exited meanwhile
    return pid


def has_ended(pid: int, *, proc_root: Path = _PROC) -> bool:
    """Say whether every thread of a process is dead, but perhaps for workers of the kernel.

    Those of a ring of io_uring that they poll themselves hold its file, and stay until
    somebody kills them.
    """
    try:
        tid = find_live_tid(pid, proc_root=proc_root)
        return read_state_char(pid, tid, proc_root=proc_root) in RUNS_NO_CODE
    except OptpolineError:
        return True


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
    return all(_is_ending(f"{proc_root}/{pid}/task/{tid}", tid) for tid in tids)


def _is_ending(task_dir: str, tid: int) -> bool:
    """Say whether a thread is dead, or will be without running its code again."""
    try:
        fields = read_stat_fields(f"{task_dir}/stat", tid)
        status = read_status_fields(f"{task_dir}/status", tid)
    except OptpolineError:
        return True
    if decode_state_char(fields) in RUNS_NO_CODE or int(fields[6]) & _PF_EXITING:
        return True
    return bool(int(status["SigPnd"], 16) & _SIGKILL_BIT)
