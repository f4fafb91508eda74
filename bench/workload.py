# SPDX-License-Identifier: Apache-2.0
"""A workload, and what came out of measuring it in every variant."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench import statistics
from bench.build import Variant
from bench.controller import LEARNING_LINE, PROMOTED_LINE, Controller, Summary, attach_and_settle
from bench.errors import BenchError
from bench.rounds import take_turns

__all__ = ["PROMOTED", "Measured", "Worker", "Workload", "learning_slowdown", "measure_workload"]

PROMOTED = "promoted"
"""The retpoline build with optpoline attached; the other variants have their build's name."""


class Worker(Protocol):
    """A running variant that does one iteration of its work when asked."""

    result: str | None
    """What it computed last; the same in every variant."""

    @property
    def pid(self) -> int:
        """Process to attach to."""

    def iterate(self) -> int:
        """Do the work once; returns nanoseconds."""

    def __enter__(self) -> Worker:
        """Return the running worker."""

    def __exit__(self, *_: object) -> None:
        """End it."""


_BEFORE = 7
"""Iterations before attaching, whose median is what learning is compared with."""


_TURNS = 9
"""Turns of each process in a round, of which the fastest counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Something a program is made to do.

    Attributes:
        group: Which bar it belongs to, such as "lua".
        name: Its name within the group.
        start: Starts a built executable (path, name for errors) as a worker.
    """

    group: str
    name: str
    start: Callable[[Path, str], Worker]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Samples of a workload, in nanoseconds, with what optpoline said of its own work.

    Attributes:
        group: As in the workload.
        name: As in the workload.
        samples: Variant name to samples, all of the same length.
        summary: What optpoline wrote at its end, or None where it was not attached.
        learning_slowdown: Time of an iteration while learning over that before, or None.
    """

    group: str
    name: str
    samples: Mapping[str, tuple[int, ...]]
    summary: Summary | None = None
    learning_slowdown: float | None = None

    @property
    def overhead(self) -> statistics.Estimate:
        """What retpolines cost here, as a share of the plain time."""
        return statistics.overhead(self.of(Variant.PLAIN), self.of(Variant.RETPOLINE))

    @property
    def recovered(self) -> statistics.Estimate:
        """Share of that cost which promotion took away."""
        return statistics.recovered(
            self.of(Variant.PLAIN), self.of(Variant.RETPOLINE), self.samples[PROMOTED]
        )

    @property
    def loss(self) -> statistics.Estimate:
        """By how much the promoted program is slower than the retpoline build."""
        return statistics.loss(self.of(Variant.RETPOLINE), self.samples[PROMOTED])

    def of(self, variant: Variant) -> tuple[int, ...]:
        """Samples of a build."""
        return self.samples[variant.value]


def measure_workload(
    workload: Workload, builds: Mapping[Variant, Path], *, rounds: int, promote: bool = True
) -> Measured:
    """Measure a workload in each build, and in the retpoline build with optpoline attached.

    Every round starts every variant anew: where a process's code and heap happen to lie
    makes it some percent faster or slower for all of its life, so more samples of one
    process say nothing about the next.

    Args:
        workload: What to measure.
        builds: Executable of each variant.
        rounds: Fresh processes of each variant.
        promote: Whether to attach at all.

    Raises:
        BenchError: if a driver or optpoline fails, or if two variants disagree on the result.
    """
    samples: dict[str, list[int]] = {}
    controller: Controller | None = None
    slowdowns: list[float] = []
    for _ in range(rounds):
        taken, controller, slowdown = _measure_round(workload, builds, promote=promote)
        for name, value in taken.items():
            samples.setdefault(name, []).append(value)
        slowdowns += [] if slowdown is None else [slowdown]
    return Measured(
        group=workload.group,
        name=workload.name,
        samples={name: tuple(values) for name, values in samples.items()},
        summary=controller.summary if controller else None,
        learning_slowdown=statistics.median(slowdowns).value if slowdowns else None,
    )


def _measure_round(
    workload: Workload, builds: Mapping[Variant, Path], *, promote: bool
) -> tuple[dict[str, int], Controller | None, float | None]:
    """Start each variant; return its best, what was attached, the slowdown while learning."""
    with contextlib.ExitStack() as stack:
        drivers = {
            variant.value: stack.enter_context(
                workload.start(path, f"{workload.name} ({variant.value})")
            )
            for variant, path in builds.items()
        }
        controller: Controller | None = None
        slowdown: float | None = None
        if promote:
            retpoline = builds[Variant.RETPOLINE]
            name = f"{workload.name} ({PROMOTED})"
            driver = stack.enter_context(workload.start(retpoline, name))
            before = [driver.iterate() for _ in range(_BEFORE)]
            controller = stack.enter_context(attach_and_settle(driver.pid, driver.iterate))
            slowdown = learning_slowdown(controller, statistics.median(before).value)
            drivers[PROMOTED] = driver
        work = {name: driver.iterate for name, driver in drivers.items()}
        samples = take_turns(work, rounds=_TURNS)
        results = {name: driver.result for name, driver in drivers.items()}
    if len(set(results.values())) != 1:
        raise BenchError(f"{workload.name}: the variants disagree: {results}")
    # Another machine's work on the sibling of our core makes iterations take half as long
    # again, for seconds at a time; it only ever adds.
    fastest = {name: min(values) for name, values in samples.items()}
    return fastest, controller, slowdown


def learning_slowdown(controller: Controller, before_ns: float) -> float | None:
    """Slowdown of the iterations that lay wholly between "learning" and "promoted".

    Args:
        controller: With the work done while it learned.
        before_ns: Time of an iteration before it was attached.

    Returns:
        Median time over ``before_ns``, or None where none lay wholly inside.
    """
    end = controller.said_ns(PROMOTED_LINE)
    # A window before that may have found nothing worth a promotion.
    begin = None if end is None else controller.said_last_ns(LEARNING_LINE, end)
    if begin is None or end is None:
        return None
    inside = [took for at, took in controller.work if at - took >= begin and at <= end]
    return statistics.median(inside).value / before_ns if inside else None
