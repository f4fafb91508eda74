# SPDX-License-Identifier: Apache-2.0
"""Learn which processes have been started since the last look at all of them.

What is asked of every process is asked once: the kernel counts all forks, and no fork
means nobody new. After one the directory of processes is read, which takes 0.6 ms for a
thousand of them; who was there before and has kept its number is left out.

Two things make that exact. A process is in the directory before the fork is counted. And
numbers are handed out in a circle: one that was used again since the last look lies
between the last one handed out then and the last one now.
"""

from __future__ import annotations

import os
import time

from optpoline.errors import PermissionDenied

__all__ = ["BirthWatch", "count_forks"]

_FORKS_KEY = b"processes "

_MAX_FORKS = 1_000
_MAX_AGE_S = 0.25
"""How far back a listing may be to tell who is new: numbers must not have gone full circle,
of 32,768 at least where many are in use. Forks that fail use them up, too, uncounted."""


class BirthWatch:
    """Lists processes that may be new."""

    def __init__(self) -> None:
        """Begin; everybody is new."""
        self._n_forks = -_MAX_FORKS
        self._last_pid = 0
        self._seen: frozenset[int] = frozenset()
        self._listed_s = 0.0

    @property
    def is_current(self) -> bool:
        """Whether nothing at all was forked since the last listing began."""
        return count_forks() == self._n_forks

    def list_new(self) -> tuple[int, ...]:
        """Return the processes that may have been started since the last listing began.

        Empty if nothing was forked. All of them the first time, or after a while.
        """
        n_forks = count_forks()
        if n_forks == self._n_forks:
            return ()
        now_s, last_pid = time.monotonic(), _read_last_pid()
        # Listed after both were read: a later fork shows next time.
        pids = _list_pids()
        new = pids
        if n_forks - self._n_forks < _MAX_FORKS and now_s - self._listed_s < _MAX_AGE_S:
            new = frozenset(
                pid
                for pid in pids
                if pid not in self._seen or _is_between(self._last_pid, pid, last_pid)
            )
        self._n_forks, self._last_pid = n_forks, last_pid
        self._seen, self._listed_s = pids, now_s
        return tuple(sorted(new))


def _list_pids() -> frozenset[int]:
    """Return every process there is."""
    try:
        return frozenset(int(name) for name in os.listdir("/proc") if name.isdigit())
    except OSError as error:
        raise PermissionDenied(f"we may not read /proc: {error.strerror}") from error


def _is_between(first: int, pid: int, last: int) -> bool:
    """Tell whether a number was handed out after ``first``, and ``last`` at the latest.

    >>> _is_between(10, 12, 20), _is_between(10, 9, 20), _is_between(20, 9, 10)
    (True, False, True)
    """
    if first <= last:
        return first < pid <= last
    return pid > first or pid <= last


def count_forks() -> int:
    """Return how many processes and threads the machine has started since boot."""
    for line in _read("/proc/stat").splitlines():
        if line.startswith(_FORKS_KEY):
            return int(line.split()[1])
    return -1


def _read_last_pid() -> int:
    """Return the process or thread id that was handed out last."""
    return int(_read("/proc/loadavg").split()[-1])


def _read(path: str) -> bytes:
    """Read a file that is always there."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError as error:
        raise PermissionDenied(f"we may not read {path}: {error.strerror}") from error
