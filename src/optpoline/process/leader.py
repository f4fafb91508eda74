# SPDX-License-Identifier: Apache-2.0
"""A process whose first thread has exited while others run on.

``/proc/PID`` shows the first thread. Once that one has exited (pthread_exit in
``main``) it is a zombie until the last thread goes: its memory map is empty, and
so are its files. Everything is still there under the id of any other thread:
``/proc/TID`` is looked up by thread, though only processes are listed.
"""

from __future__ import annotations

from pathlib import Path

from optpoline.errors import OptpolineError
from optpoline.process.procfs import list_tids, read_state_char

__all__ = ["find_live_tid"]

_PROC = Path("/proc")
_DEAD_STATES = "ZXx"


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
        tids = list_tids(pid, proc_root=proc_root)
    except OptpolineError:
        return pid
    for tid in tids:
        try:
            if read_state_char(pid, tid, proc_root=proc_root) not in _DEAD_STATES:
                return tid
        except OptpolineError:
            continue  # it has exited meanwhile
    return pid
