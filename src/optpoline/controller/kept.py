# SPDX-License-Identifier: Apache-2.0
"""Find the forked children that go on with promotions after their parent was let go.

A child has the text of the moment in which it was forked. Putting its parent's back changes
nothing in it, so who lets go of the parent has to be told which processes are left. They
are only read here.
"""

from __future__ import annotations

from collections.abc import Sequence

from optpoline.controller.summary import ChildSummary
from optpoline.errors import AttachError, OptpolineError, ProcessGone
from optpoline.model import Addr
from optpoline.patch.layout import ARENA_PATH, JournalEntry
from optpoline.patch.text import leads_into, read_entries
from optpoline.process.mappers import MapperFinder
from optpoline.process.memory import RemoteMemory
from optpoline.process.sharers import has_same_memory

__all__ = ["MAX_NAMED", "describe_kept", "find_children"]

MAX_NAMED = 8
"""Children named in a sentence; a report has them all."""


def find_children(
    pid: int,
    inodes: frozenset[int],
    entries: Sequence[JournalEntry],
    ranges: Sequence[tuple[Addr, Addr]],
    *,
    finder: MapperFinder | None = None,
) -> tuple[ChildSummary, ...]:
    """Return the living children that map a program's arenas, and how much each has kept.

    Processes that share the program's memory are none: they have its text, not their own.

    Args:
        pid: The program; it may have exited.
        inodes: Of its arenas.
        entries: Its journalled sites.
        ranges: Where its arenas are, in its children as well.
        finder: One that has looked before and need not look at every process again.
    """
    if not inodes:
        return ()
    finder = finder or MapperFinder(pid, ARENA_PATH)
    found: list[ChildSummary] = []
    for child in finder.find(inodes):
        try:
            if not has_same_memory(pid, child):
                kept = _count_kept(child, entries, ranges)
                found.append(ChildSummary(pid=child, kept=kept))
        except ProcessGone:
            continue
        except OptpolineError:
            found.append(ChildSummary(pid=child, kept=None))
    found += [ChildSummary(pid=child, kept=None) for child in finder.unreadable]
    return tuple(sorted(found, key=lambda child: child.pid))


def _count_kept(
    pid: int, entries: Sequence[JournalEntry], ranges: Sequence[tuple[Addr, Addr]]
) -> int | None:
    """Count the sites of a process that lead into an arena; None if it may not be read."""
    try:
        with RemoteMemory(pid) as memory:
            found = read_entries(memory, entries)
    except ProcessGone:
        raise
    except AttachError:
        return None
    return sum(
        any(leads_into(entry, found[entry.addr], start, end) for start, end in ranges)
        for entry in entries
    )


def describe_kept(children: Sequence[ChildSummary]) -> tuple[str, ...]:
    """Return sentences on children that keep something, and how to undo it.

    >>> describe_kept([ChildSummary(pid=7, kept=1), ChildSummary(pid=8, kept=0)])
    ('child process 7 keeps 1 promoted site: `optpoline detach 7` undoes that',)
    """
    notes: list[str] = []
    keepers = [child for child in children if child.kept]
    if len(keepers) == 1:
        pid, kept = keepers[0].pid, keepers[0].kept
        sites = "1 promoted site" if kept == 1 else f"{kept} promoted sites"
        notes.append(f"child process {pid} keeps {sites}: `optpoline detach {pid}` undoes that")
    elif keepers:
        notes.append(
            f"{len(keepers)} child processes keep promoted sites ({_name(keepers)}): "
            "`optpoline detach CHILD` undoes that in each"
        )
    unread = [child for child in children if child.kept is None]
    if unread:
        notes.append(
            f"whether child processes keep promoted sites cannot be read of {_name(unread)}: "
            "`optpoline detach CHILD`, run as root, undoes that"
        )
    return tuple(notes)


def _name(children: Sequence[ChildSummary]) -> str:
    """Name children by their ids, the first of many."""
    named = ", ".join(str(child.pid) for child in children[:MAX_NAMED])
    more = len(children) - MAX_NAMED
    return f"{named} and {more} more" if more > 0 else named
