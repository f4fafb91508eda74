# SPDX-License-Identifier: Apache-2.0
"""How well promotions follow a workload that changes, and what watching one costs.

All numbers are of the program with phases (``bench/phases/phases.c``): calls per CPU time
as it counts them itself, and the lines that optpoline writes, by the clock on the wall.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import optpoline
from bench import statistics
from bench.controller import LEARNING_LINE, PROMOTED_LINE, Controller
from bench.errors import BenchError
from bench.figures import Figure
from bench.programs.phases import Phases, Snap

__all__ = [
    "measure_alternation",
    "measure_flips",
    "measure_learning",
    "measure_phases",
    "measure_watching",
]

AGAIN_LINE = "promoted anew"
"""In the line that tells of a re-promotion."""

_PROMOTED_S = 20.0
_LOOK_EVERY_S = 0.002
_FIRST_WAVES_S = 0.5
"""The first waves of slots find the targets; what is measured is counting known ones."""
_SETTLE_S = 3.0
_FLIPS = 12
_SETTLED_S = 1.0
_FOLLOWED_S = 5.0
_FLIP_BAR_MS = 200.0
_PHASE_S = 5.0
_PHASES = ("one", "other", "one", "weights", "many", "turned") * 2
_PHASES_BAR = 0.95
_STEADY_S = 10.0
_PAIRS = 400
_LEFT_S = 0.1
_WATCHED_S = 0.3
_WATCHING_BAR = 0.01
_LEARN_S = 4.0
_SCALING_BAR = 1.1


def _wait_promoted(controller: Controller) -> None:
    """Wait for the first promotion."""
    _wait_said(controller, PROMOTED_LINE)


def _wait_said(controller: Controller, word: str) -> None:
    """Wait until a line begins with a word."""
    deadline = time.monotonic() + _PROMOTED_S
    while controller.said_ns(word) is None:
        if time.monotonic() > deadline or not controller.is_running():
            raise BenchError(f"nothing said of {word.strip()}:\n{controller.words()}")
        time.sleep(_LOOK_EVERY_S)


def measure_flips(executable: Path) -> Iterator[Figure]:
    """Measure how long after a flip of the hot targets the site is promoted anew.

    Each flip is a fresh process's first: a site that has flipped keeps guards for both.
    """
    taken: list[float] = []
    for number in range(_FLIPS):
        with (
            Phases(executable) as program,
            Controller(program.pid, extra=("--learn-seconds", "0.3")) as controller,
        ):
            _wait_promoted(controller)
            # Never twice at the same place of the controller's own cycle.
            time.sleep(_SETTLED_S + 0.013 * number)
            begin_ns = time.monotonic_ns()
            program.go("other")
            taken.append(_until_said(controller, AGAIN_LINE, begin_ns))
    taken.sort()
    for value, what in ((taken[len(taken) // 2], "median"), (taken[-1], "longest")):
        yield Figure(
            name=f"flip to re-promoted: {what} of {_FLIPS}",
            value=value,
            unit="ms",
            bar=_FLIP_BAR_MS,
        )


def _until_said(controller: Controller, word: str, begin_ns: int) -> float:
    """Return the milliseconds until a line has a word."""
    deadline = time.monotonic() + _FOLLOWED_S
    while time.monotonic() < deadline:
        for at_ns in controller.told_ns(word):
            if at_ns > begin_ns:
                return (at_ns - begin_ns) / 1e6
        time.sleep(_LOOK_EVERY_S)
    raise BenchError(f"the flip was not followed within {_FOLLOWED_S:.0f} s")


def measure_phases(executable: Path) -> Iterator[Figure]:
    """Compare the speed through changing phases with each phase's own best promotion.

    In each phase both run at the same time, one on each CPU: a neighbour on our core, or
    one that takes our CPUs away, makes both slower, where one after the other would be
    compared with another hour of the machine.
    """
    ratios: list[float] = []
    with contextlib.ExitStack() as stack:
        rivals = {
            name: stack.enter_context(_promoted_for(executable, name))
            for name in dict.fromkeys(_PHASES)
        }
        program = stack.enter_context(Phases(executable, start=_PHASES[0]))
        controller = stack.enter_context(Controller(program.pid))
        _wait_promoted(controller)
        time.sleep(_SETTLE_S)
        for name in _PHASES:
            rival = rivals[name]
            with _let_run(rival):
                before, rival_before = program.snap(), rival.snap()
                program.go(name)
                time.sleep(_PHASE_S)
                after, rival_after = program.snap(), rival.snap()
            ratios.append((after - before).speed / (rival_after - rival_before).speed)
    yield Figure(
        name=f"phases of {_PHASE_S:.0f} s: mean speed of each phase's best static promotion",
        value=sum(ratios) / len(ratios),
        unit="of it",
        bar=_PHASES_BAR,
        is_least=True,
    )


@contextlib.contextmanager
def _promoted_for(executable: Path, name: str) -> Iterator[Phases]:
    """Start a program that was promoted for one phase and then left alone; it stands."""
    with Phases(executable, start=name) as program:
        with Controller(program.pid, extra=("--leave",)) as controller:
            _wait_promoted(controller)
            time.sleep(_SETTLE_S)
        os.kill(program.pid, signal.SIGSTOP)
        try:
            yield program
        finally:
            os.kill(program.pid, signal.SIGCONT)


@contextlib.contextmanager
def _let_run(program: Phases) -> Iterator[None]:
    """Let a program that stands run for the block."""
    os.kill(program.pid, signal.SIGCONT)
    try:
        yield
    finally:
        os.kill(program.pid, signal.SIGSTOP)


def measure_alternation(executable: Path) -> Iterator[Figure]:
    """Count re-promotions of a site whose targets stay equally hot."""
    for name, what in (("two", "two targets in turn"), ("three", "three at 34/33/33")):
        with Phases(executable, start=name) as program, Controller(program.pid) as controller:
            _wait_promoted(controller)
            begin_ns = time.monotonic_ns()
            time.sleep(_STEADY_S)
            n_again = sum(at_ns > begin_ns for at_ns in controller.told_ns(AGAIN_LINE))
        yield Figure(
            name=f"{what}: re-promotions in {_STEADY_S:.0f} s",
            value=float(n_again),
            unit="",
            bar=1.0,
        )
        rate = controller.summary.hit_rate if controller.summary is not None else None
        yield Figure(name=f"{what}: missed", value=1.0 - (rate or 0.0), unit="of it", bar=0.001)


def measure_watching(executable: Path) -> Iterator[Figure]:
    """Compare a promoted program while it is watched with itself while it is left alone.

    One process, with the same blocks in both: between two of one program the places of
    memory alone make more difference than a watch does. A watch that has returned leaves
    nothing in the program that counts, so what follows is what ``--leave`` leaves. Each
    pair is of slices in the order ABBA or BAAB, against what drifts. What falls due while
    it is left is done when it is watched again, so most of the time it is. A neighbour on
    our core spoils some pairs by a tenth: the median does not mind those, but would not
    see a cost that is rare either, so the whole time is told beside it.
    """
    ratios: list[float] = []
    with Phases(executable, start="many") as program, optpoline.attach(program.pid) as session:
        session.learn()
        if not session.promote():
            raise BenchError("the program with phases: nothing was promoted")
        session.watch(_SETTLE_S)
        all_left = all_watched = Snap(calls=0, cpu_ns=0)
        for first in range(_PAIRS):
            left = watched = Snap(calls=0, cpu_ns=0)
            for slot in (first, first + 1, first + 1, first):
                begin = program.snap()
                if slot % 2:
                    time.sleep(_LEFT_S)
                    left += program.snap() - begin
                else:
                    session.watch(_WATCHED_S)
                    watched += program.snap() - begin
            ratios.append(left.speed / watched.speed)
            all_left += left
            all_watched += watched
    name = "steady: time when watched, of that when left"
    yield from _within(name, ratios, _WATCHING_BAR)
    together = all_left.speed / all_watched.speed
    yield Figure(name=f"{name}: all pairs together", value=together, unit="x", bar=None)


def _within(name: str, ratios: Sequence[float], bar: float) -> Iterator[Figure]:
    """Say how far the ends of the interval of a ratio are from one."""
    found = statistics.median(ratios)
    yield Figure(
        name=f"{name}: median of {len(ratios)} pairs", value=found.value, unit="x", bar=1 + bar
    )
    furthest = max(abs(found.low - 1), abs(found.high - 1))
    yield Figure(name=f"{name}: end of the interval", value=furthest, unit="off 1", bar=bar)


def measure_learning(executable: Path) -> Iterator[Figure]:
    """Compare what learning costs with one thread and with two, both ways of counting."""
    for extra, what in (((), "a row for each CPU"), (("--shared-counters",), "one row for all")):
        slowdowns = [_slowdown(executable, n_threads, extra) for n_threads in (1, 2)]
        for n_threads, slowdown in zip((1, 2), slowdowns, strict=True):
            yield Figure(
                name=f"learning, {what}: time of {n_threads} threads, of that before",
                value=slowdown,
                unit="x",
                bar=None,
            )
        yield Figure(
            name=f"learning, {what}: two threads against one",
            value=slowdowns[1] / slowdowns[0],
            unit="x",
            bar=None if extra else _SCALING_BAR,
        )


def _slowdown(executable: Path, n_threads: int, extra: tuple[str, ...]) -> float:
    """Return how much longer a call takes while it is counted."""
    with Phases(executable, n_threads=n_threads, start="many") as program:
        before = max(program.speed(0.5) for _ in range(3))
        options = ("--learn-seconds", f"{_LEARN_S:g}", *extra)
        with Controller(program.pid, extra=options) as controller:
            _wait_said(controller, LEARNING_LINE)
            time.sleep(_FIRST_WAVES_S)
            during = max(program.speed(0.5) for _ in range(3))
            if controller.said_ns(PROMOTED_LINE) is not None:
                raise BenchError("the learning window was over too early")
    return before / during
