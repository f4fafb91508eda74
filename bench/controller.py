# SPDX-License-Identifier: Apache-2.0
"""optpoline at work on a variant: the command a user would type, as a subprocess.

This is the one place of the benchmarks that knows the command line and what it writes.
The command is killed by nobody: it ends on SIGINT, as from Ctrl-C, and then writes its
summary.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import cast

from bench.errors import BenchError
from bench.paths import OPTPOLINE

__all__ = [
    "ATTACHED_LINE",
    "LEARNING_LINE",
    "PROMOTED_LINE",
    "Controller",
    "Summary",
    "attach_and_settle",
]

ATTACHED_LINE = "attached: "
LEARNING_LINE = "learning "
PROMOTED_LINE = "promoted "
"""How the lines begin that tell of its progress."""

_PROMOTED_S = 30.0
"""Longest wait for the first promotion; it is due after the learning window of 1 s."""

_QUIET_S = 2.0
"""Settled means: nothing said about promotions for so long, while the program worked."""

_SETTLED_S = 20.0
"""After this a controller that keeps changing its mind is measured as it is."""

_END_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the command wrote at its end, as far as the benchmarks use it.

    Attributes:
        state: Its word for how it ended.
        sites: Sites found.
        promoted: Sites promoted at the end.
        hit_rate: Share of the branches that met a guard, 0..1, or None if not known.
        stops: How often the program was stopped.
        stop_ms_max: Longest of these, first interrupt to last detach.
        stop_ms_total: All of them together.
        learning_s: Seconds spent learning.
        promoted_functions: Functions that had a promoted site at the end, by name.
    """

    state: str
    sites: int
    promoted: int
    hit_rate: float | None
    stops: int
    stop_ms_max: float
    stop_ms_total: float
    learning_s: float
    promoted_functions: tuple[str, ...]

    @classmethod
    def from_file(cls, path: Path) -> Summary:
        """Read a ``--json`` file.

        Raises:
            BenchError: if it is missing or not of the form that we know.
        """
        try:
            fields = cast(dict[str, object], json.loads(path.read_text()))
            rate = fields["hit_rate"]
            return cls(
                state=str(fields["state"]),
                sites=int(cast(int, fields["n_sites"])),
                promoted=int(cast(int, fields["promoted"])),
                hit_rate=None if rate is None else float(cast(float, rate)),
                stops=int(cast(int, fields["stops"])),
                stop_ms_max=float(cast(float, fields["stop_ms_max"])),
                stop_ms_total=float(cast(float, fields["stop_ms_total"])),
                learning_s=float(cast(float, fields["learning_s"])),
                promoted_functions=_promoted_functions(fields["sites"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchError(f"optpoline's summary cannot be read: {error!r}") from error


def _promoted_functions(sites: object) -> tuple[str, ...]:
    """Return the functions of the promoted ones of a summary's sites."""
    found: set[str] = set()
    for site in cast(list[dict[str, object]], sites):
        if site["state"] == "promoted":
            name, _, _ = str(site["function"]).partition("+")
            found.add(name)
    return tuple(sorted(found))


class Controller:
    """A running ``optpoline attach``; leaving the ``with`` block ends it as Ctrl-C does.

    Attributes:
        summary: What it wrote at its end; None before.
        work: (time of the clock on the wall at the end, time reported) of each piece of
            work done while it learned and settled, in nanoseconds.
    """

    def __init__(self, pid: int, *, extra: tuple[str, ...] = ()) -> None:
        """Start the command on a process."""
        self.summary: Summary | None = None
        self.work: list[tuple[int, int]] = []
        self.started_ns = time.monotonic_ns()
        self._lines: list[tuple[int, str]] = []
        self._directory = Path(tempfile.mkdtemp(prefix="optpoline-"))
        self._json = self._directory / "summary.json"
        self._process = subprocess.Popen(
            [str(OPTPOLINE), "attach", str(pid), "--verbose", "--json", str(self._json), *extra],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read_lines, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id of the command."""
        return self._process.pid

    def is_running(self) -> bool:
        """Whether the command has not ended yet."""
        return self._process.poll() is None

    def said_ns(self, word: str) -> int | None:
        """When it first wrote a line that begins with a word; None if never."""
        return next((at for at, line in list(self._lines) if line.startswith(word)), None)

    def promotions(self) -> list[tuple[int, int]]:
        """When it told of sites promoted that were not before, and how many."""
        lines = [(at, line) for at, line in list(self._lines) if line.startswith(PROMOTED_LINE)]
        return [(at, int(line.split()[1])) for at, line in lines]

    def told_ns(self, word: str) -> list[int]:
        """When it wrote each line that has a word in it."""
        return [at for at, line in list(self._lines) if word in line]

    def said_last_ns(self, word: str, before_ns: int) -> int | None:
        """When it last wrote a line that begins with a word before some time; None if never."""
        lines = reversed(list(self._lines))
        return next((at for at, line in lines if at < before_ns and line.startswith(word)), None)

    def last_said_ns(self) -> int:
        """When it wrote its last line; 0 if it wrote none."""
        lines = list(self._lines)
        return lines[-1][0] if lines else 0

    def words(self) -> str:
        """Its last lines, for an error message."""
        return "\n".join(line for _, line in self._lines[-12:])

    def close(self) -> None:
        """End the command as Ctrl-C does and read its summary, once."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            status = self._process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            self._process.wait()
            raise BenchError(f"optpoline did not end within {_END_S:.0f} s") from error
        finally:
            self._reader.join(timeout=5)
            if self._process.stderr is not None:
                self._process.stderr.close()
        try:
            if status != 0:
                raise BenchError(f"optpoline ended with status {status}:\n{self.words()}")
            if self.summary is None:
                self.summary = Summary.from_file(self._json)
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Controller:
        """Return the running controller."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the command; an error already on its way is not replaced by another."""
        try:
            self.close()
        except BenchError:
            if error is None:
                raise

    def _read_lines(self) -> None:
        """Note each line it writes, with the time."""
        if self._process.stderr is None:
            return
        for line in self._process.stderr:
            self._lines.append((time.monotonic_ns(), line.strip()))


def attach_and_settle(
    pid: int, drive: Callable[[], int], *, extra: tuple[str, ...] = ()
) -> Controller:
    """Attach optpoline to a process and keep it working until the promotions stand still.

    Args:
        pid: The process.
        drive: Has the process do one piece of work; returns its nanoseconds.
        extra: More options of ``optpoline attach``.

    Returns:
        The controller, still attached.

    Raises:
        BenchError: if it ends, or promotes nothing, within the time allowed.
    """
    controller = Controller(pid, extra=extra)
    try:
        _settle(controller, drive)
    except BaseException:
        with controller:
            raise
    return controller


def _settle(controller: Controller, drive: Callable[[], int]) -> None:
    """Drive the process until the controller has promoted and said no more for a while."""
    begin = time.monotonic_ns()
    while True:
        elapsed = drive()
        now = time.monotonic_ns()
        controller.work.append((now, elapsed))
        if not controller.is_running():
            raise BenchError(f"optpoline ended early:\n{controller.words()}")
        if controller.said_ns(PROMOTED_LINE) is None:
            if now - begin > _PROMOTED_S * 1e9:
                raise BenchError(
                    f"nothing was promoted within {_PROMOTED_S:.0f} s:\n{controller.words()}"
                )
        elif now - controller.last_said_ns() > _QUIET_S * 1e9 or now - begin > _SETTLED_S * 1e9:
            return
