# SPDX-License-Identifier: Apache-2.0
"""The life of a block's memory: live, retired, freed and poisoned, used again."""

from __future__ import annotations

import os
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optpoline.errors import ArenaError
from optpoline.learn.counting import n_cells, plan_counting
from optpoline.model import Addr, BlockPlan, Guard, Miss
from optpoline.patch.arena import Arena
from optpoline.patch.arena_memory import ArenaMemory
from optpoline.patch.blocks import add_block, counter_cells, redirect, redirection_of
from optpoline.patch.layout import (
    BLOCK_ENTRY_SIZE,
    HEADER_SIZE,
    ArenaHeader,
    BlockEntry,
    BlockKind,
    BlockState,
)
from optpoline.x86.blocks import LINE_SIZE, POISON
from tests.unit.patch.conftest import (
    ARENA_ADDR,
    CODE_SIZE,
    GEOMETRY,
    N_BLOCK_ENTRIES,
    NO_CELLS,
    SITE_ADDR,
    free,
    make_header,
    put_code,
    read_block_table,
)


def states_in(fd: int) -> list[BlockState]:
    """Return the states in the block table as another process reads it."""
    return [BlockState.FREE if entry is None else entry.state for entry in read_block_table(fd)]


# --- the block table


def test_entry_says_what_its_block_is(arena: Arena, arena_fd: int) -> None:
    code = bytes(range(1, 60))
    addr = put_code(arena, code, kind=BlockKind.COUNTING)
    expected = BlockEntry(
        addr=addr,
        size=len(code),
        text_size=len(code),
        crc=zlib.crc32(code),
        site_addr=SITE_ADDR,
        head=code[:8],
        kind=BlockKind.COUNTING,
        state=BlockState.LIVE,
    )
    assert read_block_table(arena_fd) == [expected]
    assert arena.blocks == (expected,)


def test_redirection_does_not_change_the_entry(arena: Arena, arena_fd: int) -> None:
    plan = BlockPlan(operand="rax", tree=Guard(Addr(0x40_1000), None, Miss()), thunk_addr=SITE_ADDR)
    blocks = [add_block(arena, plan, site_addr=SITE_ADDR) for _ in range(2)]
    before = read_block_table(arena_fd)
    assert redirection_of(arena, blocks[0].addr) is None
    redirect(blocks[0], blocks[1].addr)
    assert redirection_of(arena, blocks[0].addr) == blocks[1].addr
    assert read_block_table(arena_fd) == before
    assert before[0] is not None
    code = before[0].head + arena.read(blocks[0].addr, blocks[0].size)[8:]
    assert zlib.crc32(code) == before[0].crc


def test_another_process_sees_each_step_of_a_block(arena: Arena, arena_fd: int) -> None:
    assert read_block_table(arena_fd) == []
    addr = put_code(arena, b"\x90" * 20)
    assert states_in(arena_fd) == [BlockState.LIVE]
    entry = arena.retire_block(addr)
    assert entry.state is BlockState.RETIRED
    assert states_in(arena_fd) == [BlockState.RETIRED]
    assert read_block_table(arena_fd) == [entry]
    assert arena.blocks == (entry,)
    assert arena.free_block(addr) == 32
    assert states_in(arena_fd) == [BlockState.FREE]
    assert not arena.blocks


def test_entry_is_complete_before_its_block_is_live(
    arena: Arena, arena_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = put_code(arena, b"\x90" * 20)
    free(arena, old)
    original = ArenaMemory.store_u64
    seen: list[tuple[bytes, bytes]] = []

    def spy(self: ArenaMemory, addr: Addr, value: int) -> None:
        data = os.pread(arena_fd, BLOCK_ENTRY_SIZE, GEOMETRY.block_off)
        assert addr == self.addr + GEOMETRY.block_off + BlockEntry.STATE_OFF
        assert BlockEntry.unpack(data) is None
        seen.append((data, os.pread(arena_fd, 20, GEOMETRY.code_off)))
        original(self, addr, value)

    monkeypatch.setattr(ArenaMemory, "store_u64", spy)
    put_code(arena, b"\x91" * 20)
    (entry,) = arena.blocks
    # The slot of a freed block is used again: nobody may take the old words for the new block's.
    assert seen == [(replace(entry, state=BlockState.FREE).pack(), b"\x91" * 20)]


def test_slots_of_the_block_table_are_used_again(arena: Arena, arena_fd: int) -> None:
    for i in range(3 * N_BLOCK_ENTRIES):
        free(arena, put_code(arena, bytes((i % 200,)) * 16))
    header = ArenaHeader.unpack(os.pread(arena_fd, HEADER_SIZE, 0))
    assert header is not None
    assert header.n_blocks == 1


def test_full_block_table_is_an_error_that_leaks_nothing(arena_fd: int) -> None:
    # A table of one page less than what is needed for a code part full of the smallest blocks.
    geometry = replace(GEOMETRY, block_off=GEOMETRY.code_off - 4096)
    n_entries = 4096 // BLOCK_ENTRY_SIZE
    arena = Arena(
        ARENA_ADDR, arena_fd, geometry, replace(make_header(), block_off=geometry.block_off)
    )
    blocks = [put_code(arena, b"\x90" * 16) for _ in range(n_entries)]
    before = arena.free_code_size, arena.n_put, arena.used_code_end, arena.blocks
    counters = arena.add_counters(2)
    for _ in range(3):
        with pytest.raises(ArenaError, match="block table"):
            put_code(arena, b"\x90" * 16, cells=(counters, 2))
    assert (arena.free_code_size, arena.n_put, arena.used_code_end, arena.blocks) == before
    # Nothing was written behind the table or behind the last block.
    assert os.pread(arena_fd, 16, geometry.code_off) == b"\x90" * 16
    assert arena.read(arena.used_code_end, 16) == bytes(16)
    free(arena, blocks[7])
    assert put_code(arena, b"\x91" * 16) == blocks[7]
    arena.close()


# --- freeing


@pytest.mark.parametrize("size", [1, 16, 17, 100])
def test_freed_memory_is_poison_until_it_is_used_again(arena: Arena, size: int) -> None:
    first = put_code(arena, b"\x90" * size)
    put_code(arena, b"\x92" * 64)
    end = Addr(first + -(-size // 16) * 16)
    arena.retire_block(first)
    # A thread may still be inside.
    assert arena.read(first, size) == b"\x90" * size
    assert arena.free_block(first) == end - first
    assert arena.read(first, end - first) == bytes((POISON,)) * (end - first)
    assert put_code(arena, b"\x91") == first
    assert arena.read(first, end - first) == b"\x91" + bytes((POISON,)) * (end - first - 1)


def test_block_that_is_not_retired_is_not_freed(arena: Arena, arena_fd: int) -> None:
    addr = put_code(arena, b"\x90" * 20)
    with pytest.raises(ValueError, match="not retired"):
        arena.free_block(addr)
    assert arena.read(addr, 20) == b"\x90" * 20
    assert states_in(arena_fd) == [BlockState.LIVE]
    assert arena.free_code_size == CODE_SIZE - 32


def test_block_is_freed_once(arena: Arena) -> None:
    addr = put_code(arena, b"\x90" * 20)
    free(arena, addr)
    with pytest.raises(KeyError):
        arena.free_block(addr)
    with pytest.raises(KeyError):
        arena.retire_block(addr)
    assert arena.free_code_size == CODE_SIZE


def test_counters_of_a_freed_block_are_zero_when_used_again(arena: Arena) -> None:
    kept = arena.add_counters(1)
    arena.store_u64(kept, 99)
    cells = arena.add_counters(5)
    addr = put_code(arena, b"\x90", cells=(cells, 5))
    for i in range(5):
        arena.store_u64(Addr(cells + 8 * i), 7 + i)
    arena.retire_block(addr)
    # A thread inside still counts there.
    assert arena.load_u64(cells) == 7
    arena.free_block(addr)
    assert arena.add_counters(5) == cells
    assert [arena.load_u64(Addr(cells + 8 * i)) for i in range(5)] == [0] * 5
    assert arena.load_u64(kept) == 99


def test_cells_of_a_plan_are_all_of_its_counters(arena: Arena) -> None:
    size = n_cells(1, 2)
    first = arena.add_counters(size)
    target = Addr(0x40_1000)
    plan = plan_counting(
        operand="rax",
        tree=Guard(target, None, Miss()),
        thunk_addr=Addr(0x40_0000),
        n_open=2,
        cells_addr=first,
        rows=arena.rows,
    )
    assert counter_cells(plan) == (first, size)
    promoted = replace(plan, hit_count_addrs=(), open_slots=(), rows=None)
    assert counter_cells(promoted) == (plan.miss_count_addr, 1)
    assert counter_cells(replace(promoted, miss_count_addr=None)) == NO_CELLS
    block = add_block(arena, plan, site_addr=SITE_ADDR)
    (entry,) = arena.blocks
    assert entry.kind is BlockKind.COUNTING
    assert 0 < entry.text_size <= entry.size == block.size
    assert block.addr % LINE_SIZE == 0
    free(arena, block.addr)
    assert arena.add_counters(size) == first


def test_reused_counts_the_blocks_in_freed_memory(arena: Arena) -> None:
    first, second = put_code(arena, b"\x90" * 64), put_code(arena, b"\x90" * 64)
    assert (arena.n_put, arena.n_reused) == (2, 0)
    free(arena, first)
    assert put_code(arena, b"\x91" * 16) == first
    assert (arena.n_put, arena.n_reused) == (3, 1)
    # Too large for what is left of the first: behind the last, where there never was a block.
    put_code(arena, b"\x92" * 64)
    assert (arena.n_put, arena.n_reused) == (4, 1)
    free(arena, second)
    put_code(arena, b"\x93" * 64)
    assert (arena.n_put, arena.n_reused) == (5, 2)


def test_block_that_begins_in_freed_memory_is_reuse(arena: Arena) -> None:
    put_code(arena, b"\x90" * 64)
    last = put_code(arena, b"\x90" * 64)
    free(arena, last)
    # It reaches beyond where there ever was one.
    assert put_code(arena, b"\x91" * 200) == last
    assert arena.n_reused == 1


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_lives(data: st.DataObject) -> None:
    """Blocks never overlap; memory of none is poison or was never written."""
    fd = os.memfd_create("optpoline", os.MFD_CLOEXEC)
    os.ftruncate(fd, GEOMETRY.size)
    arena = Arena(ARENA_ADDR, fd, GEOMETRY, make_header())
    model: dict[Addr, bytes] = {}
    ever = bytearray(CODE_SIZE)
    n_reused = 0
    for i in range(data.draw(st.integers(1, 40))):
        is_freeing: bool = data.draw(st.booleans())
        if model and is_freeing:
            addr = data.draw(st.sampled_from(sorted(model)))
            del model[addr]
            free(arena, addr)
            continue
        code = bytes((i % 200,)) * data.draw(st.integers(1, 700))
        try:
            addr = put_code(arena, code)
        except ArenaError:
            continue
        off = addr - arena.code_start
        n_reused += bool(ever[off])
        ever[: arena.used_code_end - arena.code_start] = b"\1" * (
            arena.used_code_end - arena.code_start
        )
        model[addr] = code
    expected = bytearray(bytes((POISON,)) * (arena.used_code_end - arena.code_start))
    for addr, code in model.items():
        off = addr - arena.code_start
        assert expected[off : off + len(code)] == bytes((POISON,)) * len(code)
        expected[off : off + len(code)] = code
    assert os.pread(fd, CODE_SIZE, GEOMETRY.code_off) == expected.ljust(CODE_SIZE, b"\0")
    assert {block.addr for block in arena.blocks} == set(model)
    assert {entry.addr for entry in read_block_table(fd) if entry} == set(model)
    assert (arena.n_reused, arena.n_put >= len(model)) == (n_reused, True)
    for addr in model:
        free(arena, addr)
    assert arena.free_code_size == CODE_SIZE
    arena.close()
    os.close(fd)
