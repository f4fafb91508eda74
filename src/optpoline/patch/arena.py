# SPDX-License-Identifier: Apache-2.0
"""Memory near the program's modules where blocks, literals and counters live.

The memfd is created in the program (so that namespaces do not matter), opened
by the controller through ``/proc/PID/fd`` and mapped by both: the program gets
code executable but not writable and counters writable but not executable; the
controller alone can write all of it. Once both have mapped it, the file is
sealed against new writable mappings and against any change of size, so that not
even ``mprotect`` in the program opens it again.

The whole range is reserved when the arena is made and never grows beyond it
(design rule 8): a forked child maps all that any block may ever lead to.

Memory of a block is taken back by ``free_block`` alone, which must not be called
before a grace period has passed since it was retired (``patch/grace.py``).
An arena that is used up raises ``ArenaError``; its sites stay as they are.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from optpoline.errors import ArenaFull
from optpoline.model import CELL_SIZE, Addr, CounterRows, Site
from optpoline.patch.arena_memory import ArenaMemory
from optpoline.patch.block_table import BlockTable
from optpoline.patch.counters import CounterTable
from optpoline.patch.extents import Extent, FreeExtents
from optpoline.patch.geometry import CODE_PER_SITE_SIZE, ArenaGeometry
from optpoline.patch.journal import Journal
from optpoline.patch.layout import (
    HEADER_SIZE,
    ArenaHeader,
    BlockEntry,
    BlockKind,
    BlockState,
    JournalEntry,
)
from optpoline.x86.assembler import BlockCode
from optpoline.x86.blocks import BLOCK_ALIGNMENT, HEAD_SIZE, POISON
from optpoline.x86.templates import BlockTemplates

__all__ = ["Arena"]


class Arena:
    """One arena as its controller sees it.

    Args:
        addr: Where the program has it.
        fd: The memfd, ours; closed once mapped.
        geometry: Its parts.
        header: What the header shall say.
    """

    def __init__(self, addr: Addr, fd: int, geometry: ArenaGeometry, header: ArenaHeader) -> None:
        """Map the whole arena and write its header."""
        self.addr = addr
        self.geometry = geometry
        self.inode = os.fstat(fd).st_ino
        self._memory = ArenaMemory(addr, fd, geometry.size)
        self._memory.write(0, header.pack().ljust(HEADER_SIZE, b"\0"))
        self._journal = Journal(self._memory, geometry.block_off)
        self._table = BlockTable(self._memory, geometry.block_off, geometry.code_off)
        self._code = FreeExtents(geometry.code_off, geometry.literal_off)
        self._counters = CounterTable(
            self._memory.mapped, fd, geometry.counter_off, header.rows_at(addr)
        )
        self._used_code_end = geometry.code_off
        self._next_literal = geometry.literal_off
        self._literals: dict[int, Addr] = {}
        self._extents: dict[Addr, Extent] = {}
        self._cells: dict[Addr, tuple[Addr, int]] = {}
        self._thunks: dict[Addr, list[tuple[Addr, bytes]]] = {}
        self.templates = BlockTemplates(self)
        """Encodes the blocks that are put here."""
        self.n_put = 0
        """Blocks ever written."""
        self.n_reused = 0
        """Those of them that were written to memory of earlier ones."""
        self.put_size = 0
        """Bytes of all blocks ever written."""

    @property
    def end(self) -> Addr:
        """Address after the arena in the program."""
        return Addr(self.addr + self.geometry.size)

    @property
    def near_end(self) -> Addr:
        """Address after what must be within reach of its code, and of code it leads to."""
        return Addr(self.addr + self.geometry.near_size)

    @property
    def rows(self) -> CounterRows:
        """What counting blocks count in."""
        return self._counters.rows

    @property
    def code_start(self) -> Addr:
        """First address of what the program may execute."""
        return Addr(self.addr + self.geometry.code_off)

    @property
    def code_end(self) -> Addr:
        """Address after what the program may execute."""
        return Addr(self.addr + self.geometry.counter_off)

    @property
    def used_code_end(self) -> Addr:
        """Address after the last block that there ever was."""
        return Addr(self.addr + self._used_code_end)

    @property
    def code_size(self) -> int:
        """Bytes of code that there are, used or not."""
        return self.geometry.literal_off - self.geometry.code_off

    @property
    def free_code_size(self) -> int:
        """Bytes of code that can be handed out, in however many pieces."""
        return self._code.free_size

    @property
    def blocks(self) -> tuple[BlockEntry, ...]:
        """Live and retired blocks, in no order."""
        return self._table.blocks

    @property
    def n_changes(self) -> int:
        """Changes of which blocks there are, and of their states: a version of ``blocks``."""
        return self._table.n_changes

    @property
    def journalled(self) -> tuple[JournalEntry, ...]:
        """The journal's entries, the latest of each address."""
        return self._journal.entries

    def has_room_for(self, n_sites: int) -> bool:
        """Tell whether that many more sites can be journalled and given blocks."""
        has_code = self.free_code_size >= n_sites * CODE_PER_SITE_SIZE // 2
        return self._journal.has_room_for(n_sites) and has_code

    def close(self) -> None:
        """Unmap our view; the program's stays, and says that nobody works on it."""
        self.store_u64(Addr(self.addr + ArenaHeader.CONTROLLER_START_OFF), 0)
        self._counters.close()
        self._memory.close()

    # --- handing out memory

    def find_room(self, size: int, place: Callable[[int], int]) -> Extent:
        """Return where the next block of ``size`` bytes would go, as offsets.

        Args:
            size: Bytes of code.
            place: Rounds an address up to where a block of that size may start.

        Raises:
            ArenaError: if there is no such room left.
        """
        found = self._code.find(size, lambda off: place(self.addr + off) - self.addr)
        if found is None:
            raise ArenaFull(self.addr, "code")
        end = -(-found.end // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
        end = min(end, self.geometry.literal_off)
        return Extent(start=found.start, at=found.at, end=end)

    def put_block(
        self,
        room: Extent,
        code: BlockCode,
        *,
        site_addr: Addr,
        kind: BlockKind,
        cells: tuple[Addr, int],
    ) -> Addr:
        """Write a block to where ``find_room`` found room and return its address.

        Args:
            room: Where.
            code: Its bytes, and how many of them are instructions.
            site_addr: The site it is for.
            kind: What it is for.
            cells: Its counter cells, first and how many; freed with it.

        Raises:
            ArenaError: if the block table is full.
        """
        addr = Addr(self.addr + room.at)
        slot = self._table.take_slot()
        self._code.take(room)
        poison = bytes((POISON,))
        padded = code.code.ljust(room.end - room.at, poison)
        # Below the highest end so far all that is free was freed.
        self.n_reused += room.at < self._used_code_end
        self.n_put += 1
        self.put_size += room.end - room.at
        self._used_code_end = max(self._used_code_end, room.end)
        self._cells[addr] = cells
        self._extents[addr] = room
        entry = BlockEntry(
            addr=addr,
            size=len(code.code),
            text_size=code.text_size,
            crc=zlib.crc32(code.code),
            site_addr=site_addr,
            head=padded[:HEAD_SIZE],
            kind=kind,
            state=BlockState.LIVE,
        )
        # The entry first: should we die here, no bytes are left that none explains.
        self._table.write(slot, entry)
        self._memory.write(room.start, poison * (room.at - room.start))
        self._memory.write(room.at, padded)
        self._table.put_state(entry)
        if kind is BlockKind.THUNK:
            self._thunks.setdefault(site_addr, []).append((addr, code.code))
        return addr

    def thunks_of(self, site_addr: Addr) -> tuple[tuple[Addr, bytes], ...]:
        """Return the thunks of a plain site that were put here, each with its bytes.

        They stay: a module that is loaded again where it was must not take another each time.
        """
        return tuple(self._thunks.get(site_addr, ()))

    def is_thunk(self, addr: Addr) -> bool:
        """Tell whether the thunk of a plain site begins at an address."""
        entry = self._table.find(addr)
        return entry is not None and entry.kind is BlockKind.THUNK

    def retire_block(self, addr: Addr) -> BlockEntry:
        """Note that nothing leads to a block any more; return its entry."""
        self._table.set_state(self._table.entry_of(addr), BlockState.RETIRED)
        return self._table.entry_of(addr)

    def revive_block(self, addr: Addr) -> None:
        """Note that something leads to a retired block all the same."""
        self._table.set_state(self._table.entry_of(addr), BlockState.LIVE)

    def free_block(self, addr: Addr) -> int:
        """Poison a retired block's memory, to be used again; return how many bytes.

        Only after a grace period: no thread is inside, or can come back to it.
        """
        if self._table.entry_of(addr).state is not BlockState.RETIRED:
            raise ValueError(f"the block at {addr:#x} was not retired")
        room = self._extents.pop(addr)
        size = room.end - room.start
        self._memory.write(room.start, bytes((POISON,)) * size)
        self._table.free(addr)
        self._code.give(room)
        self.free_counters(*self._cells.pop(addr))
        return size

    def has_room_at(self, addr: Addr, size: int) -> bool:
        """Tell whether a block of ``size`` bytes seems to fit where one is (``make_room``)."""
        room = self._extents[addr]
        return room.at + size <= room.end or self._code.is_free(room.end, room.at + size)

    def make_room(self, addr: Addr, size: int) -> bool:
        """Tell whether a block of ``size`` bytes fits where one is, with what is free behind."""
        room = self._extents[addr]
        end = room.at + size
        if end <= room.end:
            return True
        end = -(-end // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
        wider = self._code.extend(room, end) if end <= self.geometry.literal_off else None
        if wider is None:
            return False
        self._extents[addr] = wider
        self._used_code_end = max(self._used_code_end, end)
        return True

    def rewrite_block(self, addr: Addr, code: BlockCode, redirected: int) -> None:
        """Replace all of a live block but where its head leads: to another block, or the thunk.

        Only after a grace period in which nobody could enter it behind its head. At every
        instant somebody who enters goes on to where that leads, and the entry says so.

        Args:
            addr: The block; there is room for the new one (``make_room``).
            code: Its new bytes.
            redirected: Its new head, redirected to where the present one leads.

        Target state: running.
        """
        entry, room = self._table.entry_of(addr), self._extents[addr]
        if entry.state is not BlockState.LIVE or room.at + len(code.code) > room.end:
            raise ValueError(f"the block at {addr:#x} cannot be rewritten")
        # Without instructions: its size is about to change, perhaps to less than they have.
        self._table.set_state(replace(entry, text_size=0), BlockState.REWRITTEN)
        body, size = room.at + HEAD_SIZE, room.end - room.at
        self._memory.write(body, bytes((POISON,)) * (size - HEAD_SIZE))
        padded = code.code.ljust(size, bytes((POISON,)))
        entry = replace(
            entry,
            size=len(code.code),
            text_size=code.text_size,
            crc=zlib.crc32(code.code),
            head=padded[:HEAD_SIZE],
        )
        # What the entry covers is int3 or covered already: no bytes are left that none explains.
        self._table.put_size_and_head(entry)
        self.store_u64(addr, redirected)
        self._memory.write(body, padded[HEAD_SIZE:])
        self._table.set_state(entry, BlockState.LIVE)

    def addr_of(self, value: int) -> Addr:
        """Return the address of a literal, shared between blocks.

        Raises:
            ArenaError: if the literal part is used up.
        """
        known = self._literals.get(value)
        if known is not None:
            return known
        off = self._next_literal
        if off + CELL_SIZE > self.geometry.counter_off:
            raise ArenaFull(self.addr, "literals")
        addr = Addr(self.addr + off)
        self._memory.store_u64(addr, value)
        self._next_literal = off + CELL_SIZE
        self._literals[value] = addr
        return addr

    # --- counters

    def add_counters(self, n_cells: int) -> Addr:
        """Return the address in row 0 of ``n_cells`` adjacent cells, 0 in every row.

        Raises:
            ArenaError: if the counter part is used up.
        """
        return self._counters.add(n_cells)

    def free_counters(self, addr: Addr, n_cells: int) -> None:
        """Take back what ``add_counters`` gave; nobody may count there any more."""
        if n_cells:
            self._counters.give(addr, n_cells)

    @property
    def own_rows_addr(self) -> int:
        """Where row 0 of the counters is in this process."""
        return self._counters.own_addr

    def columns(self, addr: Addr, n_cells: int) -> NDArray[np.uint64]:
        """Return adjacent cells of all rows as they are: u64[1 + n_cpus][n_cells], a copy."""
        return self._counters.columns(addr, n_cells)

    def sum_cells(self, addrs: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the sums over all rows of some cells, claims of slots left out."""
        return self._counters.sum_cells(addrs)

    def sum_ranges(self, addrs: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the sums over all rows and cells of ranges of ``sizes`` cells each."""
        return self._counters.sum_ranges(addrs, sizes)

    # --- access while the program runs

    def load_u64(self, addr: Addr) -> int:
        """Return the u64 at an aligned address of the arena."""
        return self._memory.load_u64(addr)

    def store_u64(self, addr: Addr, value: int) -> None:
        """Store the u64 at an aligned address of the arena in one store."""
        self._memory.store_u64(addr, value)

    def read(self, addr: Addr, size: int) -> bytes:
        """Return bytes of the arena as they are now."""
        return self._memory.read(addr, size)

    def take_u64(self, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the u64 at some indices of the arena's words, as they are now."""
        return self._memory.take_u64(indices)

    def view_u32(self, addr: Addr, n_words: int) -> NDArray[np.uint32]:
        """Return words of the arena themselves, not a copy; let go of them before ``close``."""
        return self._memory.view_u32(addr, n_words)

    def head_of(self, block_addr: Addr) -> bytes:
        """Return the first ``HEAD_SIZE`` bytes of a block."""
        return self.read(block_addr, HEAD_SIZE)

    # --- journal

    def journal(self, site: Site) -> JournalEntry:
        """Record a site's baseline before its text is first changed.

        Raises:
            ArenaError: if the journal is full.
        """
        return self._journal.add(site)
