# SPDX-License-Identifier: Apache-2.0
"""Stops and sessions over a thread in each system call that could tell.

Seconds with stops take turns with seconds without, the control. Two programs are stopped:
one with every call, where the product wakes nobody but one thread to run a call, and one
whose calls may all be woken from, where it may stop every thread. Stops are asked for as
the product does; every second turn is a whole session instead.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from optpoline import Config, DetachOutcome, attach
from optpoline.controller.target import Target
from optpoline.errors import ArenaError, StopTimeout, UnsupportedTarget
from optpoline.process.stop import Wake
from optpoline.x86.syscalls import SYS_GETPID
from torture.build import build_target
from torture.errors import TortureError
from torture.program import Program
from torture.row import Figure, Outcome, Scale

__all__ = ["ROW", "SyscallsRow"]

_FULL_STOPS = 2000
_TURN_S = 1.0
_PAUSE_S = (0.005, 0.030)
"""Shortest and longest time between two stops of a turn: about fifty a second."""

_WAKE_ALL_SHARE = 0.1
"""As often as all are woken in sessions, about: it takes a site that crosses a cache line."""

_CONFIG = Config(learn_s=0.2, relearn_s=0.1)
_WATCH_S = 0.3
_STOP_TIMEOUT_S = 2.0
_PROGRAMS = ("all", "gentle")
_LATER_BAR_US = 5000
_MIN_WAITS = 1000
"""Fewer than these have no 99.9th percentile."""

_MAX_MISSES = 100
"""Turns without a stop after which a program cannot be stopped at all."""


@dataclass(slots=True)
class _Tally:
    """What was done to a program, and what it says of it."""

    n_stops: int = 0
    n_woken: int = 0
    n_woken_all: int = 0
    n_sessions: int = 0
    n_promoted: int = 0
    n_refused: int = 0
    longest_ns: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyscallsRow:
    """The row ``syscalls``."""

    name: str = "syscalls"
    about: str = "a thread in each blocking call, stopped; seconds without stops in between"
    quick_s: float = 18.0
    full_s: float = 160.0

    def run(self, scale: Scale) -> Outcome:
        """Stop two programs by turns, each for half of the stops."""
        begin_s = time.monotonic()
        program = build_target("syscalls")
        n_stops = scale.of(_FULL_STOPS, least=60)
        rng = random.Random(scale.seed)
        tallies: dict[str, _Tally] = {}
        counts: dict[str, dict[str, int]] = {}
        lateness: dict[str, dict[str, int]] = {}
        for kind in _PROGRAMS:
            with Program([str(program), kind, str(scale.seed)]) as target:
                tallies[kind] = _torment(target, n_stops // len(_PROGRAMS), rng)
                counts[kind] = target.ask_numbers("counts")
                lateness[kind] = target.ask_numbers("lateness")
                target.finish()
        figures = (*_count_figures(counts), *_lateness_figures(lateness))
        return Outcome(
            row=self.name,
            scale=f"{sum(t.n_stops for t in tallies.values())} of {_FULL_STOPS:,} stops",
            figures=figures,
            notes=(*_tell_done(tallies, counts), *_tell_lateness(lateness)),
            seconds=time.monotonic() - begin_s,
        )


def _torment(program: Program, n_stops: int, rng: random.Random) -> _Tally:
    """Stop a program that often, in every second turn."""
    tally = _Tally()
    n_turns = 0
    while tally.n_stops < n_stops:
        program.ask("control")
        time.sleep(_TURN_S)
        program.ask("stops")
        before = tally.n_stops
        if n_turns % 2:
            _run_session(program.pid, tally)
        else:
            _stop_for_a_turn(program.pid, tally, rng)
        n_turns += 1
        if tally.n_stops == before and n_turns > _MAX_MISSES:
            raise TortureError("the program could not be stopped")
    program.ask("control")
    return tally


def _stop_for_a_turn(pid: int, tally: _Tally, rng: random.Random) -> None:
    """Stop a program again and again: nobody woken, one woken, all woken if they may be."""
    target = Target(pid, stop_timeout_s=_STOP_TIMEOUT_S)
    try:
        end_s = time.monotonic() + _TURN_S
        while time.monotonic() < end_s:
            with target.stop():
                pass
            time.sleep(rng.uniform(*_PAUSE_S))
            _stop_and_inject(target, tally)
            time.sleep(rng.uniform(*_PAUSE_S))
            # As for sites that are written only while everyone stands.
            if rng.random() < _WAKE_ALL_SHARE and target.may_wake_all():
                with target.stop(Wake.ALL):
                    tally.n_woken_all += 1
                time.sleep(rng.uniform(*_PAUSE_S))
        tally.n_stops += target.stops.n_stops
        tally.longest_ns = max(tally.longest_ns, target.stops.max_ns)
    finally:
        target.close()


def _stop_and_inject(target: Target, tally: _Tally) -> None:
    """Run a harmless system call in a program."""
    try:
        with target.stop(Wake.ONE_FOR_INJECTION) as stop:
            n_running = len(stop.stopped)
            if (result := stop.inject(SYS_GETPID)) != target.pid:
                raise TortureError(f"an injected getpid answered {result}, not {target.pid}")
            tally.n_woken += n_running == 0
    except UnsupportedTarget:
        tally.n_refused += 1


def _run_session(pid: int, tally: _Tally) -> None:
    """Attach, learn, promote, keep up for a moment, let go."""
    try:
        session = attach(pid, config=_CONFIG)
    except (ArenaError, StopTimeout, UnsupportedTarget) as error:
        tally.notes.append(f"attach: {error}")
        return
    try:
        session.learn()
        tally.n_promoted += session.promote()
        session.watch(_WATCH_S)
    finally:
        result = session.detach()
    tally.n_sessions += 1
    summary = session.summary()
    tally.n_stops += summary.stops
    tally.longest_ns = max(tally.longest_ns, int(summary.stop_ms_max * 1e6))
    if result.outcome is not DetachOutcome.CLEAN:
        tally.notes.append(f"detach: {result.outcome.value}: {' '.join(result.notes)}")


def _count_figures(counts: dict[str, dict[str, int]]) -> list[Figure]:
    """Return what may not have happened at all, over both programs."""
    names = {
        "EINTR without a signal": "eintr",
        "signals lost, out of order or changed": "lost",
        "short transfers": "short",
        "timeouts that ended early": "early",
        "other wrong results": "wrong",
    }
    figures = []
    for name, key in names.items():
        n = sum(count[key] for count in counts.values())
        figures.append(Figure(name=name, value=f"{n:,}", bar="0", is_met=n == 0))
    return figures


def _calls(lateness: dict[str, int]) -> list[str]:
    """Return the calls that have been made, from a target's answer."""
    names = {key.partition(".")[0] for key in lateness} - {"all"}
    return sorted(name for name in names if lateness[f"{name}.stops.n"])


def _later_us(lateness: dict[str, int], call: str) -> int:
    """Return how much later than in the control a call's slowest ends."""
    return lateness[f"{call}.stops.p999_us"] - lateness[f"{call}.control.p999_us"]


def _lateness_figures(lateness: dict[str, dict[str, int]]) -> list[Figure]:
    """Return the lateness of all timeouts, and of those of the latest call, by program.

    The latest of a dozen calls is told, not judged: it is the call that the rest of the
    machine happened to delay most, unless it is the same in every run.
    """
    figures = []
    for kind, late in lateness.items():
        figures.append(_lateness_figure(f"{kind}: all calls", late, "all", is_judged=True))
        worst = max(_calls(late), key=lambda call: _later_us(late, call))
        figures.append(_lateness_figure(f"{kind}: {worst}", late, worst, is_judged=False))
    return figures


def _lateness_figure(name: str, late: dict[str, int], call: str, *, is_judged: bool) -> Figure:
    """Return one 99.9th percentile above its control."""
    us = _later_us(late, call)
    n = min(late[f"{call}.stops.n"], late[f"{call}.control.n"])
    is_judged = is_judged and n >= _MIN_WAITS
    return Figure(
        name=f"{name}: 99.9 % of lateness above control",
        value=f"{us / 1000:.2f} ms",
        bar="≤ 5 ms" if is_judged else "",
        is_met=us <= _LATER_BAR_US if is_judged else None,
    )


def _tell_done(tallies: dict[str, _Tally], counts: dict[str, dict[str, int]]) -> list[str]:
    """Say what was done, so that nobody takes nothing for a success."""
    notes = []
    for kind, tally in tallies.items():
        count = counts[kind]
        notes.append(
            f"{kind}: {tally.n_stops} stops, {tally.n_woken_all} of them of every thread, "
            f"{tally.n_woken} sleepers woken for a call, {tally.n_refused} calls refused, "
            f"{tally.n_sessions} sessions with {tally.n_promoted} sites promoted, "
            f"longest stop {tally.longest_ns / 1e6:.1f} ms; {count['signals']:,} signals, "
            f"{count['own_eintr']:,} of them ended a wait; {count['transfers']:,} transfers"
        )
        if not count["io_uring"]:
            notes.append(f"{kind}: io_uring is not to be had here")
        notes += sorted(set(tally.notes))
    return notes


def _tell_lateness(lateness: dict[str, dict[str, int]]) -> list[str]:
    """Say how late each call was, stops beside control."""
    notes = []
    for kind, late in lateness.items():
        calls = (
            f"{call} {late[f'{call}.stops.p999_us'] / 1000:.1f}"
            f" ({late[f'{call}.control.p999_us'] / 1000:.1f})"
            for call in _calls(late)
        )
        notes.append(f"{kind}: 99.9 % of lateness, ms (control): {', '.join(calls)}")
    return notes


ROW = SyscallsRow()
