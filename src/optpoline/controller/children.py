# SPDX-License-Identifier: Apache-2.0
"""The target's forked children: they map its arenas and have its text of then.

A child needs nothing of us to run on: its sites lead to blocks that it shares, so what
is learned for the target serves it as well. Two things depend on it: no block that its
text leads to is ever freed, and with ``Config.follow_fork`` it is restored at the end
as the target is; else it keeps what it has, and the session says so at its end
(``optpoline detach`` undoes that).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from optpoline.controller.address_space import AddressSpace, child_space
from optpoline.controller.kept import describe_kept, find_children
from optpoline.controller.summary import ChildSummary
from optpoline.controller.takeover import restore
from optpoline.controller.target import Target
from optpoline.errors import AttachError, OptpolineError, ProcessGone, Unsettled
from optpoline.model import Addr
from optpoline.patch.layout import ARENA_PATH, JournalEntry
from optpoline.patch.text import read_entries
from optpoline.process.kinship import now_ticks
from optpoline.process.mappers import MapperFinder
from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import read_start_time
from optpoline.process.sharers import has_same_memory

__all__ = ["Children", "led_to"]

_MAX_PASSES = 16
"""Times that text is read of those who are new, until there is none."""

ProcessKey = tuple[int, int]
"""(pid, start time): the number alone may be another's later."""


def led_to(memory: RemoteMemory, entries: Sequence[JournalEntry]) -> set[Addr]:
    """Return every address that a site leads to in a process, whatever its opcode is now.

    Raises:
        ProcessGone: if the process is.
    """
    found = read_entries(memory, entries)
    leads: set[Addr] = set()
    for entry in entries:
        if entry.opcode_size and found[entry.addr] == entry.code:
            continue  # no direct branch: what lies there is no displacement
        disp = found[entry.addr][entry.disp_off : entry.disp_off + 4]
        if len(disp) == 4:
            leads.add(Addr(entry.end + int.from_bytes(disp, "little", signed=True)))
    return leads


class Children:
    """The children of one target that map its arenas; make it before the first of those.

    Args:
        target: The target.
        follow: Whether they may be stopped, and are restored at the end.
    """

    def __init__(self, target: Target, *, follow: bool) -> None:
        """Look for none yet."""
        self._target = target
        self._follow = follow
        self._finder = MapperFinder(target.pid, ARENA_PATH, since=now_ticks())
        self._spaces: dict[ProcessKey, AddressSpace] = {}
        self._refused: set[int] = set()
        self.n_seen = 0
        """Children ever found."""

    def find(self) -> tuple[AddressSpace, ...]:
        """Return the address spaces of those that live.

        Raises:
            Unsettled: if processes are started faster than they can be looked at.
        """
        spaces = self._find_living()
        if self._target.arenas and not self._finder.is_complete:
            raise Unsettled
        return tuple(spaces.values())

    def _find_living(self) -> dict[ProcessKey, AddressSpace]:
        """Return the address spaces of those that are found, perhaps not of all."""
        inodes = frozenset(arena.inode for arena in self._target.arenas)
        if inodes:
            self._finder.find(inodes)
        for key, space in tuple(self._spaces.items()):
            # One that we may read no more, and that has run another program, still looks like one.
            if self._finder.start_times.get(key[0]) == key[1] and not space.memory.is_current():
                self._finder.acquit(key[0])
        present = {*self._finder.start_times.items()}
        for key in self._spaces.keys() - present:
            self._spaces.pop(key).memory.close()
        self._refused = set()
        for key in sorted(present - self._spaces.keys()):
            self._add(key)
        return self._spaces

    def _add(self, key: ProcessKey) -> None:
        """Open a new child's memory, unless it is the target's own."""
        pid, start_time = key
        try:
            if has_same_memory(self._target.pid, pid):
                return  # no child: it has the target's text, and is looked at with its threads
            space = child_space(pid, may_stop=self._follow, timeout_ns=self._target.stop_timeout_ns)
            if read_start_time(pid) != start_time:
                space.memory.close()  # another one's by now, who will be found in its turn
                return
        except ProcessGone:
            return
        except AttachError:
            self._refused.add(pid)
            return
        self._spaces[key] = space
        self.n_seen += 1

    @property
    def unreadable(self) -> tuple[int, ...]:
        """Children whose memory we may not read, as of the last look for them."""
        return (*self._finder.unreadable, *sorted(self._refused))

    def led_to(self, entries: Iterable[JournalEntry]) -> frozenset[Addr]:
        """Return every address that a site leads to in the text of a child.

        A child that exits before it is read may have handed its text on to another, which
        is read then: all have been when nothing was forked from the look for them on.

        Raises:
            Unsettled: if processes are started faster than they can be looked at.
        """
        wanted = tuple(entries)
        leads: set[Addr] = set()
        done: set[ProcessKey] = set()
        for _ in range(_MAX_PASSES if self._target.arenas else 0):
            for key, space in self._find_living().items():
                if key in done:
                    continue
                try:
                    leads |= led_to(space.memory, wanted)
                except ProcessGone:
                    continue
                done.add(key)
            if self._finder.is_current:
                return frozenset(leads)
        if self._target.arenas:
            raise Unsettled
        return frozenset()

    def let_go(self, *, may_restore: bool) -> tuple[tuple[ChildSummary, ...], tuple[str, ...]]:
        """Put the text of each child back, if they are followed; see what the others keep.

        Args:
            may_restore: Whether this session may restore anything: it leaves nothing on
                purpose, and its target is still there.

        Returns:
            Each child that was restored or keeps something, and sentences about them.
        """
        notes: list[str] = []
        restored: dict[int, int] = {}
        spaces = tuple(self._find_living().values()) if self._follow and may_restore else ()
        for space in spaces:
            try:
                result = restore(space.pid)
                restored[space.pid] = result.restored
                notes += [f"child process {space.pid}: {note}" for note in result.notes]
            except ProcessGone:
                continue
            except OptpolineError as error:
                notes.append(f"child process {space.pid}: {error}")
        arenas = self._target.arenas
        found = find_children(
            self._target.pid,
            frozenset(arena.inode for arena in arenas),
            [entry for arena in arenas for entry in arena.journalled],
            [(arena.addr, arena.end) for arena in arenas],
            finder=self._finder,
        )
        kept = {child.pid: child.kept for child in found}
        children = tuple(
            ChildSummary(pid=pid, kept=kept.get(pid, 0), restored=restored.get(pid, 0))
            for pid in sorted(kept | restored)
            if kept.get(pid, 0) != 0 or restored.get(pid, 0)
        )
        n_restored = sum(bool(child.restored) for child in children)
        if n_restored:
            what = "child process was" if n_restored == 1 else "child processes were"
            notes.append(f"{n_restored} {what} restored as well")
        return children, (*notes, *describe_kept(children))

    def close(self) -> None:
        """Close what is open here."""
        for space in self._spaces.values():
            space.memory.close()
        self._spaces.clear()
