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

Memory is handed out once and never taken back: nothing can be reused early.
An arena that is used up raises ``ArenaError``; its sites stay as they are.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

from optpoline.errors import ArenaError
from optpoline.model import Addr, Site
from optpoline.patch.layout import ENTRY_SIZE, HEADER_SIZE, ArenaHeader, JournalEntry
from optpoline.x86.blocks import BLOCK_ALIGNMENT, HEAD_SIZE, POISON

__all__ = ["Arena", "ArenaGeometry"]

_PAGE_SIZE = 4096
_CELL_SIZE = 8

CODE_PER_SITE_SIZE = 2048
"""Bytes of code reserved a site: a first learning block is some 250 bytes, a
promoted one 40 to 1,500, and a site that changes needs both again. Pages that
are never used cost address space, not memory."""

MIN_CODE_SIZE = 4 << 20
LITERAL_RATIO = 8
"""Code bytes per literal byte: one 8-byte literal for a 13-byte guard, shared."""
COUNTER_RATIO = 2
"""Code bytes per counter byte: an open slot is 55 bytes of code and 16 of counters."""
JOURNAL_SPARE_ENTRIES = 4096
"""Entries kept for sites of modules that are loaded later."""


def _round_up(size: int) -> int:
    """Round up to whole pages."""
    return -(-size // _PAGE_SIZE) * _PAGE_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaGeometry:
    """Sizes and offsets of an arena's parts, in bytes, all whole pages."""

    code_off: int
    literal_off: int
    counter_off: int
    size: int

    @classmethod
    def for_sites(cls, n_sites: int) -> ArenaGeometry:
        """Return what ``n_sites`` sites may need over a long session."""
        journal = _round_up((n_sites + JOURNAL_SPARE_ENTRIES) * ENTRY_SIZE)
        code = _round_up(max(MIN_CODE_SIZE, n_sites * CODE_PER_SITE_SIZE))
        code_off = HEADER_SIZE + journal
        literal_off = code_off + code
        counter_off = literal_off + _round_up(code // LITERAL_RATIO)
        return cls(
            code_off=code_off,
            literal_off=literal_off,
            counter_off=counter_off,
            size=counter_off + _round_up(code // COUNTER_RATIO),
        )


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
        self._memory = mmap.mmap(fd, geometry.size)
        self._view = memoryview(self._memory)
        # One aligned native u64 store per item: never torn (see store_u64).
        self._words = self._view.cast("Q")
        self._memory[:HEADER_SIZE] = header.pack().ljust(HEADER_SIZE, b"\0")
        self._journal: dict[int, JournalEntry] = {}
        self._next_code = geometry.code_off
        self._next_literal = geometry.literal_off
        self._next_counter = geometry.counter_off
        self._literals: dict[int, Addr] = {}

    @property
    def end(self) -> Addr:
        """Address after the arena in the program."""
        return Addr(self.addr + self.geometry.size)

    @property
    def code_start(self) -> Addr:
        """First address of what the program may execute."""
        return Addr(self.addr + self.geometry.code_off)

    @property
    def code_end(self) -> Addr:
        """Address after what the program may execute."""
        return Addr(self.addr + self.geometry.counter_off)

    @property
    def used_code_size(self) -> int:
        """Bytes of code handed out."""
        return self._next_code - self.geometry.code_off

    @property
    def free_code_size(self) -> int:
        """Bytes of code that can still be handed out."""
        return self.geometry.literal_off - self._next_code

    def has_room_for(self, n_sites: int) -> bool:
        """Tell whether that many more sites can be journalled and given blocks."""
        free_entries = (self.geometry.code_off - HEADER_SIZE) // ENTRY_SIZE - len(self._journal)
        return free_entries >= n_sites and self.free_code_size >= n_sites * CODE_PER_SITE_SIZE // 2

    def close(self) -> None:
        """Unmap our view; the program's stays, and says that nobody works on it."""
        self.store_u64(Addr(self.addr + ArenaHeader.CONTROLLER_START_OFF), 0)
        self._words.release()
        self._view.release()
        self._memory.close()

    # --- handing out memory

    def next_block_addr(self) -> Addr:
        """Return where the next block would go."""
        return Addr(self.addr + self._next_code)

    def add_block(self, code: bytes) -> Addr:
        """Write a block at ``next_block_addr`` and return its address.

        Raises:
            ArenaError: if the code part is used up.
        """
        off = self._next_code
        if off + len(code) > self.geometry.literal_off:
            raise ArenaError(
                f"the arena at {self.addr:#x} is used up",
                hint="detach and attach again to start with an empty one",
            )
        end = -(-(off + len(code)) // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
        self._memory[off:end] = code.ljust(end - off, bytes((POISON,)))
        self._next_code = end
        return Addr(self.addr + off)

    def skip_to(self, addr: Addr) -> None:
        """Let the next block start at ``addr``, or as near as the code part goes."""
        start = self._next_code
        end = max(start, min(addr - self.addr, self.geometry.literal_off))
        self._memory[start:end] = bytes((POISON,)) * (end - start)
        self._next_code = end

    def addr_of(self, value: int) -> Addr:
        """Return the address of a literal, shared between blocks.

        Raises:
            ArenaError: if the literal part is used up.
        """
        known = self._literals.get(value)
        if known is not None:
            return known
        off = self._next_literal
        if off + _CELL_SIZE > self.geometry.counter_off:
            raise ArenaError(f"the literals of the arena at {self.addr:#x} are used up")
        self._words[off // _CELL_SIZE] = value
        self._next_literal = off + _CELL_SIZE
        self._literals[value] = addr = Addr(self.addr + off)
        return addr

    def add_counters(self, n_cells: int) -> Addr:
        """Return the address of ``n_cells`` adjacent u64 counter cells, all 0.

        Raises:
            ArenaError: if the counter part is used up.
        """
        off = self._next_counter
        if off + n_cells * _CELL_SIZE > self.geometry.size:
            raise ArenaError(f"the counters of the arena at {self.addr:#x} are used up")
        self._next_counter = off + n_cells * _CELL_SIZE
        return Addr(self.addr + off)

    # --- access while the program runs

    def load_u64(self, addr: Addr) -> int:
        """Return the u64 at an aligned address of the arena."""
        return self._words[(addr - self.addr) // _CELL_SIZE]

    def store_u64(self, addr: Addr, value: int) -> None:
        """Store the u64 at an aligned address of the arena in one store.

        A native-order ``memoryview.cast("Q")`` item store is one 8-byte move:
        never torn in the feasibility study (``struct`` with ``">Q"`` was).
        """
        self._words[(addr - self.addr) // _CELL_SIZE] = value

    def read(self, addr: Addr, size: int) -> bytes:
        """Return bytes of the arena as they are now."""
        off = addr - self.addr
        return self._memory[off : off + size]

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
        entry = JournalEntry(addr=site.addr, code=site.code, disp_off=site.disp_addr - site.addr)
        n_entries = self.load_u64(Addr(self.addr + ArenaHeader.N_ENTRIES_OFF))
        off = HEADER_SIZE + n_entries * ENTRY_SIZE
        if off + ENTRY_SIZE > self.geometry.code_off:
            raise ArenaError(f"the journal of the arena at {self.addr:#x} is full")
        self._memory[off : off + ENTRY_SIZE] = entry.pack()
        # Pairs with the reader in another controller: complete before counted.
        self.store_u64(Addr(self.addr + ArenaHeader.N_ENTRIES_OFF), n_entries + 1)
        self._journal[site.addr] = entry
        return entry
