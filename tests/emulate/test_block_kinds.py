# SPDX-License-Identifier: Apache-2.0
"""Every kind of block on an emulated CPU: where it goes and what it leaves alone.

``OPTPOLINE_EMULATE_RUNS`` sets how many runs each kind gets (default 180).
"""

from __future__ import annotations

import os
import random
import struct

import pytest

from optpoline.model import BlockPlan, Guard, Split, TreeNode, tree_targets
from optpoline.x86.assembler import REGISTER_NUMBERS
from tests.emulate.block_kinds import KINDS, LAYOUTS, OPERANDS, Layout, encode_image
from tests.emulate.block_model import run_plan
from tests.emulate.machine import ARITHMETIC_FLAGS, Machine, State, random_state

N_RUNS = int(os.environ.get("OPTPOLINE_EMULATE_RUNS", "180"))
U32_MAX = (1 << 32) - 1
U64_MAX = (1 << 64) - 1


def tree_keys(tree: TreeNode) -> set[int]:
    """Return every address that a tree compares with."""
    match tree:
        case Guard(target, below, otherwise, _):
            return {target} | (tree_keys(below) if below else set()) | tree_keys(otherwise)
        case Split(key, below, above, _):
            return {key} | tree_keys(below) | tree_keys(above)
        case _:
            return set()


def interesting_values(plan: BlockPlan, layout: Layout, rng: random.Random) -> list[int]:
    """Return operands: each target, what is nearly one, and what is far from all."""
    values = {0, 1, 1 << 31, (1 << 31) - 1, 1 << 63, (1 << 63) - 1, U64_MAX}
    values |= {layout.thunk_addr, layout.block_addr, layout.counter_addr}
    for key in tree_keys(plan.tree) | set(layout.targets):
        values |= {key, key - 1, key + 1, key ^ 1 << rng.randrange(64)}
        # The same low half, or nearly, under other high halves.
        high, low = key >> 32, key & U32_MAX
        others = [0, (high - 1) & U32_MAX, (high + 1) & U32_MAX, rng.getrandbits(32)]
        values |= {other << 32 | low for other in others}
        values |= {rng.choice(others) << 32 | near & U32_MAX for near in (low - 1, low + 1)}
    values |= {rng.getrandbits(64) for _ in range(8)}
    return sorted(value & U64_MAX for value in values)


def unpack_cells(counters: bytes, layout: Layout) -> dict[int, int]:
    """Return counter memory as address to value."""
    words = struct.unpack(f"<{len(counters) // 8}Q", counters)
    return {layout.counter_addr + 8 * i: word for i, word in enumerate(words)}


def pack_cells(cells: dict[int, int]) -> bytes:
    """Return counter memory as bytes."""
    return struct.pack(f"<{len(cells)}Q", *(cells[addr] for addr in sorted(cells)))


def random_counters(plan: BlockPlan, layout: Layout, rng: random.Random) -> bytes:
    """Return counter memory with slots free, taken, or holding anything at all."""
    cells = {layout.counter_addr + 8 * i: rng.getrandbits(rng.choice((8, 64))) for i in range(512)}
    for slot in plan.open_slots:
        cells[slot.target_addr] = rng.choice((0, *layout.targets, rng.getrandbits(64)))
    return pack_cells(cells)


def expected_registers(plan: BlockPlan, pc: int, state: State) -> tuple[int, ...]:
    """Return what a block leaves: all as it was, but an operand that is dead where it goes."""
    if plan.base is None or pc == plan.thunk_addr:
        return state.registers
    registers = list(state.registers)
    number = REGISTER_NUMBERS[plan.operand]
    registers[number] = (registers[number] - plan.base) & U64_MAX
    return tuple(registers)


def check_run(machine: Machine, plan: BlockPlan, layout: Layout, state: State) -> None:
    """Run a block once and compare all there is with the model."""
    operand = state.registers[REGISTER_NUMBERS[plan.operand]]
    cells = unpack_cells(state.counters, layout)
    expected_pc = run_plan(plan, operand, cells)
    after = machine.run(state)
    assert after.pc == expected_pc, f"operand {operand:#x}"
    assert after.pc in (operand, plan.thunk_addr)
    assert after.registers == expected_registers(plan, after.pc, state)
    assert after.vectors == state.vectors
    assert after.flags & ~ARITHMETIC_FLAGS == state.flags & ~ARITHMETIC_FLAGS
    assert after.stack == state.stack
    assert after.counters == pack_cells(cells)
    assert after.fixed == machine.fixed


@pytest.mark.parametrize("kind", KINDS)
def test_block_goes_where_its_plan_says_and_changes_nothing_else(kind: str) -> None:
    rng = random.Random(f"{kind}")
    combinations = [(layout, operand) for layout in LAYOUTS for operand in OPERANDS]
    n_runs = max(2, N_RUNS // len(combinations))
    for layout, operand in combinations:
        plan = KINDS[kind](layout, operand)
        machine = Machine(encode_image(plan, layout))
        values = interesting_values(plan, layout, rng)
        hits = list(tree_targets(plan.tree))
        for i in range(n_runs):
            # Every second run is a hit where the block has guards.
            pool = hits if hits and i % 2 else values
            counters = random_counters(plan, layout, rng)
            state = random_state(rng, operand, rng.choice(pool), counters)
            check_run(machine, plan, layout, state)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("kind", KINDS)
def test_each_target_and_each_neighbour_of_one(kind: str, layout: Layout) -> None:
    rng = random.Random(f"{kind} {layout.name}")
    operand = rng.choice(OPERANDS)
    plan = KINDS[kind](layout, operand)
    machine = Machine(encode_image(plan, layout))
    for value in interesting_values(plan, layout, rng):
        counters = random_counters(plan, layout, rng)
        check_run(machine, plan, layout, random_state(rng, operand, value, counters))


def test_counting_block_learns_what_comes_by() -> None:
    layout, operand = LAYOUTS[1], "r11"
    rng = random.Random(5)
    plan = KINDS["learn-first"](layout, operand)
    machine = Machine(encode_image(plan, layout))
    counters = bytes(4096)
    cells = unpack_cells(counters, layout)
    for _ in range(300):
        target = layout.targets[min(int(rng.expovariate(0.7)), 15)]
        assert run_plan(plan, target, cells) == layout.thunk_addr
        counters = machine.run(random_state(rng, operand, target, counters)).counters
    assert counters == pack_cells(cells)
    assert {cells[slot.target_addr] for slot in plan.open_slots} < set(layout.targets)
    counts = [cells[slot.count_addr] for slot in plan.open_slots]
    assert sum(counts) + cells[layout.counter_addr] == 300
    assert min(counts) > 0
