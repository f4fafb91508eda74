# SPDX-License-Identifier: Apache-2.0
"""Look at the threads of a target for grace periods, and at those of its children.

Threads that sleep in the kernel are looked at where they are: what was read counts
only if they slept all the while (``has_slept_since``). Threads that run are sampled
(``running_threads``); those that samples do not tell of are looked at in a stop, as many
as fit its length. A thread under another's tracer is not looked at:
its registers may be ones that a debugger has put there for a call, and its own elsewhere.

A program is *suspected* of switching its stacks when there is what a switch leaves, but
also a signal: a saved PC below a thread's stack pointer. It is then looked at in one stop
like one that does, if memory is small enough for that. Suspicion is no reason to reuse
nothing: if it is too large, the program is *excused*, and searched as before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from optpoline.controller.address_space import AddressSpace
from optpoline.controller.running_threads import RunningThreads, fill_holes, scan_sample
from optpoline.errors import AttachError, PermissionDenied, ProcessGone
from optpoline.patch.grace import Look, ThreadKey
from optpoline.patch.memory_search import search_memory
from optpoline.patch.quiescence import ThreadPosition, ThreadScan, scan_thread
from optpoline.patch.ranges import AddressRanges
from optpoline.process.stop import Stop, Wake
from optpoline.process.thread_state import ThreadState, has_slept_since, read_asleep

__all__ = ["ThreadObserver"]

MAX_SEARCH_SIZE = 4 << 30
"""Bytes of writable memory searched for contexts of programs that switch stacks."""

MAX_STOPPED_SEARCH_SIZE = 8 << 20
"""The same while the program is stopped: some 5 ms."""

LOOK_S = 10e-6
"""Time for looks in a stop, per thread that stands: a third of what a look at each would
take. 2,000 threads stand for 25 ms and more in any case."""


class _Found:
    """What a look has found so far."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._quiescent: set[ThreadKey] = set()
        self._holding: dict[ThreadKey, frozenset[int]] = {}

    def add(self, key: ThreadKey, scan: ThreadScan | None) -> None:
        """Note where a thread is, None if it could not be told."""
        if scan is None:
            return
        if scan.held:
            self._holding[key] = scan.held
        else:
            self._quiescent.add(key)

    @property
    def looked_at(self) -> frozenset[ThreadKey]:
        """Threads that were looked at."""
        return frozenset(self._quiescent | self._holding.keys())

    def as_look(
        self, threads: frozenset[ThreadKey], pointed_to: frozenset[int] | None = None
    ) -> Look:
        """Return all of it."""
        return Look(
            quiescent=frozenset(self._quiescent),
            threads=threads,
            holding=self._holding,
            pointed_to=pointed_to,
        )


class ThreadObserver:
    """The observer of one session's, or one takeover's, grace periods.

    Args:
        spaces: Returns the address spaces to look at, found anew each time.
        stop_budget_s: How long threads that run may be kept for a look at them.
        samples: Whether threads that run are sampled before any is stopped: that is for who
            can wait, as the first clock of a machine takes 20 ms.
    """

    def __init__(
        self,
        spaces: Callable[[], Sequence[AddressSpace]],
        *,
        stop_budget_s: float = 0.0025,
        samples: bool = False,
    ) -> None:
        """Look at nothing yet."""
        self._spaces = spaces
        self._budget_s = stop_budget_s
        self._is_proved = False
        self._is_suspected = False
        self._is_excused = False
        self._running = RunningThreads() if samples else None
        self._has_nappers = False
        """Whether a stop of this grace period found threads asleep too briefly for a look."""

    def is_switching(self) -> bool:
        """Tell whether the program was ever seen, or is suspected, to switch its stacks."""
        return self._is_proved or self._is_suspected

    def suspect_switching(self) -> None:
        """Note that a thread, or memory, may have changed as no program on one stack does."""
        self._is_suspected = not self._is_excused

    def look(self, ranges: AddressRanges, known: Collection[ThreadKey]) -> Look:
        """Look at threads that sleep, then at some that run."""
        found = _Found()
        self._has_nappers &= bool(known)
        for space in self._spaces():
            if not known:
                space.scans.clear()
            for key in space.list_threads():
                if key not in known:
                    found.add(key, self._scan_asleep(space, key, ranges))
            if not self.is_switching():
                self._look_at_running(space, ranges, known, found)
        # Listed behind the looks: a child forked by a thread before that was looked at is here.
        return found.as_look(self._list_all())

    def _look_at_running(
        self,
        space: AddressSpace,
        ranges: AddressRanges,
        known: Collection[ThreadKey],
        found: _Found,
    ) -> None:
        """Sample threads that do not sleep."""
        if self._running is None:
            return
        left = [key for key in space.threads if key not in known and key not in found.looked_at]
        for key, sample in self._running.sample(left).items():
            scan = scan_sample(
                sample,
                find_resident=space.find_existing,
                stacks=space.stack_map,
                ranges=ranges,
            )
            found.add(key, scan)
            if scan is not None:
                space.scans[key] = scan
            else:
                fill_holes(sample, read=space.memory.read, stacks=space.stack_map)

    def look_stopped(self, ranges: AddressRanges, known: Collection[ThreadKey]) -> Look:
        """Stop the threads that run, and look at all."""
        found = _Found()
        untold: set[ThreadKey] = set()
        pointed_to: set[int] | None = set()
        for space in self._spaces():
            if space.stop is None:
                for key in space.list_threads():
                    if key not in known:
                        found.add(key, self._scan_asleep(space, key, ranges))
                if self.is_switching():
                    pointed_to = None  # a search of memory that changes meanwhile proves nothing
                continue
            try:
                more = self._look_in_stop(space, space.stop, ranges, known, found, untold)
            except ProcessGone:
                if space.is_target:
                    raise
                continue  # a child that has exited
            pointed_to = None if pointed_to is None or more is None else pointed_to | more
        if pointed_to is None and self._is_suspected:
            self._is_suspected, self._is_excused = False, True
        # Who could not be told may have parked a context behind the search, and be gone by now.
        return found.as_look(
            self._list_all() | untold, None if pointed_to is None else frozenset(pointed_to)
        )

    def _look_in_stop(
        self,
        space: AddressSpace,
        stop_space: Callable[[Wake], AbstractContextManager[Stop]],
        ranges: AddressRanges,
        known: Collection[ThreadKey],
        found: _Found,
        untold: set[ThreadKey],
    ) -> frozenset[int] | None:
        """Look at one address space; return what a search of its memory found, if one was due."""
        # A thread that naps too briefly for a look holds everything up, unless it stands; but
        # one that wakes to begin a transfer may be interrupted in it: only where it must be.
        with stop_space(Wake.UNNOTICED if self._has_nappers else Wake.NONE) as stop:
            if self.is_switching():
                # What was mapped, or parked on a stack, since the last look counts as well.
                space.refresh()
                space.scans.clear()
            self._look_at_stopped(space, stop, ranges, known, found)
            if not self.is_switching():
                self._look_at_nappers(space, stop, ranges, known, found)
                return frozenset()
            pointed_to = self._look_at_all_memory(space, stop, ranges, found)
            there = {*stop.sleepers, *((thread.pid, thread.tid) for thread in stop.stopped)}
            untold |= there - found.looked_at
            self._has_nappers |= bool(untold)
            return pointed_to

    def _look_at_nappers(
        self,
        space: AddressSpace,
        stop: Stop,
        ranges: AddressRanges,
        known: Collection[ThreadKey],
        found: _Found,
    ) -> None:
        """Look at threads that sleep too briefly for a look: one that wakes is stopped."""
        end_s = time.monotonic() + self._budget_s
        left = {key for key in stop.sleepers if key not in known}
        while left and time.monotonic() < end_s:
            for key in tuple(left):
                scan = self._scan_asleep(space, key, ranges, in_stop=True)
                found.add(key, scan)
                if scan is not None:
                    left.discard(key)
            if left:
                stop.sweep()
                self._look_at_stopped(space, stop, ranges, {*known, *found.looked_at}, found)
                left &= set(stop.sleepers)
        self._has_nappers |= bool(left)

    def _look_at_all_memory(
        self, space: AddressSpace, stop: Stop, ranges: AddressRanges, found: _Found
    ) -> frozenset[int] | None:
        """Look at the sleepers and at memory, and see that nobody woke meanwhile."""
        asleep = stop.sleepers
        before = {key: _read_asleep(key, in_stop=True) for key in asleep}
        scans = {key: self._scan_asleep(space, key, ranges, in_stop=True) for key in asleep}
        pointed_to = self._search(space, ranges, MAX_STOPPED_SEARCH_SIZE, is_stopped=True)
        for key, state in before.items():
            # Who woke meanwhile may have resumed a context that was not found.
            if state is not None and _has_slept_since(key, state):
                found.add(key, scans[key])
        return pointed_to

    def search(self, ranges: AddressRanges) -> frozenset[int] | None:
        """Return addresses in ``ranges`` found in writable memory; None: too much memory."""
        found: set[int] = set()
        searched: set[int] = set()
        # A child forked meanwhile has a copy of contexts that may be gone from what is searched.
        while new := [space for space in self._spaces() if space.pid not in searched]:
            for space in new:
                searched.add(space.pid)
                try:
                    more = self._search(space, ranges, MAX_SEARCH_SIZE, is_stopped=False)
                except ProcessGone:
                    if space.is_target:
                        raise
                    continue
                if more is None:
                    return None
                found |= more
        return frozenset(found)

    def _list_all(self) -> frozenset[ThreadKey]:
        """Return all threads of all address spaces, those that came while others were listed."""
        keys: set[ThreadKey] = set()
        listed: set[int] = set()
        while new := [space for space in self._spaces() if space.pid not in listed]:
            for space in new:
                listed.add(space.pid)
                keys.update(space.list_threads())
        return frozenset(keys)

    def _look_at_stopped(
        self,
        space: AddressSpace,
        stop: Stop,
        ranges: AddressRanges,
        known: Collection[ThreadKey],
        found: _Found,
    ) -> None:
        """Look at the threads that stand, as many as there is time for."""
        # Thousands of threads take longer to stop than to look at.
        budget_s = max(self._budget_s, LOOK_S * len(stop.stopped))
        end_s = time.monotonic() + budget_s
        for thread in stop.stopped:
            key = (thread.pid, thread.tid)
            if key in known:
                continue
            if found.looked_at and not self.is_switching() and time.monotonic() > end_s:
                break
            position = ThreadPosition(tid=thread.tid, pc=thread.pc, sp=thread.sp)
            found.add(key, self._scan(space, key, position, ranges))

    def _scan(
        self,
        space: AddressSpace,
        key: ThreadKey,
        position: ThreadPosition,
        ranges: AddressRanges,
    ) -> ThreadScan | None:
        """Look at a thread that does not move; note what kind of stack it is on."""
        # Of a stack that it has left since nothing is known any more.
        space.scans.pop(key, None)
        scan = scan_thread(
            position,
            read=space.memory.read,
            find_resident=space.find_existing,
            stacks=space.stack_map,
            ranges=ranges,
        )
        stack = space.stack_map.stack_at(position.sp)
        if scan is not None and stack is not None:
            self._is_proved |= not stack.is_own
            space.scans[key] = scan
        return scan

    def _scan_asleep(
        self, space: AddressSpace, key: ThreadKey, ranges: AddressRanges, *, in_stop: bool = False
    ) -> ThreadScan | None:
        """Look at a thread without stopping it; None if it does not sleep all the while."""
        state = _read_asleep(key, in_stop=in_stop)
        if state is None:
            return None
        position = ThreadPosition(tid=state.tid, pc=state.pc, sp=state.sp)
        try:
            scan = self._scan(space, key, position, ranges)
        except AttachError:
            return None
        if _has_slept_since(key, state):
            return scan
        space.scans.pop(key, None)
        return None

    def _search(
        self, space: AddressSpace, ranges: AddressRanges, max_size: int, *, is_stopped: bool
    ) -> frozenset[int] | None:
        """Search one address space, and note what the hits say of the program."""
        alive = {k: scan for k, scan in space.scans.items() if is_stopped or k in space.threads}
        gone = [scan for key, scan in space.scans.items() if key not in alive]
        found = search_memory(
            read=space.memory.read,
            memory=space.find_writable(),
            scans=tuple(alive.values()),
            dead=[(stack.start, stack.end) for scan in gone for stack in scan.stacks],
            ranges=ranges,
            max_size=max_size,
            is_stopped=is_stopped,
        )
        if found is None:
            return None
        self._is_proved |= found.is_proof
        if found.is_suspicious:
            self.suspect_switching()
        return found.addrs


def _read_asleep(key: ThreadKey, *, in_stop: bool) -> ThreadState | None:
    """Return where a thread sleeps; None if it does not, or another tracer has its registers.

    A stop of ours may leave threads alone that it has seized already.
    """
    try:
        state = read_asleep(*key)
    except PermissionDenied:
        return None
    if state is None:
        return None
    if state.tracer_pid and not (in_stop and Path(f"/proc/self/task/{state.tracer_pid}").exists()):
        return None
    return state


def _has_slept_since(key: ThreadKey, before: ThreadState) -> bool:
    """Tell whether a thread has slept all the while, as far as we may know."""
    try:
        return has_slept_since(key[0], before)
    except PermissionDenied:
        return False
