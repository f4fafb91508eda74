# SPDX-License-Identifier: Apache-2.0
"""Look at the threads of a target for grace periods, and at those of its children.

Threads that sleep in the kernel are looked at where they are: what was read counts
only if their context-switch counters say that they slept all the while. Threads that
run are looked at in a stop, as many as fit its length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

from optpoline.controller.target import Target
from optpoline.errors import AttachError, ProcessGone
from optpoline.model import Addr, Mapping
from optpoline.patch.grace import Look, ThreadKey
from optpoline.patch.layout import ARENA_PATH
from optpoline.patch.quiescence import ThreadPosition, find_held, find_words
from optpoline.patch.ranges import AddressRanges
from optpoline.patch.stacks import StackMap
from optpoline.process.memory import RemoteMemory
from optpoline.process.pagemap import resident_ranges
from optpoline.process.procfs import (
    ThreadWhere,
    list_tids,
    read_maps,
    read_state_char,
    read_thread_state,
)
from optpoline.process.sharers import find_sharers
from optpoline.process.stop import Stop, Wake, stop_threads

__all__ = ["AddressSpace", "ThreadObserver", "child_space", "target_space"]

MAX_SEARCH_SIZE = 4 << 30
"""Bytes of writable memory searched for contexts of programs that switch stacks."""

MAX_STOPPED_SEARCH_SIZE = 8 << 20
"""The same while the program is stopped: some 5 ms."""

LOOK_S = 10e-6
"""Time for looks in a stop, per thread that stands: a third of what a look at each would
take. 2,000 threads stand for 25 ms and more in any case."""

_DEAD_STATES = "ZX"


@dataclass(slots=True)
class AddressSpace:
    """A process whose threads are looked at, with those that share its memory.

    Attributes:
        pid: The process.
        memory: Its memory.
        read_maps: Reads its memory map anew.
        stop: Stops its threads for the length of a block; None if it must not be stopped.
        maps: Its memory map as of the look under way.
        stack_map: Where its stacks may be, likewise.
        stacks: Mappings that are one thread's stack and nothing else, seen clean.
        holding: The same of threads that were inside the code at their last look.
        is_target: Whether it is the target itself, whose end is an error.
    """

    pid: int
    memory: RemoteMemory
    read_maps: Callable[[], Sequence[Mapping]]
    stop: Callable[[Wake], AbstractContextManager[Stop]] | None
    maps: Sequence[Mapping] = ()
    stack_map: StackMap = field(default_factory=lambda: StackMap(()))
    stacks: set[tuple[int, int]] = field(default_factory=set)
    holding: dict[ThreadKey, tuple[int, int]] = field(default_factory=dict)
    is_target: bool = False

    def refresh(self) -> None:
        """Read the memory map anew.

        Raises:
            ProcessGone: if the process is.
        """
        maps = self.read_maps()
        if maps != self.maps:
            self.maps, self.stack_map = maps, StackMap(maps)

    def forget_stacks(self) -> None:
        """Look at every stack anew."""
        self.stacks.clear()
        self.holding.clear()


def target_space(target: Target) -> AddressSpace:
    """Return the target's own."""
    return AddressSpace(
        pid=target.pid,
        memory=target.memory,
        read_maps=target.read_maps,
        stop=target.stop,
        is_target=True,
    )


def child_space(pid: int, *, may_stop: bool, timeout_ns: int) -> AddressSpace:
    """Return that of a forked child of the target.

    Raises:
        AttachError: if it is gone, or its memory may not be read.
    """
    memory = RemoteMemory(pid)

    @contextmanager
    def stop(wake: Wake) -> Iterator[Stop]:
        with stop_threads(pid, memory=memory, wake=wake, timeout_ns=timeout_ns) as stopped:
            yield stopped

    return AddressSpace(
        pid=pid,
        memory=memory,
        read_maps=lambda: read_maps(pid),
        stop=stop if may_stop else None,
    )


class _Found:
    """What a look has found so far."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._quiescent: set[ThreadKey] = set()
        self._holding: dict[ThreadKey, frozenset[int]] = {}

    def add(self, key: ThreadKey, held: frozenset[int] | None) -> None:
        """Note where a thread is, None if it could not be told."""
        if held is None:
            return
        if held:
            self._holding[key] = held
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
    """

    def __init__(
        self, spaces: Callable[[], Sequence[AddressSpace]], *, stop_budget_s: float = 0.0025
    ) -> None:
        """Look at nothing yet."""
        self._spaces = spaces
        self._budget_s = stop_budget_s
        self._is_switching = False
        self._has_nappers = False
        """Whether a stop of this grace period found threads asleep too briefly for a look."""

    def is_switching(self) -> bool:
        """Tell whether the program was ever seen to run on stacks of its own making."""
        return self._is_switching

    def look(self, ranges: AddressRanges, known: Collection[ThreadKey]) -> Look:
        """Look at threads that sleep."""
        found = _Found()
        self._has_nappers &= bool(known)
        for space in self._spaces():
            if not known:
                space.forget_stacks()
            for key in _list_threads(space):
                if key not in known:
                    found.add(key, self._find_held_asleep(space, key, ranges))
        # Listed behind the looks: a child forked by a thread before that was looked at is here.
        return found.as_look(self._list_all())

    def look_stopped(self, ranges: AddressRanges, known: Collection[ThreadKey]) -> Look:
        """Stop the threads that run, and look at all."""
        found = _Found()
        untold: set[ThreadKey] = set()
        pointed_to: set[int] | None = set()
        for space in self._spaces():
            if space.stop is None:
                for key in _list_threads(space):
                    if key not in known:
                        found.add(key, self._find_held_asleep(space, key, ranges))
                if self._is_switching:
                    pointed_to = None  # a search of memory that changes meanwhile proves nothing
                continue
            try:
                more = self._look_in_stop(space, space.stop, ranges, known, found, untold)
            except ProcessGone:
                if space.is_target:
                    raise
                continue  # a child that has exited
            pointed_to = None if pointed_to is None or more is None else pointed_to | more
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
            if self._is_switching:
                # What was mapped, or parked on a stack, since the last look counts as well.
                space.refresh()
                space.forget_stacks()
            self._look_at_stopped(space, stop, ranges, known, found)
            if not self._is_switching:
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
                held = self._find_held_asleep(space, key, ranges)
                found.add(key, held)
                if held is not None:
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
        before = {key: _read_switches(key) for key in asleep}
        held = {key: self._find_held_asleep(space, key, ranges) for key in asleep}
        pointed_to = self._search(space, ranges, MAX_STOPPED_SEARCH_SIZE)
        for key in asleep:
            # Who woke meanwhile may have resumed a context that was not found.
            if _read_switches(key) == before[key]:
                found.add(key, held[key])
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
                    more = self._search(space, ranges, MAX_SEARCH_SIZE)
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
                keys.update(_list_threads(space))
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
            if found.looked_at and not self._is_switching and time.monotonic() > end_s:
                break
            position = ThreadPosition(tid=thread.tid, pc=thread.pc, sp=thread.sp)
            held = _find_held(space, position, ranges)
            self._note_stack(space, key, position, held)
            found.add(key, held)

    def _note_stack(
        self,
        space: AddressSpace,
        key: ThreadKey,
        position: ThreadPosition,
        held: frozenset[int] | None,
    ) -> None:
        """Note what kind of stack a thread is on, and whether it need not be searched."""
        # A stack that it has left since with a saved PC on it is memory like any other.
        space.holding.pop(key, None)
        stack = space.stack_map.stack_at(position.sp)
        if stack is None or held is None:
            return
        if not stack.is_own:
            self._is_switching = True
        elif held:
            space.holding[key] = (stack.start, stack.end)
        else:
            space.stacks.add((stack.start, stack.end))

    def _find_held_asleep(
        self, space: AddressSpace, key: ThreadKey, ranges: AddressRanges
    ) -> frozenset[int] | None:
        """Look at a thread without stopping it; None if it does not sleep all the while."""
        try:
            before = read_thread_state(*key)
            if before.where is ThreadWhere.RUNNING:
                return None
            position = ThreadPosition(tid=before.tid, pc=before.pc, sp=before.sp)
            held = _find_held(space, position, ranges)
        except AttachError:
            return None
        if _read_switches(key) != (before.n_voluntary, before.n_nonvoluntary):
            return None
        self._note_stack(space, key, position, held)
        return held

    def _search(
        self, space: AddressSpace, ranges: AddressRanges, max_size: int
    ) -> frozenset[int] | None:
        """Search one address space, threads' own stacks left out: those were looked at."""
        found = find_words(
            read=space.memory.read,
            maps=_existing(space),
            skip=(),
            ranges=ranges,
            max_size=max_size,
        )
        if found:
            self._is_switching = True
        return found


def _existing(space: AddressSpace) -> tuple[Mapping, ...]:
    """Return the writable memory that exists and was not looked at as a thread's stack."""
    parts: list[Mapping] = []
    living = [stack for key, stack in space.holding.items() if _read_switches(key) is not None]
    skipped = {*space.stacks, *living}
    for mapping in space.maps:
        # Counters hold targets that were counted; nobody keeps a saved PC there.
        if not mapping.is_writable or mapping.path == ARENA_PATH:
            continue
        if (mapping.start, mapping.end) in skipped:
            continue
        if mapping.perms.endswith("s"):
            parts.append(mapping)
            continue
        ranges = resident_ranges(space.pid, mapping.start, mapping.end)
        parts += [replace(mapping, start=Addr(first), end=Addr(last)) for first, last in ranges]
    return tuple(parts)


def _list_threads(space: AddressSpace) -> tuple[ThreadKey, ...]:
    """Return the threads that live in an address space, and read its memory map anew."""
    keys: list[ThreadKey] = []
    try:
        space.refresh()
        pids = (space.pid, *find_sharers(space.pid))
    except ProcessGone:
        if space.is_target:
            raise
        return ()
    for pid in pids:
        try:
            keys += [(pid, tid) for tid in list_tids(pid) if not _is_dead(pid, tid)]
        except ProcessGone:
            if pid == space.pid and space.is_target:
                raise
    return tuple(keys)


def _is_dead(pid: int, tid: int) -> bool:
    """Tell whether a thread runs no more, such as a first thread that has exited."""
    try:
        return read_state_char(pid, tid) in _DEAD_STATES
    except ProcessGone:
        return True


def _read_switches(key: ThreadKey) -> tuple[int, int] | None:
    """Return a thread's context-switch counters; None if it is gone."""
    try:
        state = read_thread_state(*key)
    except ProcessGone:
        return None
    return state.n_voluntary, state.n_nonvoluntary


def _find_held(
    space: AddressSpace, position: ThreadPosition, ranges: AddressRanges
) -> frozenset[int] | None:
    """Look at one thread."""
    return find_held(position, read=space.memory.read, stacks=space.stack_map, ranges=ranges)
