# SPDX-License-Identifier: Apache-2.0
"""Look at threads that run, without stopping them: by one tick of a clock of each.

The kernel's timer interrupts a thread in user code and notes program counter, stack pointer
and the stack from there up (``process/perf_event.py``). That is all of the thread at one
instant, as a stop would show it. It tells where the thread is if

* all that a look in a stop would read is in the sample: the stack is a thread's own and ends
  within it, or in memory that does not exist, and no signal frame on it says that another
  stack was interrupted;
* no tracer had the thread meanwhile, whose registers these may have been: there is none
  before and after, and a stop would have counted as a voluntary switch.

Else it is not told, and somebody has to look again, or to stop it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

import numpy as np

from optpoline.errors import (
    AttachError,
    OptpolineError,
    PermissionDenied,
    TargetFault,
    UnsupportedTarget,
)
from optpoline.patch.grace import ThreadKey
from optpoline.patch.quiescence import (
    FindResident,
    ReadMemory,
    ScannedStack,
    ThreadScan,
    interrupted_stacks,
)
from optpoline.patch.ranges import AddressRanges
from optpoline.patch.stacks import StackMap
from optpoline.process.perf_event import ThreadClock
from optpoline.process.perf_ring import StackSample
from optpoline.process.thread_state import ThreadState, ThreadWhere, read_thread_state

__all__ = ["RunningThreads", "fill_holes", "scan_sample"]

MAX_CLOCKS = 8
"""Threads looked at together; their rings are locked memory, of which users have 516 KiB a CPU."""

STACK_SIZE = 32 << 10
"""Bytes of stack that a sample has: Lua, nginx and Redis use 2 to 9 KiB at work."""

_RING_PAGES = 16
"""One sample and a bit: what ticks after it is dropped, and costs nothing."""

_PERIOD_NS = 500_000
_WAIT_S = 0.003
"""Long enough for a tick of a thread that has a CPU; short, because one that sleeps meanwhile
is not told."""

_WORD_SIZE = 8


class RunningThreads:
    """Looks at threads that run; keeps nothing open between looks."""

    def __init__(self) -> None:
        """Assume that the kernel lets us."""
        self._is_refused = False

    def sample(self, keys: Sequence[ThreadKey]) -> Mapping[ThreadKey, StackSample]:
        """Return samples of threads that run, taken in this call, of as many as there can be.

        Target state: running; takes ``_WAIT_S`` if there is any such thread.
        """
        if self._is_refused:
            return {}
        samples: dict[ThreadKey, StackSample] = {}
        with ExitStack() as stack:
            clocks: dict[ThreadKey, tuple[ThreadState, ThreadClock]] = {}
            for key in keys:
                state = _read_running(key)
                if state is None:
                    continue
                clock = self._open(key)
                if clock is not None:
                    stack.callback(clock.close)
                    clocks[key] = state, clock
                if self._is_refused or len(clocks) == MAX_CLOCKS:
                    break
            if clocks:
                time.sleep(_WAIT_S)
            for key, (before, clock) in clocks.items():
                sample = _drain(clock)
                after = _read_running(key)
                if sample is None or after is None:
                    continue
                if after.n_voluntary == before.n_voluntary:
                    samples[key] = sample
        return samples

    def _open(self, key: ThreadKey) -> ThreadClock | None:
        """Start the clock of a thread; None if it has none."""
        try:
            clock = ThreadClock(
                key[1],
                period_ns=_PERIOD_NS,
                n_pages=_RING_PAGES,
                n_stack_words=STACK_SIZE // _WORD_SIZE,
            )
        except (PermissionDenied, UnsupportedTarget):
            self._is_refused = True  # of one, of all
            return None
        except OptpolineError:
            return None  # it is gone, or there is no memory for its ring
        with suppress(OptpolineError):
            clock.enable()
        return clock


def _drain(clock: ThreadClock) -> StackSample | None:
    """Return the last sample of a clock; None if there is none that makes sense."""
    with suppress(OptpolineError):
        return clock.drain_last_stack()
    return None


def _read_running(key: ThreadKey) -> ThreadState | None:
    """Return the counters of a thread; None if it sleeps, is gone, or has a tracer."""
    try:
        state = read_thread_state(*key)
    except AttachError:
        return None
    return state if state.where is ThreadWhere.RUNNING and not state.tracer_pid else None


def scan_sample(
    sample: StackSample,
    *,
    find_resident: FindResident,
    stacks: StackMap,
    ranges: AddressRanges,
) -> ThreadScan | None:
    """Find the addresses in ``ranges`` that a sampled thread was at, or may return to.

    Args:
        sample: The thread.
        find_resident: Tells which memory exists.
        stacks: Where stacks may be.
        ranges: Retired code.

    Returns:
        What was found, or None if the sample does not tell.
    """
    stack, extent = stacks.stack_at(sample.sp), stacks.scan_range_at(sample.sp)
    if stack is None or extent is None or not stack.is_own:
        return None
    # What lies below the stack pointer, in the red zone, no signal frame is in.
    first, end = -(-sample.sp // _WORD_SIZE) * _WORD_SIZE, extent[1]
    sampled_end = sample.sp + len(sample.stack)
    # The kernel stops at a page that is not there; what was there at that instant still is.
    if end > sampled_end and any(True for _ in find_resident(sampled_end, end)):
        return None
    end = min(end, sampled_end)
    data = sample.stack[first - sample.sp : end - sample.sp]
    words = np.frombuffer(data[: len(data) // _WORD_SIZE * _WORD_SIZE], dtype="<u8")
    if any(not first <= sp < end for sp in interrupted_stacks(words)):
        return None
    held = set(ranges.pointing_into(words).tolist())
    if sample.pc in ranges:
        held.add(sample.pc)
    return ThreadScan(frozenset(held), (ScannedStack(stack.start, first, end),))


def fill_holes(sample: StackSample, *, read: ReadMemory, stacks: StackMap) -> None:
    """Make pages exist at which a sample's stack broke off, so that the next one goes on.

    A main stack often has one below its arguments that was never touched. A look at a
    sleeping thread reads them as well: they are zero, and take no memory.
    """
    extent = stacks.scan_range_at(sample.sp)
    first = sample.sp + len(sample.stack)
    end = min(sample.sp + STACK_SIZE, extent[1] if extent is not None else 0)
    if first < end:
        with suppress(TargetFault, AttachError):
            read(first, end - first)
