# SPDX-License-Identifier: Apache-2.0
"""Find the processes that map a file which nobody can open by name, such as an arena.

Only a fork hands such a mapping on, so a process that has not got it never will: each
process is looked at once, and none at all while the machine has forked nothing. A child
may be forked behind a look by one that is gone by the next; so looks are repeated until
nothing was forked during one.
"""

from __future__ import annotations

import os

from optpoline.errors import AttachError, ProcessGone
from optpoline.process.births import BirthWatch
from optpoline.process.kinship import Kinship
from optpoline.process.procfs import read_maps, read_start_time

__all__ = ["MapperFinder"]

_MAX_PASSES = 32
"""Looks at those who are new, until there is none; one takes a millisecond at most."""


class MapperFinder:
    """Finds the forked children, and theirs, that share a file's mapping with a process.

    Args:
        pid: The process that had it first.
        path: How the mapping is named in ``/proc/PID/maps``.
        since: When the file was made, or before, in clock ticks since boot; None for
            the process's own start.
    """

    def __init__(self, pid: int, path: str, *, since: int | None = None) -> None:
        """Begin; processes older than the mapping cannot have it, but are not known yet."""
        self._pid = pid
        self._path = path
        self._kinship = Kinship(pid, since=since)
        self._births = BirthWatch()
        self._unasked: set[int] = set()
        self._innocent: dict[int, int] = {}
        self._mappers: dict[int, int] = {}
        self._unread: dict[int, int] = {}
        self.is_complete = False
        """Whether the last look missed nobody."""

    def find(self, inodes: frozenset[int]) -> tuple[int, ...]:
        """Return the other processes that map one of the files, as far as they can be read.

        Args:
            inodes: Of the files.
        """
        self._mappers = {
            pid: start for pid, start in self._mappers.items() if self._still(pid, start, inodes)
        }
        # Asked again: they may have run another program.
        self._unasked |= self._unread.keys()
        self.is_complete = False
        for _ in range(_MAX_PASSES):
            self._unasked |= {*self._births.list_new()} - {self._pid, os.getpid()}
            for pid in tuple(self._unasked):
                self._look_at(pid, inodes)
                self._unasked.discard(pid)
            if self._births.is_current:
                self.is_complete = True
                break
        return tuple(sorted(self._mappers))

    @property
    def start_times(self) -> dict[int, int]:
        """When each process that was found was started: its number may be another's later."""
        return dict(self._mappers)

    @property
    def unreadable(self) -> tuple[int, ...]:
        """Processes whose memory map we may not read, and that may be mappers."""
        return tuple(sorted(self._unread))

    @property
    def is_current(self) -> bool:
        """Whether nothing was forked since the last look, and that was complete."""
        return self.is_complete and self._births.is_current

    def acquit(self, pid: int) -> None:
        """Note that a process which was found runs another program now."""
        self._innocent[pid] = self._mappers.pop(pid)

    def _look_at(self, pid: int, inodes: frozenset[int]) -> None:
        """Find out about one process that may be new."""
        self._unread.pop(pid, None)
        try:
            start = read_start_time(pid)
        except ProcessGone:
            return
        except AttachError:
            self._unread[pid] = 0  # no descriptor is left to us
            return
        if self._innocent.get(pid) == start or self._mappers.get(pid) == start:
            return
        try:
            is_mapper = self._maps(pid, inodes)
        except AttachError:
            if self._kinship.is_kin(pid, start):
                self._unread[pid] = start
                return
            is_mapper = False
        if is_mapper:
            self._mappers[pid] = start
        else:
            self._mappers.pop(pid, None)
            self._innocent[pid] = start

    def _still(self, pid: int, start: int, inodes: frozenset[int]) -> bool:
        """Tell whether a process that was found is the same, and maps one of the files."""
        try:
            return read_start_time(pid) == start and self._maps(pid, inodes)
        except ProcessGone:
            return False
        except AttachError:
            return True  # it was one, and cannot be looked at any more

    def _maps(self, pid: int, inodes: frozenset[int]) -> bool:
        """Tell whether a process maps one of the files in parts, as programs do.

        A controller maps all of its arenas at once, writable: it is none.
        """
        try:
            maps = read_maps(pid)
        except ProcessGone:
            return False
        return any(
            m.path == self._path and m.inode in inodes and not (m.is_writable and m.offset == 0)
            for m in maps
        )
