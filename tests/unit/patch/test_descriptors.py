# SPDX-License-Identifier: Apache-2.0
"""What an arena's code holds, read from outside: its used part, and descriptors among it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpoline.errors import TargetFault
from optpoline.model import Addr, RseqAbi
from optpoline.patch.descriptors import DESCRIPTOR_SIZE, cut_out_descriptors, find_descriptors
from optpoline.patch.layout import (
    BLOCK_ENTRY_SIZE,
    HEADER_SIZE,
    ArenaHeader,
    BlockEntry,
    BlockKind,
    BlockState,
)
from optpoline.patch.used_code import find_used_code

ARENA = Addr(0x1000_0000)
BLOCK_OFF, CODE_OFF, LITERAL_OFF, COUNTER_OFF = 8192, 12288, 16384, 20480
CODE = ARENA + CODE_OFF
TEXT_SIZE = 0x4A


def block(off: int, state: BlockState = BlockState.LIVE, size: int = 0xA0) -> BlockEntry:
    """Return the entry of a block with instructions, padding and two descriptors."""
    return BlockEntry(
        addr=Addr(CODE + off),
        size=size,
        text_size=TEXT_SIZE,
        crc=0,
        site_addr=Addr(0x4000),
        head=bytes(8),
        kind=BlockKind.COUNTING,
        state=state,
    )


def descriptor(entry: BlockEntry, *, flags: int = 0, abort: int = 0x40) -> bytes:
    """Return a struct rseq_cs for a sequence in a block."""
    return struct.pack("<IIQQQ", 0, flags, entry.addr + 8, 16, entry.addr + abort)


class ArenaMemory:
    """An arena with blocks whose instructions are all NOPs."""

    def __init__(self, blocks: dict[int, tuple[BlockEntry, bytes]], *, has_rseq: bool = True):
        """Write it."""
        header = ArenaHeader(
            size=COUNTER_OFF + 2 * 4096,
            block_off=BLOCK_OFF,
            code_off=CODE_OFF,
            literal_off=LITERAL_OFF,
            counter_off=COUNTER_OFF,
            controller_pid=1,
            controller_start=1,
            target_pid=2,
            n_entries=0,
            row_shift=12,
            n_cpus=1,
            rseq=RseqAbi(offset=-160, signature=0x53053053) if has_rseq else None,
            n_blocks=max(blocks, default=-1) + 1,
        )
        self.data = bytearray(b"\x90" * header.size)
        self.data[:HEADER_SIZE] = header.pack().ljust(HEADER_SIZE, b"\0")
        for slot in range(header.n_blocks):
            at = BLOCK_OFF + slot * BLOCK_ENTRY_SIZE
            self.data[at : at + BLOCK_ENTRY_SIZE] = bytes(BLOCK_ENTRY_SIZE)
            if slot in blocks:
                entry, tail = blocks[slot]
                self.data[at : at + BLOCK_ENTRY_SIZE] = entry.pack()
                off = entry.addr - ARENA + 0x60
                self.data[off : off + len(tail)] = tail

    def read(self, addr: int, size: int) -> bytes:
        """Read it; nothing else is mapped."""
        if not ARENA <= addr <= addr + size <= ARENA + len(self.data):
            raise TargetFault(addr, size, "read")
        return bytes(self.data[addr - ARENA : addr - ARENA + size])


def test_descriptors_of_all_blocks_that_there_are() -> None:
    one, other = block(0x000), block(0x200, BlockState.RETIRED)
    free = block(0x400, BlockState.FREE)
    both = descriptor(one) + descriptor(one, abort=0x48)
    memory = ArenaMemory(
        {0: (one, both), 2: (other, descriptor(other)), 3: (free, descriptor(free))}
    )
    assert find_descriptors(memory, ARENA) == (CODE + 0x60, CODE + 0x80, CODE + 0x260)


@pytest.mark.parametrize(
    "wrong",
    [
        descriptor(block(0), flags=1),
        descriptor(block(0), abort=TEXT_SIZE),  # outside
        descriptor(block(0), abort=0x10),  # in its sequence
        descriptor(block(0x200)),  # another block's
        b"\x90" * DESCRIPTOR_SIZE,  # instructions
    ],
)
def test_what_is_no_descriptor_stays_code(wrong: bytes) -> None:
    assert find_descriptors(ArenaMemory({0: (block(0), wrong)}), ARENA) == ()


def test_arenas_without_descriptors() -> None:
    blocks = {0: (block(0), descriptor(block(0)))}
    assert len(find_descriptors(ArenaMemory(blocks), ARENA)) == 1
    assert find_descriptors(ArenaMemory(blocks, has_rseq=False), ARENA) == ()
    assert find_descriptors(ArenaMemory({}), ARENA) == ()
    assert find_descriptors(ArenaMemory(blocks), Addr(ARENA - 4096)) == ()
    # An entry that is damaged leads nowhere outside the code.
    beyond = block(LITERAL_OFF - CODE_OFF - 0x20)
    assert find_descriptors(ArenaMemory({0: (beyond, b"")}), ARENA) == ()


def test_used_code_ends_behind_the_last_block_that_a_pc_may_be_in() -> None:
    used = {0: (block(0x000), b""), 2: (block(0x200, BlockState.RETIRED, size=0xA1), b"")}
    freed = {**used, 1: (block(0x400, BlockState.FREE), b"")}
    for blocks, size in (({}, 0), (used, 0x2B0), (freed, 0x2B0)):
        memory = ArenaMemory(blocks)
        header = ArenaHeader.unpack(memory.read(ARENA, HEADER_SIZE))
        assert header is not None
        assert find_used_code(memory, ARENA, header) == (CODE, CODE + size)


def test_all_code_counts_as_used_when_the_table_cannot_be_read() -> None:
    memory = ArenaMemory({0: (block(0x000), b"")})
    header = ArenaHeader.unpack(memory.read(ARENA, HEADER_SIZE))
    assert header is not None
    del memory.data[BLOCK_OFF:]
    assert find_used_code(memory, ARENA, header) == (CODE, ARENA + LITERAL_OFF)


@given(st.sets(st.integers(0, 20)), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20))))
def test_cut_out_leaves_all_else(where: set[int], pairs: list[tuple[int, int]]) -> None:
    size = DESCRIPTOR_SIZE
    ranges = [(Addr(a * size), Addr(b * size)) for a, b in pairs if a < b]
    parts = cut_out_descriptors(ranges, [Addr(one * size) for one in sorted(where)])
    assert all(start < end for start, end in parts)
    left = sorted(at // size for start, end in parts for at in range(start, end, size))
    expected = [at // size for start, end in ranges for at in range(start, end, size)]
    assert left == sorted(at for at in expected if at not in where)
