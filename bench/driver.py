# SPDX-License-Identifier: Apache-2.0
"""A long-lived process of one variant, which does one iteration of work when asked.

The protocol, the same for every program: it prints ``ready``; for each line it gets it
does its work once and prints ``NANOSECONDS RESULT``. The time is its own CPU time, which
other load on the machine disturbs less than the clock on the wall. The result has to be
the same each time and in each variant: a promotion that changed what a program computes
must never look like a fast one.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from bench.errors import BenchError

__all__ = ["Driver"]

_ANSWER_S = 120.0
"""Longest wait for an answer: iterations take 0.02 to 0.3 s, so this means a hang."""


class Driver:
    """One running variant; leaving the ``with`` block ends it.

    Args:
        name: What to call it in errors.
        argv: Command that speaks the protocol.
        cwd: Its working directory.
    """

    def __init__(self, name: str, argv: Sequence[str], *, cwd: Path | None = None) -> None:
        """Start the process and wait until it is ready."""
        self.name = name
        self.result: str | None = None
        self._buffer = b""
        self._process = subprocess.Popen(
            argv, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise BenchError(f"{name} has no standard input or output")
        self._input, self._output = self._process.stdin, self._process.stdout
        try:
            answer = self._read_line()
            if answer != "ready":
                raise BenchError(f"{name} said {answer!r} instead of ready")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def iterate(self) -> int:
        """Let it do its work once.

        Returns:
            CPU time it took, in nanoseconds.

        Raises:
            BenchError: if it dies, hangs, or computes something else than before.
        """
        elapsed, _, result = self.ask("").partition(" ")
        if self.result is not None and result != self.result:
            raise BenchError(f"{self.name} computed {result}, and {self.result} before")
        self.result = result
        return int(elapsed)

    def ask(self, line: str) -> str:
        """Send a line; return the line it answers with.

        Raises:
            BenchError: if it dies or hangs.
        """
        try:
            self._input.write(f"{line}\n".encode())
        except OSError as error:
            raise BenchError(f"{self.name} is gone: {error.strerror}") from error
        return self._read_line()

    def close(self) -> None:
        """End the process: it stops at the end of its input, and is killed if it does not."""
        self._input.close()
        self._output.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Driver:
        """Return the running driver."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()

    def _read_line(self) -> str:
        """Read one line of its answer, within the time allowed."""
        stream = self._output.fileno()
        deadline = time.monotonic() + _ANSWER_S
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([stream], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise BenchError(f"{self.name} did not answer within {_ANSWER_S:.0f} s")
            piece = os.read(stream, 65536)
            if not piece:
                status = self._process.wait()
                raise BenchError(f"{self.name} ended with status {status} instead of answering")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace").strip()
