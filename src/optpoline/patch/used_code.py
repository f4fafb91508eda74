# SPDX-License-Identifier: Apache-2.0
"""Read from a program's memory which blocks its arenas hold, whoever made them."""

from __future__ import annotations

from collections.abc import Sequence

from optpoline.errors import TargetFault
from optpoline.model import Addr
from optpoline.patch.layout import BLOCK_ENTRY_SIZE, ArenaHeader, BlockEntry
from optpoline.process.memory import Memory
from optpoline.x86.blocks import BLOCK_ALIGNMENT

__all__ = ["find_used_code", "read_blocks"]


def read_blocks(memory: Memory, arena_addr: Addr, header: ArenaHeader) -> Sequence[BlockEntry]:
    """Return the live and retired blocks of an arena, as far as they lie in its code.

    Args:
        memory: The program's.
        arena_addr: Where it has the arena.
        header: The arena's.

    Raises:
        TargetFault: if the table cannot be read.
    """
    size = header.n_blocks * BLOCK_ENTRY_SIZE
    table = memory.read(Addr(arena_addr + header.block_off), size) if size else b""
    entries = (
        BlockEntry.unpack(table[at : at + BLOCK_ENTRY_SIZE])
        for at in range(0, size, BLOCK_ENTRY_SIZE)
    )
    first, last = arena_addr + header.code_off, arena_addr + header.literal_off
    return [block for block in entries if block and first <= block.addr <= block.end <= last]


def find_used_code(memory: Memory, arena_addr: Addr, header: ArenaHeader) -> tuple[Addr, Addr]:
    """Return the part of an arena's code in which a PC may be: (first, after the last).

    What is behind its last block was never used, or was freed after a grace period. The less
    there is to look for the better: in a program below 4 GiB many a number that is no
    address looks like one (the hashes and cache sizes of glibc's own data did, in one of
    twenty programs that are not PIE, while this was the whole of the code).
    """
    first, last = Addr(arena_addr + header.code_off), Addr(arena_addr + header.literal_off)
    try:
        end = max((block.end for block in read_blocks(memory, arena_addr, header)), default=first)
    except TargetFault:
        return first, last
    return first, min(last, Addr(-(-end // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT))
