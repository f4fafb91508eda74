# SPDX-License-Identifier: Apache-2.0
"""Sample where the threads of a process spend their time, without ptrace.

A software clock event per thread (see ``perf_event``) is switched on for a
window and notes the user program counter once per millisecond of CPU time, and
the first words of the stack with it where the caller wants them.

One event and one ring per thread, on whatever CPU it runs. Events that new
threads inherit would need one per thread and CPU; one event per CPU would need
privilege, show us other users' programs and disturb idle CPUs. So a thread is
seen from the first window after its birth, and of more than ``MAX_THREADS``
those are watched that ran most since the last window (since their birth, for
the first): a share is then one of the busiest threads.

Costs, measured on 2 virtual CPUs at 997 Hz, Linux 6.18:

=====================================  =======  =======  ========
threads, all busy (of them watched)    1        16       200 (64)
=====================================  =======  =======  ========
our CPU time for a window of 0.1 s     0.6 ms   0.5 ms   4.2 ms
the same, and all clocks to be opened  0.6 ms   0.7 ms   4.8 ms
descriptors (mmap keeps a copy)        2        32       128
locked memory of the rings             68 KiB   320 KiB  512 KiB
=====================================  =======  =======  ========

Among 100 busy threads per CPU we wait for our turn like any of them, and the
window becomes seconds long; rings that fill meanwhile lose samples, not time.
kernel.perf_event_mlock_kb is 516 for each CPU and user, so that 64 rings of one
page fit without privilege on any machine. The very first event on a machine
patches the scheduler: 10 to 20 ms of waiting, no CPU time. In the program, a
window costs its threads a timer interrupt per sample and about 3 us per context
switch; clocks at rest between windows cost about 0.1 us per context switch.
Whoever opens windows rarely, and wants not even that, makes a sampler for each.
"""

from __future__ import annotations

import os
import select
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from optpoline.errors import (
    OptpolineError,
    PermissionDenied,
    ProcessGone,
    UnsupportedTarget,
    UsageError,
)
from optpoline.model import Addr
from optpoline.process.perf_event import MAX_STACK_WORDS, ThreadClock
from optpoline.process.procfs import RUNS_NO_CODE, list_tids, read_state_char

__all__ = ["MAX_FREQUENCY_HZ", "MAX_THREADS", "PcSample", "PcSampler", "share_within"]

MAX_THREADS = 64
MAX_RING_PAGES = 16
"""Data pages of a ring where threads are few: a sample with 16 words of stack takes 176
bytes, and a ring of one page would wake us after every twelfth."""
_MAX_LOCKED_PAGES = 2 * MAX_THREADS
MAX_FREQUENCY_HZ = 10_000
_DEFAULT_FREQUENCY_HZ = 997
_NS_PER_S = 1_000_000_000
# An event that ticks as often as the kernel allows is throttled: switched off inside
# its own timer, which on Linux 6.16 and 6.17 hangs the machine (async-profiler #1578).
_RATE_MARGIN = 4
_MAX_SAMPLE_RATE = Path("/proc/sys/kernel/perf_event_max_sample_rate")
_USUAL_MAX_SAMPLE_RATE_HZ = 100_000  # DEFAULT_MAX_SAMPLE_RATE, kernel/events/core.c


@dataclass(frozen=True, slots=True, kw_only=True)
class PcSample:
    """A place in user code where a thread was met.

    Attributes:
        tid: The thread.
        pc: The instruction it was about to execute.
        count: How often it was met there in the window.
        stack: The words on its stack, from the stack pointer up; none if not asked for.
    """

    tid: int
    pc: Addr
    count: int = 1
    stack: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check that it was met at all."""
        if self.count < 1:
            raise UsageError(f"a sample has a count of {self.count}")


def share_within(samples: Iterable[PcSample], ranges: Sequence[tuple[Addr, Addr]]) -> float:
    """Return the share of samples whose program counter lies in any of some ranges.

    Args:
        samples: The samples; each weighs its count.
        ranges: First address, and first address behind; ascending and disjoint.

    Returns:
        From 0 to 1; 0 where there is no sample.

    >>> samples = [PcSample(tid=1, pc=Addr(0x10), count=3), PcSample(tid=1, pc=Addr(0x20))]
    >>> share_within(samples, [(Addr(0x10), Addr(0x20))])
    0.75
    """
    starts = [start for start, _ in ranges]
    n_inside = n_all = 0
    for sample in samples:
        n_all += sample.count
        index = bisect_right(starts, sample.pc) - 1
        if index >= 0 and sample.pc < ranges[index][1]:
            n_inside += sample.count
    return n_inside / n_all if n_all else 0.0


class PcSampler:
    """The clocks of one process.

    Args:
        pid: The process.
        frequency_hz: Samples per second of CPU time of each thread, 1 to
            ``MAX_FREQUENCY_HZ``; fewer where the kernel's limit is low.
        n_stack_words: Words of the stack that each sample shall have, up to
            ``MAX_STACK_WORDS``.

    Raises:
        ProcessGone: if the process does not exist.
        UsageError: if the frequency or the number of words is out of range.
    """

    def __init__(
        self, pid: int, *, frequency_hz: int = _DEFAULT_FREQUENCY_HZ, n_stack_words: int = 0
    ) -> None:
        """Remember which process it is; clocks are opened by the first window."""
        if not 1 <= frequency_hz <= MAX_FREQUENCY_HZ:
            raise UsageError(
                f"a sampling frequency of {frequency_hz} Hz is not from 1 to {MAX_FREQUENCY_HZ}"
            )
        if not 0 <= n_stack_words <= MAX_STACK_WORDS:
            raise UsageError(f"{n_stack_words} words of stack are not from 0 to {MAX_STACK_WORDS}")
        self.pid = pid
        self._n_stack_words = n_stack_words
        self._frequency_hz = max(1, min(frequency_hz, _read_max_sample_rate() // _RATE_MARGIN))
        self._clocks: dict[int, ThreadClock] = {}
        self._cpu_ticks: dict[int, int] = {}
        self._tids: dict[int, int] = {}  # by descriptor of the clock
        self._poll = select.poll()
        self._n_lost = 0
        self._n_unwatched = 0
        # Readable once all threads have exited, and never another process's.
        self._pidfd = _open_pidfd(pid)
        self._poll.register(self._pidfd, select.POLLIN)

    def __enter__(self) -> Self:
        """Return itself; the clocks are closed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the clocks."""
        self.close()

    @property
    def frequency_hz(self) -> int:
        """Samples per second of CPU time of each thread."""
        return self._frequency_hz

    @property
    def n_lost(self) -> int:
        """Samples dropped by the kernel so far because we did not fetch them in time."""
        return self._n_lost

    @property
    def n_watched(self) -> int:
        """Threads that have a clock now."""
        return len(self._clocks)

    @property
    def n_unwatched(self) -> int:
        """Threads that the last window left out, because of ``MAX_THREADS`` or a limit."""
        return self._n_unwatched

    def close(self) -> None:
        """Close all clocks; harmless when done twice."""
        for tid in tuple(self._clocks):
            self._drop(tid)
        fd, self._pidfd = self._pidfd, -1
        if fd >= 0:
            self._poll.unregister(fd)
            os.close(fd)

    def open(self) -> None:
        """Open the clocks, to see whether they are to be had; else the first window does.

        Raises:
            ProcessGone, PermissionDenied, UnsupportedTarget, OptpolineError: as ``sample``.
        """
        self._refresh()

    def sample(self, seconds: float) -> tuple[PcSample, ...]:
        """Watch for a while and return where the threads were met, most often first.

        Threads that are born during the window are seen by the next one.

        Target state: running; no thread of it is stopped or woken.

        Args:
            seconds: Length of the window.

        Raises:
            ProcessGone: if the process has exited, at once when it does.
            PermissionDenied: if we may not watch it.
            UnsupportedTarget: if the kernel has no such clock.
            OptpolineError: if not even one clock can be had within our limits.
        """
        if self._pidfd < 0 or not seconds > 0:
            raise UsageError("a sampler needs a window longer than 0 s and not to be closed")
        self._refresh()
        counts: Counter[tuple[int, ...]] = Counter()
        try:
            for clock in self._clocks.values():
                clock.drain()  # what a window that was broken off has left
                clock.enable()
            self._collect(time.monotonic() + seconds, counts)
        finally:
            for clock in self._clocks.values():
                clock.disable()
        for clock in self._clocks.values():
            self._take(clock, counts)
        return tuple(
            PcSample(tid=key[0], pc=Addr(key[1]), stack=key[2:], count=count)
            for key, count in counts.most_common()
        )

    def _collect(self, deadline: float, counts: Counter[tuple[int, ...]]) -> None:
        """Empty rings that are half full, until the deadline or the end of the process."""
        while (left_s := deadline - time.monotonic()) > 0:
            self._serve(left_s, counts)

    def _serve(self, timeout_s: float, counts: Counter[tuple[int, ...]]) -> None:
        """Wait until a ring is half full or something has exited, and see to it."""
        for fd, events in self._poll.poll(timeout_s * 1000):
            if fd == self._pidfd:
                raise ProcessGone(self.pid)
            clock = self._clocks[self._tids[fd]]
            self._take(clock, counts)
            if events & ~select.POLLIN:
                self._drop(clock.tid)  # its number may soon be another thread's

    def _take(self, clock: ThreadClock, counts: Counter[tuple[int, ...]]) -> None:
        """Move a clock's samples to the counts."""
        records = clock.drain()
        counts.update(records.samples)
        self._n_lost += records.n_lost

    def _refresh(self) -> None:
        """Give every thread a clock, or those that used most CPU time where there are many."""
        self._serve(0, Counter())
        tids = list_tids(self.pid)
        chosen = self._choose(tids)
        for tid in self._clocks.keys() - chosen:
            self._drop(tid)
        n_not_running = self._open_clocks(chosen)
        self._n_unwatched = len(tids) - n_not_running - len(self._clocks)

    def _open_clocks(self, chosen: set[int]) -> int:
        """Open the clocks still missing; return how many threads turned out to run no code."""
        n_not_running = 0
        n_pages = _ring_pages(len(chosen))
        for tid in sorted(chosen - self._clocks.keys()):
            try:
                if read_state_char(self.pid, tid) in RUNS_NO_CODE:
                    n_not_running += 1
                    continue
                clock = ThreadClock(
                    tid,
                    period_ns=_NS_PER_S // self._frequency_hz,
                    n_pages=n_pages,
                    n_stack_words=self._n_stack_words,
                )
            except ProcessGone:
                n_not_running += 1
                continue
            except (PermissionDenied, UnsupportedTarget):
                raise
            except OptpolineError:
                if not self._clocks:
                    raise
                break  # a limit of ours; the threads that have a clock must do
            self._clocks[tid] = clock
            self._tids[clock.fileno()] = tid
            self._poll.register(clock.fileno(), select.POLLIN)
        return n_not_running

    def _choose(self, tids: Sequence[int]) -> set[int]:
        """Return the threads to watch: those that ran most since the last window."""
        if len(tids) <= MAX_THREADS:
            self._cpu_ticks = {}
            return set(tids)
        ticks = {tid: _read_cpu_ticks(self.pid, tid) for tid in tids}
        recent = {tid: n_ticks - self._cpu_ticks.get(tid, 0) for tid, n_ticks in ticks.items()}
        self._cpu_ticks = ticks
        # Among equals those that have a clock already: opening one is the dearest part.
        order = sorted(tids, key=lambda tid: (-recent[tid], tid not in self._clocks))
        return set(order[:MAX_THREADS])

    def _drop(self, tid: int) -> None:
        """Close a thread's clock."""
        clock = self._clocks.pop(tid)
        del self._tids[clock.fileno()]
        self._poll.unregister(clock.fileno())
        clock.close()


def _ring_pages(n_threads: int) -> int:
    """Return how many pages of data each thread's ring has: a power of two.

    >>> [_ring_pages(n_threads) for n_threads in (1, 8, 16, 64)]
    [16, 8, 4, 1]
    """
    n_pages = MAX_RING_PAGES
    while n_pages > 1 and n_threads * (n_pages + 1) > _MAX_LOCKED_PAGES:
        n_pages //= 2
    return n_pages


def _open_pidfd(pid: int) -> int:
    """Return a descriptor that becomes readable when the process has exited."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise ProcessGone(pid) from error
    except OSError as error:
        raise OptpolineError(f"process {pid} cannot be watched: {error.strerror}") from error


def _read_cpu_ticks(pid: int, tid: int) -> int:
    """Return a thread's user and system time in clock ticks, -1 when it has exited."""
    try:
        with open(f"/proc/{pid}/task/{tid}/stat", "rb", buffering=0) as file:
            text = file.read()
    except OSError:
        return -1
    # Fields 14 and 15; those behind the last ")" begin with field 3.
    fields = text[text.rfind(b")") + 2 :].split()
    return int(fields[11]) + int(fields[12])


def _read_max_sample_rate() -> int:
    """Return kernel.perf_event_max_sample_rate, the usual one where it cannot be read."""
    try:
        return int(_MAX_SAMPLE_RATE.read_text())
    except (OSError, ValueError):
        return _USUAL_MAX_SAMPLE_RATE_HZ
