# SPDX-License-Identifier: Apache-2.0
"""One controller a target: a lock that vanishes with its holder, however it dies.

An abstract Unix socket address is taken by at most one socket, is released by
the kernel when its holder exits, and leaves no file behind. It names the target
by pid and start time, so that a reused pid is another lock.
"""

from __future__ import annotations

import errno
import socket

from optpoline.errors import ControllerActive, OptpolineError
from optpoline.process.procfs import read_start_time

__all__ = ["ControllerLock"]


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
                raise ControllerActive(
                    f"another optpoline controller works on process {pid}",
                    hint="end that one first",
                ) from error
            raise OptpolineError(f"cannot lock process {pid}: {error}") from error
        except BaseException:
            self._socket.close()
            raise

    def release(self) -> None:
        """Let others attach."""
        self._socket.close()
