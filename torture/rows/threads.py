# SPDX-License-Identifier: Apache-2.0
"""Sessions on programs of hundreds and thousands of threads, all asleep or all busy.

What counts is the longest stop as the session reports it, from the first interrupt to
the last detach. The busy program tells from inside for how long none of its threads got
on, which must not be longer than what the session owns up to by more than the scheduler
explains; it is reported beside it.
"""

from __future__ import annotations

import os
import resource
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from optpoline import Config, DetachOutcome, attach
from torture.build import build_target
from torture.program import Program
from torture.row import Figure, Outcome, Scale

__all__ = ["ROW", "ThreadsRow"]

_BARS_MS = {783: 50.0, 2000: 150.0}
"""Threads to longest stop."""

_FULL_SESSIONS = 5
_CONFIG = Config(learn_s=0.3, relearn_s=0.1, stop_timeout_s=10.0)
_WATCH_S = 0.3
_HIGHEST = -20
_MAX_NOTE = 160
_ANSWER_S = 60.0
"""Thousands of busy threads share two CPUs with the one that answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What the sessions on one program came to."""

    n_stops: int
    longest_ms: float
    gap_ms: float
    n_promoted: int
    n_wrong: int
    n_sessions: int
    n_left: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadsRow:
    """The row ``threads``."""

    name: str = "threads"
    about: str = "sessions on 783 and 2,000 threads, all idle and all spinning"
    quick_s: float = 36.0
    full_s: float = 180.0

    def run(self, scale: Scale) -> Outcome:
        """Run some sessions on each of four programs."""
        begin_s = time.monotonic()
        program = str(build_target("threads"))
        n_sessions = scale.of(_FULL_SESSIONS)
        _allow_threads(max(_BARS_MS))
        with _at_high_priority():
            figures, notes = self._run_all(program, n_sessions)
        return Outcome(
            row=self.name,
            scale=f"{n_sessions} of {_FULL_SESSIONS} sessions on each of 4 programs",
            figures=tuple(figures),
            notes=tuple(notes),
            seconds=time.monotonic() - begin_s,
        )

    def _run_all(self, program: str, n_sessions: int) -> tuple[list[Figure], list[str]]:
        """Run the sessions on each program; return figures and notes."""
        figures: list[Figure] = []
        notes: list[str] = []
        for mode in ("idle", "spin"):
            for n_threads, bar_ms in _BARS_MS.items():
                with Program([program, mode, str(n_threads)]) as target:
                    seen = _run_sessions(target, n_sessions)
                name = f"{n_threads:,} {'idle' if mode == 'idle' else 'spinning'}"
                figures += _figures(name, bar_ms, seen)
                notes += [f"{name}: {note}" for note in _tell(seen)]
        return figures, notes


@contextmanager
def _at_high_priority() -> Iterator[None]:
    """Run a block so that thousands of busy threads leave us a CPU between the stops.

    In the stops the controller has real-time priority anyway.
    """
    tid = threading.get_native_id()
    before = os.getpriority(os.PRIO_PROCESS, tid)
    with suppress(PermissionError):  # then it takes minutes longer
        os.setpriority(os.PRIO_PROCESS, tid, _HIGHEST)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, tid, before)


def _allow_threads(n_threads: int) -> None:
    """Raise our own limit on threads, which targets inherit, where it is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and soft < 2 * n_threads:
        resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))


def _run_sessions(target: Program, n_sessions: int) -> _Seen:
    """Attach, learn, promote and detach a few times."""
    n_stops = n_promoted = n_left = 0
    longest_ms = gap_ms = 0.0
    notes: list[str] = []
    target.ask("gap", timeout_s=_ANSWER_S)
    for _ in range(n_sessions):
        session = attach(target.pid, config=_CONFIG)
        try:
            session.learn()
            n_promoted += session.promote()
            session.watch(_WATCH_S)
        finally:
            result = session.detach()
        summary = session.summary()
        n_stops += summary.stops
        longest_ms = max(longest_ms, summary.stop_ms_max)
        if result.outcome is not DetachOutcome.CLEAN:
            n_left += 1
            # It may name thousands of threads.
            why = textwrap.shorten(" ".join(result.notes), _MAX_NOTE)
            notes.append(f"detach: {result.outcome.value}: {why}")
        numbers = target.ask_numbers("gap", timeout_s=_ANSWER_S)
        gap_ms = max(gap_ms, numbers["gap_ns"] / 1e6)
    return _Seen(
        n_stops=n_stops,
        longest_ms=longest_ms,
        gap_ms=gap_ms,
        n_promoted=n_promoted,
        n_wrong=numbers["wrong"],
        n_sessions=n_sessions,
        n_left=n_left,
        notes=tuple(notes[:1]),
    )


def _figures(name: str, bar_ms: float, seen: _Seen) -> list[Figure]:
    """Return the longest stop beside its bar, and what the program saw of it."""
    return [
        Figure(
            name=f"{name}: longest stop",
            value=f"{seen.longest_ms:.1f} ms",
            bar=f"≤ {bar_ms:.0f} ms",
            is_met=seen.longest_ms <= bar_ms,
        ),
        Figure(
            name=f"{name}: sessions that left an arena",
            value=f"{seen.n_left} of {seen.n_sessions}",
            bar="",
            is_met=None,
        ),
        Figure(
            name=f"{name}: wrong results",
            value=f"{seen.n_wrong:,}",
            bar="0",
            is_met=seen.n_wrong == 0,
        ),
    ]


def _tell(seen: _Seen) -> list[str]:
    """Say what was done, so that nobody takes nothing for a success."""
    done = f"{seen.n_stops} stops, {seen.n_promoted} sites promoted"
    if seen.gap_ms:
        done += f"; no thread of it got on for at most {seen.gap_ms:.1f} ms"
    return [done, *seen.notes]


ROW = ThreadsRow()
