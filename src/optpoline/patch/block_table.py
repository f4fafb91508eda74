# SPDX-License-Identifier: Apache-2.0
"""The block table of an arena: what lies where in its code, for who looks from outside.

An entry is whole before it counts, and counts before anything leads to its block (layout:
``patch/layout.py``). Where a block is in its life is one word, stored last.
"""

from __future__ import annotations

from dataclasses import replace

from optpoline.errors import ArenaFull
from optpoline.model import Addr
from optpoline.patch.arena_memory import ArenaMemory
from optpoline.patch.layout import BLOCK_ENTRY_SIZE, ArenaHeader, BlockEntry, BlockState

__all__ = ["BlockTable"]


class BlockTable:
    """The block table of one arena, empty at first.

    Args:
        memory: The arena's.
        start_off: Offset of the table.
        end_off: Offset of the first byte behind it.
    """

    def __init__(self, memory: ArenaMemory, start_off: int, end_off: int) -> None:
        """Begin with no block."""
        self._memory = memory
        self._start_off = start_off
        self._end_off = end_off
        self._entries: dict[Addr, BlockEntry] = {}
        self._slots: dict[Addr, int] = {}
        self._free_slots: list[int] = []
        self.n_changes = 0
        """Changes of which blocks there are, and of their states: a version of ``blocks``."""

    @property
    def blocks(self) -> tuple[BlockEntry, ...]:
        """Live and retired blocks, in no order."""
        return tuple(self._entries.values())

    def entry_of(self, addr: Addr) -> BlockEntry:
        """Return the entry of a block that there is."""
        return self._entries[addr]

    def find(self, addr: Addr) -> BlockEntry | None:
        """Return the entry of the block that begins at an address, None if none does."""
        return self._entries.get(addr)

    def take_slot(self) -> int:
        """Return a free slot, for ``write``.

        Raises:
            ArenaError: if the table is full.
        """
        if self._free_slots:
            return self._free_slots.pop()
        memory = self._memory
        n_blocks_addr = Addr(memory.addr + ArenaHeader.N_BLOCKS_OFF)
        n_blocks = memory.load_u64(n_blocks_addr)
        if (n_blocks + 1) * BLOCK_ENTRY_SIZE > self._end_off - self._start_off:
            raise ArenaFull(memory.addr, "entries of its block table")
        memory.store_u64(n_blocks_addr, n_blocks + 1)
        return n_blocks

    def write(self, slot: int, entry: BlockEntry) -> None:
        """Write all of an entry but its state, which says that it is free until ``put_state``."""
        self._slots[entry.addr] = slot
        off = self._start_off + slot * BLOCK_ENTRY_SIZE
        self._memory.write(off, entry.pack(BlockState.FREE))

    def put_state(self, entry: BlockEntry) -> None:
        """Store the state of a block whose entry says it already."""
        self._memory.store_u64(self._addr_of(entry, BlockEntry.STATE_OFF), entry.state_word)
        self._entries[entry.addr] = entry
        self.n_changes += 1

    def set_state(self, entry: BlockEntry, state: BlockState) -> None:
        """Say in one store where a block is in its life."""
        self.put_state(replace(entry, state=state))

    def put_size_and_head(self, entry: BlockEntry) -> None:
        """Store the size and the head of a block that is being rewritten."""
        self._memory.store_u64(self._addr_of(entry, BlockEntry.SIZE_OFF), entry.size_word)
        head_word = int.from_bytes(entry.head, "little")
        self._memory.store_u64(self._addr_of(entry, BlockEntry.HEAD_OFF), head_word)

    def free(self, addr: Addr) -> None:
        """Say that there is no such block any more; its slot is used again."""
        self.set_state(self._entries[addr], BlockState.FREE)
        del self._entries[addr]
        self._free_slots.append(self._slots.pop(addr))

    def _addr_of(self, entry: BlockEntry, off: int) -> Addr:
        """Return the address of a word of a block's entry."""
        slot_off = self._start_off + self._slots[entry.addr] * BLOCK_ENTRY_SIZE
        return Addr(self._memory.addr + slot_off + off)
