# SPDX-License-Identifier: Apache-2.0
"""The journal of an arena: what each site held before its text was first changed.

It is all that is needed to undo, by us or by whoever finds the arena (layout:
``patch/layout.py``). Entries are added and never taken away.
"""

from __future__ import annotations

from optpoline.errors import ArenaFull
from optpoline.model import Addr, Site
from optpoline.patch.arena_memory import ArenaMemory
from optpoline.patch.layout import ENTRY_SIZE, HEADER_SIZE, ArenaHeader, JournalEntry

__all__ = ["Journal"]


class Journal:
    """The journal of one arena, empty at first.

    Args:
        memory: The arena's.
        end_off: Offset of the first byte behind the journal.
    """

    def __init__(self, memory: ArenaMemory, end_off: int) -> None:
        """Begin with no entry."""
        self._memory = memory
        self._end_off = end_off
        self._entries: dict[int, JournalEntry] = {}

    @property
    def entries(self) -> tuple[JournalEntry, ...]:
        """The latest entry of each address."""
        return tuple(self._entries.values())

    def has_room_for(self, n_sites: int) -> bool:
        """Tell whether that many more sites can be recorded."""
        return (self._end_off - HEADER_SIZE) // ENTRY_SIZE - len(self._entries) >= n_sites

    def add(self, site: Site) -> JournalEntry:
        """Record a site's baseline, unless that was done.

        Raises:
            ArenaError: if the journal is full.
        """
        known = self._entries.get(site.addr)
        if known is not None and known.code == site.code:
            return known
        entry = JournalEntry.of(site)
        memory = self._memory
        n_entries_addr = Addr(memory.addr + ArenaHeader.N_ENTRIES_OFF)
        n_entries = memory.load_u64(n_entries_addr)
        off = HEADER_SIZE + n_entries * ENTRY_SIZE
        if off + ENTRY_SIZE > self._end_off:
            raise ArenaFull(memory.addr, "journal entries")
        memory.write(off, entry.pack())
        # Pairs with the reader in another controller: complete before counted.
        memory.store_u64(n_entries_addr, n_entries + 1)
        self._entries[site.addr] = entry
        return entry
