# SPDX-License-Identifier: Apache-2.0
"""The target's forked children: they map its arenas and have its text of then.

A child needs nothing of us to run on: its sites lead to blocks that it shares, so what
is learned for the target serves it as well. Two things depend on it: no block that its
text leads to is ever retired, and with ``Config.follow_fork`` it is restored at the end
as the target is; else it keeps what it has (``optpoline detach`` undoes that).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from optpoline.controller.observer import AddressSpace, child_space
from optpoline.controller.takeover import restore
from optpoline.controller.target import Target
from optpoline.errors import AttachError, OptpolineError, ProcessGone
from optpoline.model import Addr
from optpoline.patch.layout import ARENA_PATH, JournalEntry
from optpoline.patch.text import read_entries
from optpoline.process.mappers import MapperFinder
from optpoline.process.memory import RemoteMemory

__all__ = ["Children", "led_to"]


def led_to(memory: RemoteMemory, entries: Sequence[JournalEntry]) -> set[Addr]:
    """Return every address that a site leads to in a process, whatever its opcode is now.

    Raises:
        ProcessGone: if the process is.
    """
    found = read_entries(memory, entries)
    leads: set[Addr] = set()
    for entry in entries:
        disp = found[entry.addr][entry.disp_off : entry.disp_off + 4]
        if len(disp) == 4:
            leads.add(Addr(entry.end + int.from_bytes(disp, "little", signed=True)))
    return leads


class Children:
    """The children of one target that map its arenas.

    Args:
        target: The target.
        follow: Whether they may be stopped, and are restored at the end.
    """

    def __init__(self, target: Target, *, follow: bool) -> None:
        """Look for none yet."""
        self._target = target
        self._follow = follow
        self._finder = MapperFinder(target.pid, ARENA_PATH)
        self._spaces: dict[int, AddressSpace] = {}
        self._refused: set[int] = set()
        self.n_seen = 0
        """Children ever found."""

    def find(self) -> tuple[AddressSpace, ...]:
        """Return the address spaces of those that live."""
        inodes = frozenset(arena.inode for arena in self._target.arenas)
        pids = self._finder.find(inodes) if inodes else ()
        self._refused &= set(pids)
        for pid in set(self._spaces) - set(pids):
            self._spaces.pop(pid).memory.close()
        for pid in pids:
            if pid not in self._spaces:
                self._add(pid)
        return tuple(self._spaces.values())

    def _add(self, pid: int) -> None:
        """Open a new child's memory."""
        try:
            self._spaces[pid] = child_space(
                pid, may_stop=self._follow, timeout_ns=self._target.stop_timeout_ns
            )
            self.n_seen += 1
        except ProcessGone:
            pass
        except AttachError:
            self._refused.add(pid)

    @property
    def unreadable(self) -> tuple[int, ...]:
        """Children whose memory we may not read, as of the last look for them."""
        return (*self._finder.unreadable, *sorted(self._refused))

    def led_to(self, entries: Iterable[JournalEntry]) -> frozenset[Addr]:
        """Return every address that a site leads to in the text of a child."""
        wanted = tuple(entries)
        leads: set[Addr] = set()
        for space in self.find():
            try:
                leads |= led_to(space.memory, wanted)
            except ProcessGone:
                continue
        return frozenset(leads)

    def restore(self) -> tuple[str, ...]:
        """Put the text of each child back, if they are followed; return what went wrong."""
        notes: list[str] = []
        for space in self.find() if self._follow else ():
            try:
                result = restore(space.pid)
                notes += [f"child process {space.pid}: {note}" for note in result.notes]
            except OptpolineError as error:
                notes.append(f"child process {space.pid}: {error}")
        return tuple(notes)

    def close(self) -> None:
        """Close what is open here."""
        for space in self._spaces.values():
            space.memory.close()
        self._spaces.clear()
