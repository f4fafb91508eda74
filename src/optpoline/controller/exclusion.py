# SPDX-License-Identifier: Apache-2.0
"""Have counter cells to ourselves for a moment, while the program runs.

Two ways (docs/operations.md says why they exclude, and what they need)::

    pinned    This thread runs on the CPU at the highest real-time priority: nobody else runs
              there. For the row of that CPU, where it is written in restartable sequences.
    stopped   All threads that run, of every process that maps the cells, stand. For any row.

Either can be undermined: a pinned thread can be put off its CPU (deadline tasks, real-time
throttling, the CPU going offline), a sleeping thread can wake. Both show in context-switch
counters, so whoever excludes can be asked whether he has: ``is_intact``.

Whatever happens, policy, priority and CPU mask of this thread are as before at the end, and
every thread of the program runs.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum

from optpoline.controller.address_space import AddressSpace
from optpoline.errors import ExclusionError, ProcessGone
from optpoline.process.cell_fetcher import current_cpu
from optpoline.process.priority import at_real_time
from optpoline.process.stop import Stop, Wake
from optpoline.process.thread_state import has_slept_since, read_asleep

__all__ = ["Exclusion", "Way", "on_cpu", "pinned", "promptly", "stopped"]

_MAX_PRIORITY = os.sched_get_priority_max(os.SCHED_FIFO)


class Way(Enum):
    """How cells were had exclusively, or why nobody had to be excluded."""

    PINNED = "pinned"
    STOPPED = "stopped"
    SECTION = "section"
    """By restartable sequences of our own on that CPU (drain only)."""
    LOCKED = "locked"
    """By locked instructions, for cells that all write so (drain only)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusion:
    """An exclusion that has begun.

    Attributes:
        way: Which.
        is_intact: Tells whether nobody else can have come in since it began.
    """

    way: Way
    is_intact: Callable[[], bool]


@contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    """Run a block on one CPU.

    Raises:
        ExclusionError: if the CPU is offline or this process may not run there.
    """
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {cpu})
    except OSError as error:
        raise ExclusionError(f"CPU {cpu} is offline or outside of our cpuset") from error
    try:
        yield
    finally:
        with suppress(OSError):  # all of its CPUs were taken away meanwhile
            os.sched_setaffinity(0, before)


def _top_priorities() -> tuple[int, int]:
    """Return the highest real-time priority, and the highest that we may have without rights."""
    limit, _ = resource.getrlimit(resource.RLIMIT_RTPRIO)
    allowed = _MAX_PRIORITY if limit < 0 else min(limit, _MAX_PRIORITY)
    return _MAX_PRIORITY, max(1, allowed)


@contextmanager
def _at_top_priority() -> Iterator[None]:
    """Run a block at the highest real-time priority that we may have.

    Raises:
        ExclusionError: if we may have none.
    """
    with at_real_time(_top_priorities()) as is_raised:
        if not is_raised:
            raise ExclusionError("no real-time priority without CAP_SYS_NICE or RLIMIT_RTPRIO")
        yield


@contextmanager
def promptly() -> Iterator[None]:
    """Run a short block at real-time priority if allowed, so as not to wait for busy CPUs."""
    with at_real_time(_top_priorities()):
        yield


@contextmanager
def pinned(cpu: int) -> Iterator[Exclusion]:
    """Keep everybody else off a CPU for the length of a block, which must be short.

    Raises:
        ExclusionError: if we may not have that CPU or that priority.
    """
    # The priority first: on a busy CPU we would wait for our turn otherwise, and again after.
    with _at_top_priority(), on_cpu(cpu):
        before = _own_switches()

        def is_intact() -> bool:
            """Tell whether this thread has been on that CPU all the while."""
            # Whoever moves a running thread takes its CPU away first (migration threads).
            return current_cpu() == cpu and _own_switches() == before

        yield Exclusion(way=Way.PINNED, is_intact=is_intact)


def _own_switches() -> tuple[int, int]:
    """Return how often this thread was put off a CPU: of its own accord, and not."""
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_nvcsw, usage.ru_nivcsw


@contextmanager
def stopped(spaces: Sequence[AddressSpace], *, wake: Wake = Wake.NONE) -> Iterator[Exclusion]:
    """Have all threads stand that run and map the cells.

    Args:
        spaces: The target and every other process that maps them.
        wake: Which sleeping threads are made to stand too.

    Raises:
        ExclusionError: if one of them must not be stopped.
        ProcessGone: if the target is gone.
        StopTimeout: if threads do not stop in time.
    """
    with ExitStack() as stack:
        stops: list[Stop] = []
        for space in spaces:
            if space.stop is None:
                raise ExclusionError(
                    f"process {space.pid} counts in the same cells and may not be stopped"
                )
            try:
                stops.append(stack.enter_context(space.stop(wake)))
            except ProcessGone:
                if space.is_target:
                    raise
        for stop in stops if len(stops) > 1 else ():
            stop.sweep()  # who has woken while the other processes were stopped
        asleep = {key: read_asleep(*key) for stop in stops for key in stop.sleepers}

        def is_intact() -> bool:
            """Tell whether all who slept have slept ever since."""
            return all(
                state is not None and has_slept_since(pid, state)
                for (pid, _), state in asleep.items()
            )

        yield Exclusion(way=Way.STOPPED, is_intact=is_intact)
