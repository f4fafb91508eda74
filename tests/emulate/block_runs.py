# SPDX-License-Identifier: Apache-2.0
"""Operands, counters and states that a block has to get right, and the comparison itself."""

from __future__ import annotations

import random
import struct

from optpoline.model import BlockPlan, Guard, Split, TreeNode
from optpoline.x86.assembler import REGISTER_NUMBERS
from tests.emulate.block_kinds import Layout
from tests.emulate.block_model import run_plan
from tests.emulate.machine import ARITHMETIC_FLAGS, Machine, State

__all__ = [
    "check_run",
    "expected_registers",
    "interesting_values",
    "pack_cells",
    "random_counters",
    "unpack_cells",
]

_U32_MAX = (1 << 32) - 1
_U64_MAX = (1 << 64) - 1


def _tree_keys(tree: TreeNode) -> set[int]:
    """Return every address that a tree compares with."""
    match tree:
        case Guard(target, below, otherwise, _):
            return {target} | (_tree_keys(below) if below else set()) | _tree_keys(otherwise)
        case Split(key, below, above, _):
            return {key} | _tree_keys(below) | _tree_keys(above)
        case _:
            return set()


def interesting_values(plan: BlockPlan, layout: Layout, rng: random.Random) -> list[int]:
    """Return operands: each target, what is nearly one, and what is far from all."""
    values = {0, 1, 1 << 31, (1 << 31) - 1, 1 << 63, (1 << 63) - 1, _U64_MAX}
    values |= {layout.thunk_addr, layout.block_addr, layout.counter_addr}
    for key in _tree_keys(plan.tree) | set(layout.targets):
        values |= {key, key - 1, key + 1, key ^ 1 << rng.randrange(64)}
        # The same low half, or nearly, under other high halves.
        high, low = key >> 32, key & _U32_MAX
        others = [0, (high - 1) & _U32_MAX, (high + 1) & _U32_MAX, rng.getrandbits(32)]
        values |= {other << 32 | low for other in others}
        values |= {rng.choice(others) << 32 | near & _U32_MAX for near in (low - 1, low + 1)}
    values |= {rng.getrandbits(64) for _ in range(8)}
    return sorted(value & _U64_MAX for value in values)


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


def expected_registers(plan: BlockPlan, pc: int, registers: tuple[int, ...]) -> tuple[int, ...]:
    """Return what the registers hold after a block was left for an address.

    Relative to a base the operand is changed on the way to a target, where it is dead.
    """
    if plan.base is None or pc == plan.thunk_addr:
        return registers
    after = list(registers)
    number = REGISTER_NUMBERS[plan.operand]
    after[number] = (after[number] - plan.base) & _U64_MAX
    return tuple(after)


def check_run(machine: Machine, plan: BlockPlan, layout: Layout, state: State) -> None:
    """Run a block once and compare all there is with the model."""
    operand = state.registers[REGISTER_NUMBERS[plan.operand]]
    cells = unpack_cells(state.counters, layout)
    expected_pc = run_plan(plan, operand, cells)
    after = machine.run(state)
    assert after.pc == expected_pc, f"operand {operand:#x}"
    assert after.pc in (operand, plan.thunk_addr)
    assert after.registers == expected_registers(plan, after.pc, state.registers)
    assert after.vectors == state.vectors
    assert after.flags & ~ARITHMETIC_FLAGS == state.flags & ~ARITHMETIC_FLAGS
    assert after.stack == state.stack
    assert after.counters == pack_cells(cells)
    assert after.fixed == machine.fixed
