# SPDX-License-Identifier: Apache-2.0
"""The program that ``run`` starts: its start, its signals, its exit status.

The child gets our file descriptors, environment and process group as they are.
It is never waited for with ``waitpid``: we may be tracing it, and such a wait
eats the tracer's stops. Its exit shows on a pidfd; it is collected at the very end.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from optpoline.errors import OptpolineError

__all__ = ["Child", "Image"]

SETTLE_PERIOD_S = 0.01
"""The loader maps a library every millisecond or so: two equal looks this far apart are enough
to start with, and a library that comes later is found by the session."""

CHANGE_PERIODS_S = (0.05, 1.0)
"""Shortest and longest wait between looks at a program that has no site (yet)."""

LEFT_TO_CHILD = frozenset({signal.SIGINT, signal.SIGQUIT})
"""The terminal sends these to its whole foreground group: the child has them already."""


@dataclass(frozen=True, slots=True)
class Image:
    """Which files a process executes code from: (device, inode) of each."""

    files: frozenset[tuple[str, str]]


class Child:
    """One child process.

    Args:
        command: Program and arguments.
        proc_root: Where procfs is mounted.
    """

    def __init__(self, command: Sequence[str], proc_root: Path = Path("/proc")) -> None:
        """Remember what to start."""
        self.command = tuple(command)
        self.pid = 0
        self.exited = threading.Event()
        self._proc_root = proc_root
        self._pidfd = -1
        self._pending: list[int] = []

    def start(self, on_exit: Callable[[], None]) -> None:
        """Start the program; when this returns it has been executed.

        Args:
            on_exit: Called once from another thread when it has exited.

        Raises:
            FileNotFoundError: if there is no such program.
            OSError: if it cannot be executed.
        """
        if not self.command[0]:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        # Python ignores SIGPIPE and SIGXFSZ, and an ignored signal stays ignored over exec.
        self.pid = os.posix_spawnp(
            self.command[0],
            self.command,
            os.environ,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        )
        self._pidfd = os.pidfd_open(self.pid)
        for number in self._pending:
            self.relay(number)
        watcher = threading.Thread(
            target=self._watch_exit, args=(on_exit,), name="child exit", daemon=True
        )
        watcher.start()

    def relay(self, number: int) -> None:
        """Hand on a signal we got; reentrant, for use in a signal handler."""
        if number in LEFT_TO_CHILD:
            return
        if self._pidfd < 0:
            self._pending.append(number)
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def wait_settled(self) -> Image | None:
        """Wait until its libraries seem to be mapped; None if it exited before."""
        previous: Image | None = None
        while not self.exited.wait(SETTLE_PERIOD_S):
            current = self._read_image()
            if current is not None and current == previous:
                return current
            previous = current
        return None

    def wait_changed(self, image: Image) -> None:
        """Wait until it executes code from other files than those, or exited."""
        period_s, longest_s = CHANGE_PERIODS_S
        while not self.exited.wait(period_s):
            if self._read_image() != image:
                return
            period_s = min(longest_s, period_s * 2)

    def wait_status(self) -> int:
        """Wait for its exit and return the status to pass on: 128+n for signal n.

        Raises:
            OptpolineError: if somebody else collected it.
        """
        self.exited.wait()
        try:
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        except ChildProcessError as error:
            raise OptpolineError(f"the exit status of process {self.pid} is lost") from error
        finally:
            os.close(self._pidfd)
            self._pidfd = -1
        if result is None:
            raise OptpolineError(f"the exit status of process {self.pid} is lost")
        return result.si_status + (0 if result.si_code == os.CLD_EXITED else 128)

    def _read_image(self) -> Image | None:
        """Look at its mappings; None while there are none to be seen."""
        try:
            lines = (self._proc_root / str(self.pid) / "maps").read_text().splitlines()
        except OSError:
            return None
        files: set[tuple[str, str]] = set()
        for line in lines:
            _addresses, perms, _offset, device, inode, *_path = line.split(None, 5)
            if perms[2] == "x" and inode != "0":
                files.add((device, inode))
        return Image(frozenset(files)) if files else None

    def _watch_exit(self, on_exit: Callable[[], None]) -> None:
        """Wait on the pidfd, which becomes readable at the exit."""
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        poller.poll()
        self.exited.set()
        on_exit()
