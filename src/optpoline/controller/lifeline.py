# SPDX-License-Identifier: Apache-2.0
"""Notice the end of the program at once, and say how it ended.

A session waits nowhere else: whoever sleeps here is woken by the program's exit.
"""

from __future__ import annotations

import os
import select
import time

from optpoline.controller.standing import Standing
from optpoline.controller.summary import SessionState
from optpoline.controller.target import Target
from optpoline.errors import ProcessGone
from optpoline.process.leader import has_ended

__all__ = ["Lifeline"]

_EXIT_POLL_S = 0.01
_EXIT_TIMEOUT_S = 5.0
"""How long a killed program may take to free its memory; then it counts as exited."""


class Lifeline:
    """A descriptor of the process, which becomes readable when it exits.

    Args:
        pid: The process.
        standing: Of its session.

    Raises:
        ProcessGone: if there is no such process.
    """

    def __init__(self, pid: int, standing: Standing) -> None:
        """Open the descriptor."""
        self._pid = pid
        self._standing = standing
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise ProcessGone(pid) from error

    def close(self) -> None:
        """Close the descriptor; harmless when done twice."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def sleep(self, seconds: float) -> None:
        """Sleep, or raise ``ProcessGone`` as soon as the target exits."""
        readable, _, _ = select.select([self._pidfd], [], [], max(0.0, seconds))
        if readable:
            self._standing.state = SessionState.EXITED
            raise ProcessGone(self._pid)

    def find_end(self, target: Target) -> SessionState | None:
        """Return how the program that we attached to ended, by exit or by exec.

        None if it runs on: what was gone was one of its threads.
        """
        end_s = time.monotonic() + _EXIT_TIMEOUT_S
        while time.monotonic() < end_s:
            # A killed program may be on its way out for a while; its exit shows here.
            if select.select([self._pidfd], [], [], _EXIT_POLL_S)[0]:
                return SessionState.EXITED
            if target.is_replaced():
                return SessionState.EXECED
            if has_ended(self._pid):
                return SessionState.EXITED  # it may be kept by workers of the kernel
        return None if target.memory.is_current() else SessionState.EXITED
