# SPDX-License-Identifier: Apache-2.0
"""A started program of ``torture/targets``: asked by lines on its standard input.

The protocol is that of ``tests/targets``: it prints "ready", answers each line with a line,
and ends by itself with status 0 when its standard input is closed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence

from torture.errors import TortureError

__all__ = ["NICE", "Program", "TargetDied"]

NICE = 10
"""A target with more busy threads than there are CPUs makes a controller of equal priority
wait 20 ms for each of its turns; what is to be tortured is the target."""

_START_S = 30.0
_ANSWER_S = 30.0
_END_S = 30.0


class TargetDied(TortureError):
    """The program ended, or fell silent, while a row was at it.

    Attributes:
        signal: Number of the signal that killed it, or None.
    """

    def __init__(self, message: str, *, number: int | None = None) -> None:
        """Keep the signal."""
        super().__init__(message)
        self.signal = number


class Program:
    """A running target; leaving the ``with`` block kills what still runs."""

    def __init__(self, command: Sequence[str], *, nice: int = 0) -> None:
        """Start it and wait for its "ready".

        Args:
            command: The program and its arguments.
            nice: Its niceness; ``NICE`` where controllers are to get their turns.

        Raises:
            TortureError: if it does not say so.
        """
        self._name = os.path.basename(command[0])
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            ["nice", "-n", str(nice), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            bufsize=0,
        )
        self.pid = self._process.pid
        self._buffer = b""
        try:
            if (answer := self._read_line(_START_S)) != "ready":
                raise TortureError(f"{self._name} said {answer!r}, not that it is ready")
        except BaseException:
            self.kill()
            raise

    def tell(self, line: str) -> None:
        """Send it a line that it does not answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except BrokenPipeError as error:
            raise self._death("took no more input") from error

    def ask(self, line: str, *, timeout_s: float = _ANSWER_S) -> str:
        """Send it a line; return its answer.

        Raises:
            TargetDied: if it ended or does not answer in time.
        """
        self.tell(line)
        return self._read_line(timeout_s)

    def ask_numbers(self, line: str, *, timeout_s: float = _ANSWER_S) -> dict[str, int]:
        """Send it a line; read an answer of the form ``name=number name=number``."""
        answer = self.ask(line, timeout_s=timeout_s)
        try:
            pairs = [word.split("=", 1) for word in answer.split()]
            return {name: int(number) for name, number in pairs}
        except ValueError as error:
            raise TargetDied(f"{self._name} answered {line!r} with {answer!r}") from error

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        if self._process.returncode is not None:
            return False
        # waitid and not poll(): a wait(2) of ours would eat the stops of a traced child.
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def finish(self) -> None:
        """Close its input; check that it ends with status 0.

        Raises:
            TargetDied: if it ends otherwise, or not at all.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        deadline = time.monotonic() + _END_S
        while self.is_alive():
            if time.monotonic() > deadline:
                raise TargetDied(f"{self._name} did not end within {_END_S:.0f} s")
            time.sleep(0.005)
        if self._process.wait() != 0:
            raise self._death("was to end by itself")

    def kill(self) -> None:
        """End it, however it stands."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._words.close()

    def __enter__(self) -> Program:
        """Return the running program."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.kill()

    def _read_line(self, timeout_s: float) -> str:
        """Return the next line that it prints."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([fd], [], [], left_s)[0]:
                raise TargetDied(f"{self._name} does not answer within {timeout_s:.0f} s")
            if not (piece := os.read(fd, 65536)):
                raise self._death("closed its output")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace")

    def _death(self, what: str) -> TargetDied:
        """Say how it ended."""
        try:
            status = self._process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            return TargetDied(f"{self._name} {what} and runs on")
        self._words.seek(0)
        words = self._words.read().decode(errors="replace").strip()
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        message = f"{self._name} {what}: {how}" + (f": {words[-500:]}" if words else "")
        return TargetDied(message, number=-status if status < 0 else None)
