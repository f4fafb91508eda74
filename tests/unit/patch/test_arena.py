# SPDX-License-Identifier: Apache-2.0
"""Handing out an arena's memory, and its journal as another controller reads it."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from optpoline.errors import ArenaError
from optpoline.model import Addr, Site, SiteKind, Thunk, ThunkFlavour
from optpoline.patch.arena import Arena
from optpoline.patch.arena_memory import ArenaMemory
from optpoline.patch.geometry import JOURNAL_SPARE_ENTRIES, MIN_ROW_SIZE, ArenaGeometry
from optpoline.patch.layout import (
    BLOCK_ENTRY_SIZE,
    ENTRY_SIZE,
    HEADER_SIZE,
    ArenaHeader,
    BlockKind,
    JournalEntry,
)
from optpoline.x86.assembler import BlockCode
from optpoline.x86.blocks import BLOCK_ALIGNMENT, HEAD_SIZE, LINE_SIZE, POISON
from tests.unit.patch.conftest import (
    ARENA_ADDR,
    CODE_SIZE,
    GEOMETRY,
    NO_CELLS,
    PAGE_SIZE,
    SITE_ADDR,
    make_header,
    put_code,
)

THUNK = Thunk(addr=Addr(0x40_0000), operand="rax", flavour=ThunkFlavour.GCC, symbol=None)
SITE = Site(
    addr=SITE_ADDR,
    code=bytes.fromhex("e8 11 22 33 44"),
    kind=SiteKind.CALL,
    disp_addr=Addr(0x40_1002),
    thunk=THUNK,
    module="/bin/program",
    function=None,
    function_addr=None,
)


@pytest.mark.parametrize("n_cpus", [1, 2, 256])
@pytest.mark.parametrize("n_sites", [0, 1, 48, 1900, 100_000])
def test_geometry_is_whole_pages_in_order(n_sites: int, n_cpus: int) -> None:
    geometry = ArenaGeometry.for_sites(n_sites, n_cpus)
    offsets = (
        *(HEADER_SIZE, geometry.block_off, geometry.code_off),
        *(geometry.literal_off, geometry.counter_off),
    )
    assert all(off % 4096 == 0 for off in (*offsets, geometry.size))
    assert [*offsets, geometry.size] == sorted({*offsets, geometry.size})
    assert geometry.block_off - HEADER_SIZE >= (n_sites + JOURNAL_SPARE_ENTRIES) * ENTRY_SIZE
    code_size = geometry.literal_off - geometry.code_off
    assert code_size >= n_sites * 1024
    assert (geometry.size - geometry.counter_off) == 1 + n_cpus << geometry.row_shift
    row_size = geometry.near_size - geometry.counter_off
    assert row_size == 1 << geometry.row_shift >= max(MIN_ROW_SIZE, n_sites * 384)
    # Blocks of one line each must not run out of entries before the code is used up.
    assert (geometry.code_off - geometry.block_off) // BLOCK_ENTRY_SIZE >= code_size // LINE_SIZE


def test_header_can_be_read_by_another_controller(arena: Arena, arena_fd: int) -> None:
    header = ArenaHeader.unpack(os.pread(arena_fd, HEADER_SIZE, 0))
    assert header is not None
    assert (header.size, header.target_pid, header.n_entries) == (GEOMETRY.size, 3, 0)


def test_parts_lie_where_the_geometry_says(arena: Arena) -> None:
    assert arena.addr == ARENA_ADDR
    assert arena.end == ARENA_ADDR + GEOMETRY.size
    assert arena.near_end == ARENA_ADDR + GEOMETRY.counter_off + PAGE_SIZE
    assert arena.rows.shared_addr == arena.code_end
    assert arena.rows.shared_addr + arena.rows.size == arena.end
    assert arena.code_start == ARENA_ADDR + GEOMETRY.code_off
    assert arena.code_end == ARENA_ADDR + GEOMETRY.counter_off
    assert arena.used_code_end == arena.code_start
    assert arena.free_code_size == CODE_SIZE
    assert arena.blocks == ()


@pytest.mark.parametrize("size", [1, 6, 15, 16, 17, 100])
def test_blocks_are_aligned_and_padded_with_poison(arena: Arena, size: int) -> None:
    first = put_code(arena, b"\x90" * size)
    assert first == arena.code_start
    end = arena.used_code_end
    assert end % BLOCK_ALIGNMENT == 0
    assert size <= end - first < size + BLOCK_ALIGNMENT
    data = arena.read(first, end - first)
    assert data == b"\x90" * size + bytes((POISON,)) * (end - first - size)
    assert arena.free_code_size == CODE_SIZE - (end - first)
    second = put_code(arena, b"\x90" * size)
    assert second % BLOCK_ALIGNMENT == 0
    assert second >= end


def test_head_of_a_short_block_is_whole(arena: Arena) -> None:
    addr = put_code(arena, b"\xe9\0\0\0\0\xcc")
    assert arena.head_of(addr) == b"\xe9\0\0\0\0\xcc\xcc\xcc"
    assert len(arena.head_of(addr)) == HEAD_SIZE


def test_blocks_until_the_code_is_used_up(arena: Arena, arena_fd: int) -> None:
    for i in range(CODE_SIZE // 128):
        put_code(arena, bytes((i,)) * 128)
    assert arena.free_code_size == 0
    with pytest.raises(ArenaError, match="used up") as caught:
        put_code(arena, b"\x90")
    assert caught.value.hint is not None
    # The literals behind the code were not written.
    assert os.pread(arena_fd, PAGE_SIZE, GEOMETRY.literal_off) == bytes(PAGE_SIZE)
    assert arena.read(arena.code_start, 128) == bytes(128)


def test_block_that_is_too_large_takes_nothing(arena: Arena) -> None:
    with pytest.raises(ArenaError):
        put_code(arena, b"\x90" * (CODE_SIZE + 1))
    assert arena.free_code_size == CODE_SIZE
    put_code(arena, b"\x90" * CODE_SIZE)


def test_finding_room_takes_nothing(arena: Arena) -> None:
    rooms = [arena.find_room(100, lambda addr: addr) for _ in range(3)]
    assert rooms[0] == rooms[1] == rooms[2]
    assert arena.free_code_size == CODE_SIZE


def test_gap_before_a_block_is_poison_and_taken_with_it(arena: Arena) -> None:
    put_code(arena, b"\x90" * 16)
    room = arena.find_room(20, lambda addr: -(-addr // LINE_SIZE) * LINE_SIZE)
    assert (room.start, room.at, room.end) == (
        GEOMETRY.code_off + 16,
        GEOMETRY.code_off + 64,
        GEOMETRY.code_off + 96,
    )
    arena.put_block(
        room,
        BlockCode(code=b"\x90" * 20, text_size=20),
        site_addr=SITE_ADDR,
        kind=BlockKind.PROMOTED,
        cells=NO_CELLS,
    )
    assert arena.read(Addr(arena.code_start + 16), 48) == bytes((POISON,)) * 48
    assert arena.free_code_size == CODE_SIZE - 96


def test_place_beyond_the_arena_is_no_room(arena: Arena) -> None:
    with pytest.raises(ArenaError):
        arena.find_room(1, lambda _addr: int(arena.end))
    assert arena.free_code_size == CODE_SIZE


def test_equal_literals_are_one(arena: Arena) -> None:
    one = arena.addr_of(0x5555_0000_1000)
    other = arena.addr_of((1 << 64) - 1)
    assert arena.addr_of(0x5555_0000_1000) == one
    assert other == one + 8
    assert one == ARENA_ADDR + GEOMETRY.literal_off
    assert arena.load_u64(one) == 0x5555_0000_1000
    assert arena.read(other, 8) == b"\xff" * 8


def test_literals_until_they_are_used_up(arena: Arena) -> None:
    for i in range(4096 // 8):
        arena.addr_of(1 << 32 | i)
    with pytest.raises(ArenaError, match="literals"):
        arena.addr_of(7)
    assert arena.addr_of(1 << 32) == ARENA_ADDR + GEOMETRY.literal_off
    assert arena.load_u64(Addr(ARENA_ADDR + GEOMETRY.counter_off)) == 0


def test_counters_are_adjacent_zero_and_bounded(arena: Arena) -> None:
    one, other = arena.add_counters(3), arena.add_counters(1)
    assert one == ARENA_ADDR + GEOMETRY.counter_off
    assert other == one + 24
    assert [arena.load_u64(Addr(one + 8 * i)) for i in range(4)] == [0] * 4
    with pytest.raises(ArenaError, match="counters"):
        arena.add_counters(4096 // 8 - 3)
    last = arena.add_counters(4096 // 8 - 4)
    assert last + 8 * (4096 // 8 - 4) == arena.near_end
    with pytest.raises(ArenaError):
        arena.add_counters(1)


def test_store_is_seen_through_the_other_mapping(arena: Arena, arena_fd: int) -> None:
    addr = arena.add_counters(2)
    arena.store_u64(addr, 0x1122_3344_5566_7788)
    off = addr - ARENA_ADDR
    assert os.pread(arena_fd, 16, off) == bytes.fromhex("88 77 66 55 44 33 22 11") + bytes(8)
    os.pwrite(arena_fd, b"\5", off + 8)
    assert arena.load_u64(Addr(addr + 8)) == 5


# --- journal


def read_journal(fd: int) -> list[JournalEntry]:
    """Return a journal as another controller reads it."""
    header = ArenaHeader.unpack(os.pread(fd, HEADER_SIZE, 0))
    assert header is not None
    data = os.pread(fd, header.n_entries * ENTRY_SIZE, HEADER_SIZE)
    return [
        JournalEntry.unpack(data[off : off + ENTRY_SIZE]) for off in range(0, len(data), ENTRY_SIZE)
    ]


def test_journal_keeps_the_baseline(arena: Arena, arena_fd: int) -> None:
    entry = arena.journal(SITE)
    assert entry == JournalEntry(addr=SITE.addr, code=SITE.code, disp_off=1)
    assert (entry.disp_addr, entry.end, entry.disp) == (SITE.disp_addr, SITE.end, SITE.code[1:5])
    assert read_journal(arena_fd) == [entry]


def test_site_is_journalled_once(arena: Arena, arena_fd: int) -> None:
    assert arena.journal(SITE) is arena.journal(SITE)
    assert len(read_journal(arena_fd)) == 1


def test_other_baseline_at_the_same_address_is_a_second_entry(arena: Arena, arena_fd: int) -> None:
    # The module was unloaded and another one mapped there.
    arena.journal(SITE)
    second = arena.journal(replace(SITE, code=bytes.fromhex("e9 55 66 77 08")))
    assert read_journal(arena_fd)[1] == second
    assert len(read_journal(arena_fd)) == 2


def test_prefixed_site(arena: Arena, arena_fd: int) -> None:
    site = replace(
        SITE, code=bytes.fromhex("2e 2e 0f 84 11 22 33 44"), disp_addr=Addr(SITE.addr + 4)
    )
    entry = arena.journal(site)
    assert read_journal(arena_fd) == [entry]
    assert entry.disp == bytes.fromhex("11 22 33 44")


def test_full_journal(arena: Arena, arena_fd: int) -> None:
    sites = [replace(SITE, addr=Addr(SITE.addr + 16 * i), disp_addr=Addr(SITE.disp_addr + 16 * i))
             for i in range(4096 // ENTRY_SIZE + 1)]  # fmt: skip
    for site in sites[:-1]:
        arena.journal(site)
    with pytest.raises(ArenaError, match="journal"):
        arena.journal(sites[-1])
    assert [entry.addr for entry in read_journal(arena_fd)] == [site.addr for site in sites[:-1]]
    assert os.pread(arena_fd, 1, GEOMETRY.block_off) == b"\0"


def test_entry_is_complete_before_it_is_counted(
    arena: Arena, arena_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ArenaMemory.store_u64
    seen: list[tuple[int, bytes]] = []

    def spy(self: ArenaMemory, addr: Addr, value: int) -> None:
        off = HEADER_SIZE + (value - 1) * ENTRY_SIZE
        seen.append((addr - ARENA_ADDR, os.pread(arena_fd, ENTRY_SIZE, off)))
        assert len(read_journal(arena_fd)) == value - 1
        original(self, addr, value)

    monkeypatch.setattr(ArenaMemory, "store_u64", spy)
    entry = arena.journal(SITE)
    assert seen == [(ArenaHeader.N_ENTRIES_OFF, entry.pack())]
    assert len(read_journal(arena_fd)) == 1


def test_close_lets_go_of_the_memory(arena_fd: int) -> None:
    arena = Arena(ARENA_ADDR, arena_fd, GEOMETRY, make_header())
    addr = put_code(arena, b"\x90")
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        arena.read(addr, 1)
    # What was written stays for the program.
    assert os.pread(arena_fd, 1, GEOMETRY.code_off) == b"\x90"
    header = ArenaHeader.unpack(os.pread(arena_fd, HEADER_SIZE, 0))
    assert header is not None
    assert header.controller_start == 0


def test_closes_while_somebody_looks(arena_fd: int) -> None:
    """As who catches Ctrl-C does: the exception holds the frames it came through."""
    arena = Arena(ARENA_ADDR, arena_fd, GEOMETRY, make_header())
    cells = arena._counters._cells[:, :1]
    arena.close()
    assert not cells.any()
