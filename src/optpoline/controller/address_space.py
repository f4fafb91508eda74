# SPDX-License-Identifier: Apache-2.0
"""Address spaces that grace periods look at: the target's, and its children's.

One has a memory map, threads (those of other processes that share it included), and
what the looks at these have found.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from optpoline.controller.target import Target
from optpoline.errors import ProcessGone
from optpoline.model import Mapping
from optpoline.patch.grace import ThreadKey
from optpoline.patch.layout import ARENA_PATH
from optpoline.patch.quiescence import ThreadScan
from optpoline.patch.stacks import StackMap
from optpoline.process.memory import RemoteMemory
from optpoline.process.pagemap import resident_ranges
from optpoline.process.procfs import RUNS_NO_CODE, list_every_tid, read_maps, read_state_char
from optpoline.process.sharers import SharerFinder
from optpoline.process.stop import Stop, Wake, stop_threads

__all__ = ["AddressSpace", "child_space", "target_space"]


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
        threads: Its threads at the last listing, those of processes that share it included.
        scans: The last look at each thread, in this grace period, that could tell.
        sharers: Finds the processes that share it; None for a child, because those map
            the arena as well and are looked at as children themselves.
        is_target: Whether it is the target itself, whose end is an error.
    """

    pid: int
    memory: RemoteMemory
    read_maps: Callable[[], Sequence[Mapping]]
    stop: Callable[[Wake], AbstractContextManager[Stop]] | None
    maps: Sequence[Mapping] = ()
    stack_map: StackMap = field(default_factory=lambda: StackMap(()))
    threads: frozenset[ThreadKey] = frozenset()
    scans: dict[ThreadKey, ThreadScan] = field(default_factory=dict)
    sharers: SharerFinder | None = None
    is_target: bool = False

    def refresh(self) -> None:
        """Read the memory map anew.

        Raises:
            ProcessGone: if the process is.
        """
        maps = self.read_maps()
        if maps != self.maps:
            self.maps, self.stack_map = maps, StackMap(maps)

    def list_threads(self) -> tuple[ThreadKey, ...]:
        """Return the threads that live in it, and read its memory map anew.

        Raises:
            ProcessGone: if the process is gone, and the target.
            Unsettled: if processes are started faster than they can be looked at.
        """
        keys: list[ThreadKey] = []
        listed: set[int] = set()
        try:
            self.refresh()
            # One that exits before its threads are listed may have started another.
            while new := self._list_pids() - listed:
                listed |= new
                for pid in new:
                    keys += _list_tids(pid, must_live=pid == self.pid)
        except ProcessGone:
            if self.is_target:
                raise
            return ()
        # Who was there is gone when it is not there, not when it is not listed.
        keys += self.threads.difference(keys)
        keys = [key for key in keys if not _runs_no_code(*key)]
        self.threads = frozenset(keys)
        return tuple(keys)

    def _list_pids(self) -> set[int]:
        """Return the processes that live in it."""
        return {self.pid, *(self.sharers.find() if self.sharers is not None else ())}

    def find_existing(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a range of memory that exist, in address order.

        A page of a shared mapping may have been written by others only, and not be shown.

        Raises:
            ProcessGone: if the process is.
        """
        at = bisect.bisect_right(self.maps, first, key=lambda mapping: mapping.end)
        for mapping in self.maps[at:]:
            if mapping.start >= end:
                return
            part = (max(first, mapping.start), min(end, mapping.end))
            if mapping.perms.endswith("s"):
                yield part
            else:
                yield from next(resident_ranges(self.pid, [part]))

    def find_writable(self) -> Iterator[tuple[int, int]]:
        """Yield the writable memory that exists, but for counters of ours, in address order.

        Counters hold targets that were counted; nobody keeps a saved PC there.

        Raises:
            ProcessGone: if the process is.
        """
        maps = [one for one in self.maps if one.is_writable and one.path != ARENA_PATH]
        private = [(one.start, one.end) for one in maps if not one.perms.endswith("s")]
        resident = resident_ranges(self.pid, private)
        for mapping in maps:
            if mapping.perms.endswith("s"):
                yield mapping.start, mapping.end
            else:
                yield from next(resident)


def target_space(target: Target) -> AddressSpace:
    """Return the target's own."""
    return AddressSpace(
        pid=target.pid,
        memory=target.memory,
        read_maps=target.read_maps,
        stop=target.stop,
        sharers=target.sharers,
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


def _list_tids(pid: int, *, must_live: bool) -> list[ThreadKey]:
    """Return the threads of a process; none if it is gone and may be."""
    try:
        return [(pid, tid) for tid in list_every_tid(pid)]
    except ProcessGone:
        if must_live:
            raise
        return []


def _runs_no_code(pid: int, tid: int) -> bool:
    """Tell whether a thread never runs again, such as a first thread that has exited."""
    try:
        return read_state_char(pid, tid) in RUNS_NO_CODE
    except ProcessGone:
        return True
