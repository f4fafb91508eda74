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

import mmap
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from optpoline.errors import ArenaError
from optpoline.model import CELL_SIZE, Addr, CounterRows, Site
from optpoline.patch.counters import CounterTable
from optpoline.patch.extents import Extent, FreeExtents
from optpoline.patch.geometry import CODE_PER_SITE_SIZE, ArenaGeometry
from optpoline.patch.layout import (
    BLOCK_ENTRY_SIZE,
    ENTRY_SIZE,
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
        self._memory = mmap.mmap(fd, geometry.size)
        self._view = memoryview(self._memory)
        # One aligned native u64 store per item: never torn (see store_u64).
        self._words = self._view.cast("Q")
        self._array = np.frombuffer(self._memory, np.uint64)
        self._memory[:HEADER_SIZE] = header.pack().ljust(HEADER_SIZE, b"\0")
        self._journal: dict[int, JournalEntry] = {}
        self._code = FreeExtents(geometry.code_off, geometry.literal_off)
        self._counters = CounterTable(self._memory, fd, geometry.counter_off, header.rows_at(addr))
        self._used_code_end = geometry.code_off
        self._next_literal = geometry.literal_off
        self._literals: dict[int, Addr] = {}
        self._extents: dict[Addr, Extent] = {}
        self._slots: dict[Addr, int] = {}
        self._free_slots: list[int] = []
        self._entries: dict[Addr, BlockEntry] = {}
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
        self.n_changes = 0
        """Changes of which blocks there are, and of their states: a version of ``blocks``."""

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
    def free_code_size(self) -> int:
        """Bytes of code that can be handed out, in however many pieces."""
        return self._code.free_size

    @property
    def blocks(self) -> tuple[BlockEntry, ...]:
        """Live and retired blocks, in no order."""
        return tuple(self._entries.values())

    @property
    def journalled(self) -> tuple[JournalEntry, ...]:
        """The journal's entries, the latest of each address."""
        return tuple(self._journal.values())

    def has_room_for(self, n_sites: int) -> bool:
        """Tell whether that many more sites can be journalled and given blocks."""
        free_entries = (self.geometry.block_off - HEADER_SIZE) // ENTRY_SIZE - len(self._journal)
        return free_entries >= n_sites and self.free_code_size >= n_sites * CODE_PER_SITE_SIZE // 2

    def close(self) -> None:
        """Unmap our view; the program's stays, and says that nobody works on it."""
        self.store_u64(Addr(self.addr + ArenaHeader.CONTROLLER_START_OFF), 0)
        self._counters.close()
        # Who catches an exception (Ctrl-C, above all) still holds the frames that it came
        # through, and what they were looking at: then it is unmapped when they are gone.
        with suppress(BufferError):
            self._array = np.zeros(0, np.uint64)
            self._words.release()
            self._view.release()
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
            raise ArenaError(
                f"the arena at {self.addr:#x} is used up",
                hint="detach and attach again to start with an empty one",
            )
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
        slot = self._free_slots.pop() if self._free_slots else self._new_slot()
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
        self._slots[addr] = slot
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
        off = self.geometry.block_off + slot * BLOCK_ENTRY_SIZE
        # The entry first: should we die here, no bytes are left that none explains.
        self._memory[off : off + BLOCK_ENTRY_SIZE] = entry.pack(BlockState.FREE)
        self._memory[room.start : room.at] = poison * (room.at - room.start)
        self._memory[room.at : room.end] = padded
        self._put_state(entry)
        if kind is BlockKind.THUNK:
            self._thunks.setdefault(site_addr, []).append((addr, code.code))
        return addr

    def _new_slot(self) -> int:
        """Use one more entry of the block table."""
        n_blocks = self.load_u64(Addr(self.addr + ArenaHeader.N_BLOCKS_OFF))
        if (n_blocks + 1) * BLOCK_ENTRY_SIZE > self.geometry.code_off - self.geometry.block_off:
            raise ArenaError(f"the block table of the arena at {self.addr:#x} is full")
        self.store_u64(Addr(self.addr + ArenaHeader.N_BLOCKS_OFF), n_blocks + 1)
        return n_blocks

    def _set_state(self, entry: BlockEntry, state: BlockState) -> None:
        """Say in one store where a block is in its life."""
        self._put_state(replace(entry, state=state))

    def _put_state(self, entry: BlockEntry) -> None:
        """Store the state of a block whose entry says it already."""
        off = self.geometry.block_off + self._slots[entry.addr] * BLOCK_ENTRY_SIZE
        self.store_u64(Addr(self.addr + off + BlockEntry.STATE_OFF), entry.state_word)
        self._entries[entry.addr] = entry
        self.n_changes += 1

    def thunks_of(self, site_addr: Addr) -> tuple[tuple[Addr, bytes], ...]:
        """Return the thunks of a plain site that were put here, each with its bytes.

        They stay: a module that is loaded again where it was must not take another each time.
        """
        return tuple(self._thunks.get(site_addr, ()))

    def is_thunk(self, addr: Addr) -> bool:
        """Tell whether the thunk of a plain site begins at an address."""
        entry = self._entries.get(addr)
        return entry is not None and entry.kind is BlockKind.THUNK

    def retire_block(self, addr: Addr) -> BlockEntry:
        """Note that nothing leads to a block any more; return its entry."""
        self._set_state(self._entries[addr], BlockState.RETIRED)
        return self._entries[addr]

    def revive_block(self, addr: Addr) -> None:
        """Note that something leads to a retired block all the same."""
        self._set_state(self._entries[addr], BlockState.LIVE)

    def free_block(self, addr: Addr) -> int:
        """Poison a retired block's memory, to be used again; return how many bytes.

        Only after a grace period: no thread is inside, or can come back to it.
        """
        if self._entries[addr].state is not BlockState.RETIRED:
            raise ValueError(f"the block at {addr:#x} was not retired")
        room = self._extents.pop(addr)
        size = room.end - room.start
        self._memory[room.start : room.end] = bytes((POISON,)) * size
        self._set_state(self._entries[addr], BlockState.FREE)
        del self._entries[addr]
        self._free_slots.append(self._slots.pop(addr))
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
        entry, room = self._entries[addr], self._extents[addr]
        if entry.state is not BlockState.LIVE or room.at + len(code.code) > room.end:
            raise ValueError(f"the block at {addr:#x} cannot be rewritten")
        # Without instructions: its size is about to change, perhaps to less than they have.
        self._set_state(replace(entry, text_size=0), BlockState.REWRITTEN)
        body, size = room.at + HEAD_SIZE, room.end - room.at
        self._memory[body : room.end] = bytes((POISON,)) * (size - HEAD_SIZE)
        padded = code.code.ljust(size, bytes((POISON,)))
        entry = replace(
            entry,
            size=len(code.code),
            text_size=code.text_size,
            crc=zlib.crc32(code.code),
            head=padded[:HEAD_SIZE],
        )
        # What the entry covers is int3 or covered already: no bytes are left that none explains.
        table = self.addr + self.geometry.block_off + self._slots[addr] * BLOCK_ENTRY_SIZE
        self.store_u64(Addr(table + BlockEntry.SIZE_OFF), entry.size_word)
        head_word = int.from_bytes(entry.head, "little")
        self.store_u64(Addr(table + BlockEntry.HEAD_OFF), head_word)
        self.store_u64(addr, redirected)
        self._memory[body : room.end] = padded[HEAD_SIZE:]
        self._set_state(entry, BlockState.LIVE)

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
            raise ArenaError(f"the literals of the arena at {self.addr:#x} are used up")
        self._words[off // CELL_SIZE] = value
        self._next_literal = off + CELL_SIZE
        self._literals[value] = addr = Addr(self.addr + off)
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
        return self._words[(addr - self.addr) // CELL_SIZE]

    def store_u64(self, addr: Addr, value: int) -> None:
        """Store the u64 at an aligned address of the arena in one store.

        A native-order ``memoryview.cast("Q")`` item store is one 8-byte move:
        never torn in the feasibility study (``struct`` with ``">Q"`` was).
        """
        self._words[(addr - self.addr) // CELL_SIZE] = value

    def read(self, addr: Addr, size: int) -> bytes:
        """Return bytes of the arena as they are now."""
        off = addr - self.addr
        return self._memory[off : off + size]

    def take_u64(self, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the u64 at some indices of the arena's words, as they are now."""
        taken: NDArray[np.uint64] = self._array[indices]
        return taken

    def view_u32(self, addr: Addr, n_words: int) -> NDArray[np.uint32]:
        """Return words of the arena themselves, not a copy; let go of them before ``close``."""
        return np.frombuffer(self._memory, np.uint32, n_words, addr - self.addr)

    def head_of(self, block_addr: Addr) -> bytes:
        """Return the first ``HEAD_SIZE`` bytes of a block."""
        return self.read(block_addr, HEAD_SIZE)

    # --- journal

    def journal(self, site: Site) -> JournalEntry:
        """Record a site's baseline before its text is first changed.

        Raises:
            ArenaError: if the journal is full.
        """
        known = self._journal.get(site.addr)
        if known is not None and known.code == site.code:
            return known
        entry = JournalEntry.of(site)
        n_entries = self.load_u64(Addr(self.addr + ArenaHeader.N_ENTRIES_OFF))
        off = HEADER_SIZE + n_entries * ENTRY_SIZE
        if off + ENTRY_SIZE > self.geometry.block_off:
            raise ArenaError(f"the journal of the arena at {self.addr:#x} is full")
        self._memory[off : off + ENTRY_SIZE] = entry.pack()
        # Pairs with the reader in another controller: complete before counted.
        self.store_u64(Addr(self.addr + ArenaHeader.N_ENTRIES_OFF), n_entries + 1)
        self._journal[site.addr] = entry
        return entry
