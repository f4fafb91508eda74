# SPDX-License-Identifier: Apache-2.0
"""Blocks in an arena: written once, redirected and pointed back."""

from __future__ import annotations

import pytest

from optpoline.errors import ArenaError, EncodeRangeError
from optpoline.model import Addr, BlockPlan, Guard, Miss, OperandLoad
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block, add_block, add_plain_thunk, point_back, redirect
from optpoline.x86.blocks import LINE_SIZE, POISON, encode_block
from tests.emulate.disassemble import disassemble
from tests.unit.patch.conftest import CODE_SIZE, SITE_ADDR

PLAN = BlockPlan(
    operand="rax",
    tree=Guard(Addr(0x40_1000), None, Guard(Addr(0x9000_0000), None, Miss())),
    thunk_addr=Addr(0x40_0000),
)


def write(arena: Arena, plan: BlockPlan) -> Block:
    """Write a block for the only site there is."""
    return add_block(arena, plan, site_addr=SITE_ADDR)


def test_block_is_what_the_encoder_made(arena: Arena) -> None:
    block = write(arena, PLAN)
    code = arena.read(block.addr, block.size)
    assert code == encode_block(PLAN, block.addr, arena).code
    assert block.head == code[:8]
    assert arena.load_u64(arena.addr_of(0x9000_0000)) == 0x9000_0000


def test_blocks_keep_to_lines_and_leave_poison_between(arena: Arena) -> None:
    chain = BlockPlan(
        operand="rax",
        tree=Guard(Addr(0x40_1000), None, Guard(Addr(0x40_2000), None, PLAN.tree)),
        thunk_addr=PLAN.thunk_addr,
    )
    blocks = [write(arena, plan) for plan in (PLAN, PLAN, chain, PLAN, chain, chain, PLAN)]
    assert blocks[0].size <= LINE_SIZE
    taken: set[int] = set()
    for block in blocks:
        n_lines = (block.addr + block.size - 1) // LINE_SIZE - block.addr // LINE_SIZE + 1
        assert n_lines == -(-block.size // LINE_SIZE)
        code = encode_block(block.plan, block.addr, arena).code
        assert arena.read(block.addr, block.size) == code
        own = set(range(block.addr, block.addr + block.size))
        assert not own & taken
        taken |= own
    used = range(arena.code_start, arena.used_code_end)
    code = arena.read(Addr(used.start), len(used))
    assert {code[addr - used.start] for addr in used if addr not in taken} == {POISON}


def test_a_plain_site_has_one_thunk_however_often_its_module_comes(arena: Arena) -> None:
    thunk = add_plain_thunk(arena, "r8", site_addr=SITE_ADDR)
    n_put = arena.n_put
    assert add_plain_thunk(arena, "r8", site_addr=SITE_ADDR) == thunk
    assert arena.n_put == n_put
    # Another module's branch at the same address, and another site, have their own.
    others = [add_plain_thunk(arena, "r9", site_addr=SITE_ADDR)]
    others.append(add_plain_thunk(arena, "r8", site_addr=Addr(SITE_ADDR + 16)))
    assert len({thunk, *others}) == 3
    assert all(arena.is_thunk(addr) for addr in (thunk, *others))


def test_a_thunk_that_loads_what_is_relative_to_it_is_found_again(arena: Arena) -> None:
    # mov disp32(%rip), %r8
    load = OperandLoad(code=bytes.fromhex("4c 8b 05 00 00 00 00"), data_addr=Addr(arena.addr))
    other = OperandLoad(code=load.code, data_addr=Addr(arena.addr + 8))
    thunk = add_plain_thunk(arena, "r8", load, site_addr=SITE_ADDR)
    loaded = disassemble(arena.read(thunk, load.size), thunk)
    assert loaded[0].memory_addr == arena.addr
    assert add_plain_thunk(arena, "r8", load, site_addr=SITE_ADDR) == thunk
    assert add_plain_thunk(arena, "r8", other, site_addr=SITE_ADDR) != thunk
    assert add_plain_thunk(arena, "r8", site_addr=SITE_ADDR) != thunk


def test_full_arena_is_an_error_and_keeps_its_blocks(arena: Arena) -> None:
    blocks: list[Block] = []
    while arena.free_code_size >= LINE_SIZE:
        blocks.append(write(arena, PLAN))
    assert len(blocks) > 100
    # What is left has room for one more at most.
    with pytest.raises(ArenaError):
        blocks += [write(arena, PLAN), write(arena, PLAN), write(arena, PLAN)]
    for block in blocks:
        assert arena.read(block.addr, block.size) == encode_block(PLAN, block.addr, arena).code


def test_redirect_and_back(arena: Arena) -> None:
    first, second = write(arena, PLAN), write(arena, PLAN)
    before = arena.read(first.addr, first.size)
    redirect(first, second.addr)
    jump = disassemble(arena.read(first.addr, 5), first.addr)[0]
    assert (jump.mnemonic, jump.branch_addr) == ("jmp", second.addr)
    assert arena.read(first.addr, first.size)[8:] == before[8:]
    redirect(first, PLAN.thunk_addr)
    assert disassemble(arena.read(first.addr, 5), first.addr)[0].branch_addr == PLAN.thunk_addr
    point_back(first)
    assert arena.read(first.addr, first.size) == before
    assert arena.read(second.addr, second.size)[:8] == second.head


def test_redirect_of_the_shortest_block_keeps_to_itself(arena: Arena) -> None:
    empty = BlockPlan(operand="rax", tree=Miss(), thunk_addr=PLAN.thunk_addr)
    first, second = write(arena, empty), write(arena, empty)
    assert first.size < 8
    following = arena.read(second.addr, 8)
    redirect(first, second.addr)
    assert arena.read(second.addr, 8) == following
    point_back(first)
    assert arena.head_of(first.addr) == first.head


def test_redirect_out_of_reach_changes_nothing(arena: Arena) -> None:
    block = write(arena, PLAN)
    with pytest.raises(EncodeRangeError):
        redirect(block, Addr(0x7F00_0000_0000))
    assert arena.head_of(block.addr) == block.head


def test_block_out_of_reach_takes_no_code(arena: Arena) -> None:
    far = BlockPlan(operand="rax", tree=Miss(), thunk_addr=Addr(0x7F00_0000_0000))
    with pytest.raises(EncodeRangeError):
        write(arena, far)
    assert arena.used_code_end == arena.code_start
    assert arena.free_code_size == CODE_SIZE
    assert arena.blocks == ()
