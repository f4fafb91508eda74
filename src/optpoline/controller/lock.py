# SPDX-License-Identifier: Apache-2.0
"""One controller a target: a lock that vanishes with its holder, however it dies.

An abstract Unix socket address is taken by at most one socket, is released by
the kernel when its holder exits, and leaves no file behind. It names the target
by pid and start time, so that a reused pid is another lock.
"""

from __future__ import annotations

import errno
import socket

from optpoline.controller.left_arenas import find_arenas, is_controller_alive
from optpoline.errors import ControllerActive, OptpolineError
from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import read_maps, read_start_time

__all__ = ["ControllerLock", "find_controller"]


def find_controller(pid: int) -> int | None:
    """Return the controller that works on a process; None if none does, or is to be seen.

    Its arenas say who made them. A forked child's name its parent as their target: nobody
    works on the child.
    """
    try:
        with RemoteMemory(pid) as memory:
            headers = [arena.header for arena in find_arenas(memory, read_maps(pid))]
    except OptpolineError:
        return None
    for header in headers:
        if header is not None and header.target_pid == pid and is_controller_alive(header):
            return header.controller_pid
    return None


class ControllerLock:
    """Held from construction until ``release``.

    Args:
        pid: The target.

    Raises:
        ControllerActive: if another controller holds it.
        ProcessGone: if there is no such process.
    """

    def __init__(self, pid: int) -> None:
        """Take the lock."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.bind(f"\0optpoline-{pid}-{read_start_time(pid)}")
        except OSError as error:
            self._socket.close()
            if error.errno == errno.EADDRINUSE:
                raise _busy(pid) from error
            raise OptpolineError(
                f"process {pid} cannot be locked against other controllers: {error.strerror}",
                hint="a security module or seccomp may keep optpoline from Unix sockets",
            ) from error
        except BaseException:
            self._socket.close()
            raise

    def release(self) -> None:
        """Let others attach."""
        self._socket.close()


def _busy(pid: int) -> ControllerActive:
    """Return the error that names the lock's holder, as far as that is to be seen."""
    holder = find_controller(pid)
    if holder is None:
        # It has no arena yet, or undoes what another one has left.
        return ControllerActive(
            f"another optpoline controller works on process {pid}", hint="end that one first"
        )
    return ControllerActive(
        f"another optpoline controller, process {holder}, works on process {pid}",
        hint=f"end that one first (kill {holder})",
    )
