# SPDX-License-Identifier: Apache-2.0
"""Find the processes that map a file which nobody can open by name, such as an arena.

Only a fork hands such a mapping on, so a process that has not got it never will: each
process is looked at once, and none at all while the machine has forked nothing.
"""

from __future__ import annotations

import os

from optpoline.errors import AttachError, ProcessGone
from optpoline.process.procfs import read_maps, read_start_time, read_status

__all__ = ["MapperFinder"]

_ALL_FORKS = "/proc/stat"
_FORKS_KEY = b"processes "


class MapperFinder:
    """Finds the forked children, and theirs, that share a file's mapping with a process.

    Args:
        pid: The process that had it first.
        path: How the mapping is named in ``/proc/PID/maps``.
    """

    def __init__(self, pid: int, path: str) -> None:
        """Begin; processes older than the mapping cannot have it, but are not known yet."""
        self._pid = pid
        self._path = path
        self._n_forks = -1
        self._innocent: set[tuple[int, int]] = set()
        self._mappers: tuple[int, ...] = ()
        self.unreadable: tuple[int, ...] = ()
        """Descendants whose memory map we may not read: they may be mappers, or not."""

    def find(self, inodes: frozenset[int]) -> tuple[int, ...]:
        """Return the other processes that map one of the files.

        Args:
            inodes: Of the files.
        """
        n_forks = _count_forks()
        if n_forks == self._n_forks:
            # Nobody new; but some may have exited or run another program since.
            self._mappers = tuple(pid for pid in self._mappers if self._maps(pid, inodes))
            return self._mappers
        # Read before the processes are listed, so that a later fork shows next time.
        self._n_forks = n_forks
        mappers: list[int] = []
        unreadable: list[int] = []
        alive: set[tuple[int, int]] = set()
        for name in os.listdir("/proc"):
            if not name.isdigit() or int(name) in (self._pid, os.getpid()):
                continue
            pid = int(name)
            try:
                key = (pid, read_start_time(pid))
            except AttachError:
                continue
            if key in self._innocent:
                alive.add(key)
                continue
            try:
                if self._maps(pid, inodes):
                    mappers.append(pid)
                else:
                    alive.add(key)
            except AttachError:
                unreadable.append(pid)
        self._innocent = alive
        self._mappers = tuple(sorted(mappers))
        family = {self._pid, *mappers, *unreadable}
        self.unreadable = tuple(pid for pid in sorted(unreadable) if _parent_of(pid) in family)
        return self._mappers

    def _maps(self, pid: int, inodes: frozenset[int]) -> bool:
        """Tell whether a process maps one of the files in parts, as programs do.

        A controller maps all of its arenas at once, writable: it is none.
        """
        try:
            maps = read_maps(pid)
        except ProcessGone:
            return False
        except AttachError:
            if pid in self._mappers:
                return True  # it was one, and cannot be looked at any more
            raise
        return any(
            m.path == self._path and m.inode in inodes and not (m.is_writable and m.offset == 0)
            for m in maps
        )


def _parent_of(pid: int) -> int | None:
    """Return a process's parent, None if it is gone."""
    try:
        return read_status(pid).ppid
    except AttachError:
        return None


def _count_forks() -> int:
    """Return how many processes and threads the machine has started since boot."""
    with open(_ALL_FORKS, "rb") as file:
        for line in file:
            if line.startswith(_FORKS_KEY):
                return int(line.split()[1])
    return -1
