# SPDX-License-Identifier: Apache-2.0
"""Operands, counters and states that a block has to get right, and the comparison itself."""

from __future__ import annotations

import random
import struct

from optpoline.model import BlockPlan, Guard, Split, TreeNode
from optpoline.x86.assembler import REGISTER_NUMBERS
from tests.emulate.block_kinds import COUNTERS_SIZE, Layout
from tests.emulate.block_model import find_target, run_plan
from tests.emulate.machine import ARITHMETIC_FLAGS, NO_CPU, STACK_ADDR, Machine, State

__all__ = [
    "check_run",
    "expected_registers",
    "expected_stack",
    "expected_thread",
    "interesting_values",
    "pack_cells",
    "random_counters",
    "seen_cpu",
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
    words = struct.unpack(f"<{COUNTERS_SIZE // 8}Q", rng.randbytes(COUNTERS_SIZE))
    cells = {layout.counter_addr + 8 * i: word for i, word in enumerate(words)}
    rows = plan.rows
    for slot in plan.open_slots if rows is not None else ():
        assert rows is not None
        for row in range(1 + rows.n_cpus):
            off = row << rows.row_shift
            cells[slot.target_addr + off] = rng.choice((0, *layout.targets, rng.getrandbits(64)))
            # In row 0 a claimed slot may have no target yet; counts are small.
            cells[slot.count_addr + off] = rng.getrandbits(8) | rng.getrandbits(1) << 63
    return pack_cells(cells)


def expected_registers(plan: BlockPlan, pc: int, registers: tuple[int, ...]) -> tuple[int, ...]:
    """Return what the registers hold after a block was left for an address.

    Relative to a base the operand is changed on the way to a target that is not counted,
    where it is dead.
    """
    if plan.base is None or pc == plan.miss_addr or plan.rows is not None:
        return registers
    after = list(registers)
    number = REGISTER_NUMBERS[plan.operand]
    after[number] = (after[number] - plan.base) & _U64_MAX
    return tuple(after)


def seen_cpu(plan: BlockPlan, cpu: int) -> int:
    """Return the CPU whose row a block counts in, on some CPU."""
    if plan.rows is None or plan.rows.rseq is not None or cpu == NO_CPU:
        return cpu
    return cpu & 0xFFF


def expected_thread(plan: BlockPlan, state: State) -> bytes:
    """Return the thread's own memory after a block: rseq_cs is cleared if it was used."""
    if plan.rows is None or plan.rows.rseq is None:
        return state.thread
    target = find_target(plan.tree, state.registers[REGISTER_NUMBERS[plan.operand]])
    traced = {} if plan.trace is None else dict(plan.trace.ids)
    if target is None:
        is_used = plan.is_below_stack_free
    else:
        is_used = target in dict(plan.hit_count_addrs) and target not in traced
    return state.with_rseq_cs(0).thread if is_used else state.thread


def expected_stack(plan: BlockPlan, state: State) -> bytes:
    """Return the stack after a block: a register may be left in what is dead of it."""
    operand = state.registers[REGISTER_NUMBERS[plan.operand]]
    is_registered = plan.rows is not None and plan.rows.rseq is not None
    if (
        not plan.is_below_stack_free
        or not is_registered
        or find_target(plan.tree, operand) is not None
    ):
        return state.stack
    scratch = state.registers[REGISTER_NUMBERS["rcx" if plan.operand == "rax" else "rax"]]
    off = state.registers[REGISTER_NUMBERS["rsp"]] - 8 - STACK_ADDR
    return state.stack[:off] + scratch.to_bytes(8, "little") + state.stack[off + 8 :]


def check_run(
    machine: Machine, plan: BlockPlan, layout: Layout, state: State, before: State | None = None
) -> None:
    """Run a block once and compare all there is with the model.

    Args:
        machine: Has the block.
        plan: Its plan.
        layout: Where.
        state: A program's, the target in the block's operand.
        before: The same before the block has loaded its operand, if it does.
    """
    operand = state.registers[REGISTER_NUMBERS[plan.operand]]
    cells = unpack_cells(state.counters, layout)
    expected_pc = run_plan(plan, operand, cells, seen_cpu(plan, state.cpu))
    after = machine.run(state if before is None else before)
    assert after.pc == expected_pc, f"operand {operand:#x}"
    assert after.pc in (operand, plan.miss_addr)
    assert after.registers == expected_registers(plan, after.pc, state.registers)
    assert after.vectors == state.vectors
    assert after.flags & ~ARITHMETIC_FLAGS == state.flags & ~ARITHMETIC_FLAGS
    assert after.stack == expected_stack(plan, state)
    assert after.counters == pack_cells(cells)
    assert after.thread == expected_thread(plan, state)
    assert after.fixed == machine.fixed
