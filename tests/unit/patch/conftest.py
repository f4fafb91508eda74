# SPDX-License-Identifier: Apache-2.0
"""An arena as a controller has it, with no program on the other side."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from optpoline.model import Addr
from optpoline.patch.arena import Arena
from optpoline.patch.geometry import ArenaGeometry
from optpoline.patch.layout import (
    BLOCK_ENTRY_SIZE,
    HEADER_SIZE,
    ArenaHeader,
    BlockEntry,
    BlockKind,
)
from optpoline.x86.assembler import BlockCode
from optpoline.x86.blocks import place_block

ARENA_ADDR = Addr(0x2000_0000)
SITE_ADDR = Addr(0x40_1001)
PAGE_SIZE = 4096
GEOMETRY = ArenaGeometry(
    block_off=HEADER_SIZE + PAGE_SIZE,
    code_off=HEADER_SIZE + 4 * PAGE_SIZE,
    literal_off=HEADER_SIZE + 6 * PAGE_SIZE,
    counter_off=HEADER_SIZE + 7 * PAGE_SIZE,
    row_shift=12,
    n_cpus=2,
)
"""With one page of counters in each row."""
CODE_SIZE = GEOMETRY.literal_off - GEOMETRY.code_off
N_BLOCK_ENTRIES = (GEOMETRY.code_off - GEOMETRY.block_off) // BLOCK_ENTRY_SIZE
NO_CELLS = (Addr(0), 0)


def make_header(geometry: ArenaGeometry = GEOMETRY) -> ArenaHeader:
    """Return the header of an arena with nothing in it."""
    return ArenaHeader(
        size=geometry.size,
        block_off=geometry.block_off,
        code_off=geometry.code_off,
        literal_off=geometry.literal_off,
        counter_off=geometry.counter_off,
        controller_pid=1,
        controller_start=2,
        target_pid=3,
        n_entries=0,
        row_shift=geometry.row_shift,
        n_cpus=geometry.n_cpus,
    )


def put_code(
    arena: Arena,
    code: bytes,
    *,
    kind: BlockKind = BlockKind.PROMOTED,
    cells: tuple[Addr, int] = NO_CELLS,
) -> Addr:
    """Write a block where the next one goes."""
    room = arena.find_room(len(code), lambda addr: place_block(addr, len(code)))
    whole = BlockCode(code=code, text_size=len(code))
    return arena.put_block(room, whole, site_addr=SITE_ADDR, kind=kind, cells=cells)


def free(arena: Arena, addr: Addr) -> int:
    """Free a block as after a grace period."""
    arena.retire_block(addr)
    return arena.free_block(addr)


def read_block_table(fd: int) -> list[BlockEntry | None]:
    """Return the block table as another process reads it; None where an entry is free."""
    header = ArenaHeader.unpack(os.pread(fd, HEADER_SIZE, 0))
    assert header is not None
    data = os.pread(fd, header.n_blocks * BLOCK_ENTRY_SIZE, header.block_off)
    return [
        BlockEntry.unpack(data[off : off + BLOCK_ENTRY_SIZE])
        for off in range(0, len(data), BLOCK_ENTRY_SIZE)
    ]


@pytest.fixture
def arena_fd() -> Iterator[int]:
    """Return a memfd of an arena's size."""
    fd = os.memfd_create("optpoline", os.MFD_CLOEXEC)
    os.ftruncate(fd, GEOMETRY.size)
    yield fd
    os.close(fd)


@pytest.fixture
def arena(arena_fd: int) -> Iterator[Arena]:
    """Return a small, empty arena."""
    made = Arena(ARENA_ADDR, arena_fd, GEOMETRY, make_header())
    yield made
    made.close()
