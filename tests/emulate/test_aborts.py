# SPDX-License-Identifier: Apache-2.0
"""A thread that is disturbed anywhere in a learning block: right target, counted once.

The thread is stopped before each instruction it does in the block, and comes back as the
kernel lets it, on another CPU. The kernel's part is played by ``Machine.return_to_user``,
from the descriptor's bytes alone.
"""

from __future__ import annotations

import random
from itertools import count

import pytest

from optpoline.model import SLOT_CLAIMED, BlockPlan, tree_targets
from optpoline.x86.assembler import REGISTER_NUMBERS
from tests.emulate.block_kinds import KINDS, LAYOUTS, N_CPUS, OPERANDS, Layout, encode_image
from tests.emulate.block_model import claim_own, find_target, run_plan
from tests.emulate.block_runs import (
    expected_registers,
    expected_stack,
    pack_cells,
    random_counters,
    unpack_cells,
)
from tests.emulate.machine import NO_CPU, Machine, State, random_state

RESTARTABLE = tuple(
    kind
    for kind in KINDS
    if (plan := KINDS[kind](LAYOUTS[0], "rdx")).rows is not None and plan.rows.rseq is not None
)
LEARNING = tuple(kind for kind in KINDS if KINDS[kind](LAYOUTS[0], "rdx").rows is not None)
OLD_CPU, NEW_CPU = 1, 2

each_restartable = pytest.mark.parametrize("kind", RESTARTABLE)


def states_of(
    plan: BlockPlan, layout: Layout, rng: random.Random, cpu: int = OLD_CPU
) -> list[State]:
    """Return states that come by every part of a block."""
    hits = list(tree_targets(plan.tree))
    values = [*rng.sample(hits, min(2, len(hits))), rng.getrandbits(64)]
    claimed = [layout.targets[6]]
    return [
        random_state(
            rng, plan.operand, value, random_counters(plan, layout, rng), cpu
        ).with_rseq_cs(0)
        for value in (*values, *claimed)
    ]


def check_left(machine: Machine, plan: BlockPlan, before: State) -> State:
    """Check everything but counters once a block was left; return the state."""
    after = machine.read_state()
    operand = before.registers[REGISTER_NUMBERS[plan.operand]]
    target = find_target(plan.tree, operand)
    is_led = target is None or target in plan.thunk_targets
    assert after.pc == (plan.thunk_addr if is_led else operand)
    assert after.registers == expected_registers(plan, after.pc, before.registers)
    assert after.vectors == before.vectors
    assert after.rseq_cs == 0
    assert after.fixed == machine.fixed
    return after


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@each_restartable
def test_stopped_before_any_instruction_and_moved(kind: str, layout: Layout) -> None:
    rng = random.Random(f"{kind} {layout.name}")
    operand = rng.choice(OPERANDS)
    plan = KINDS[kind](layout, operand)
    machine = Machine(encode_image(plan, layout))
    for state in states_of(plan, layout, rng):
        places: list[str] = []
        for n_steps in count():
            place = stop_once(machine, plan, layout, state, n_steps)
            if place is None:
                break
            places.append(place)
        value = state.registers[REGISTER_NUMBERS[operand]]
        is_hit = find_target(plan.tree, value) is not None
        if is_hit and is_noted(plan, value) and not is_traced(plan, value):
            # Six instructions: load, compare, branch, shift, add, increment.
            assert places.count("inside") == 6
        elif is_hit or not plan.is_below_stack_free:
            assert "inside" not in places
        else:
            assert places.count("inside") > 6


def is_traced(plan: BlockPlan, value: int) -> bool:
    """Tell whether a target is written to a trace."""
    return plan.trace is not None and value in dict(plan.trace.ids)


def is_noted(plan: BlockPlan, value: int) -> bool:
    """Tell whether a target is counted or traced."""
    is_miss = find_target(plan.tree, value) is None
    return is_miss or value in dict(plan.hit_count_addrs) or is_traced(plan, value)


def stop_once(
    machine: Machine, plan: BlockPlan, layout: Layout, state: State, n_steps: int
) -> str | None:
    """Stop a thread after some instructions, move it to another CPU, let it go on.

    Returns:
        Where it was: inside a restartable sequence, beside one that ``rseq_cs`` points to,
        or elsewhere; None if it had left the block by then.
    """
    machine.enter(state)
    for _ in range(n_steps):
        if machine.is_left:
            return None
        machine.step()
    before = unpack_cells(machine.read_state().counters, layout)
    was_armed = machine.read_state().rseq_cs != 0
    is_inside = machine.return_to_user(NEW_CPU)
    machine.step_out()
    after = check_left(machine, plan, state)
    operand = state.registers[REGISTER_NUMBERS[plan.operand]]

    expected = unpack_cells(state.counters, layout)
    if is_inside:
        if before != expected:
            # The target was stored already: the slot stays claimed, with no count.
            claim_own(plan, operand, expected, OLD_CPU, is_counted=False)
            assert before == expected
        run_plan(plan, operand, expected, NO_CPU)
    else:
        is_counted = before != expected
        run_plan(plan, operand, expected, OLD_CPU if is_counted else NEW_CPU)
    assert after.counters == pack_cells(expected), (n_steps, is_inside)
    assert after.stack in (state.stack, expected_stack(plan, state))
    return "inside" if is_inside else "armed" if was_armed else "outside"


@each_restartable
def test_single_step_always_gets_through(kind: str) -> None:
    """Every instruction is a trap: the kernel comes by before each of them."""
    rng = random.Random(kind)
    for layout in LAYOUTS[:2]:
        operand = rng.choice(OPERANDS)
        plan = KINDS[kind](layout, operand)
        machine = Machine(encode_image(plan, layout))
        for state in states_of(plan, layout, rng):
            machine.enter(state)
            n_disturbed = 0
            while not machine.is_left:
                machine.step()
                n_disturbed += not machine.is_left and machine.return_to_user(OLD_CPU)
            assert n_disturbed <= 1
            after = check_left(machine, plan, state)
            expected = unpack_cells(state.counters, layout)
            run_plan(plan, state.registers[REGISTER_NUMBERS[operand]], expected, NO_CPU)
            assert after.counters == pack_cells(expected)


@pytest.mark.parametrize("kind", LEARNING)
def test_signal_handler_that_uses_the_same_block(kind: str) -> None:
    """A handler comes before each instruction, and runs the block with another target."""
    rng = random.Random(kind)
    layout = LAYOUTS[1]
    operand = rng.choice(OPERANDS)
    plan = KINDS[kind](layout, operand)
    machine = Machine(encode_image(plan, layout))
    for state, other in zip(
        states_of(plan, layout, rng), reversed(states_of(plan, layout, rng)), strict=True
    ):
        for n_steps in count():
            machine.enter(state)
            for _ in range(n_steps):
                if not machine.is_left:
                    machine.step()
            if machine.is_left:
                break
            interrupt(machine, state, other)
            machine.step_out()
            after = check_left(machine, plan, state)
            operands = [one.registers[REGISTER_NUMBERS[operand]] for one in (state, other)]
            n_noted = sum(is_noted(plan, value) for value in operands)
            assert total(plan, after, layout) == total(plan, state, layout) + n_noted


def interrupt(machine: Machine, state: State, other: State) -> None:
    """Run a signal handler that branches at the same site with other registers."""
    machine.return_to_user(OLD_CPU)
    frame = machine.context()
    registers = list(other.registers)
    # The frame leaves 128 bytes below the stack pointer alone.
    registers[REGISTER_NUMBERS["rsp"]] = state.registers[REGISTER_NUMBERS["rsp"]] - 0x100
    machine.enter_again(tuple(registers), other.flags)
    machine.step_out()
    machine.set_context(frame)


def total(plan: BlockPlan, state: State, layout: Layout) -> int:
    """Return everything that was counted or traced, all rows together."""
    cells = unpack_cells(state.counters, layout)
    assert plan.rows is not None
    assert plan.miss_count_addr is not None
    counters = [addr for _, addr in plan.hit_count_addrs]
    counters += [plan.miss_count_addr, *(slot.count_addr for slot in plan.open_slots)]
    counted = sum(
        cells[addr + (row << plan.rows.row_shift)] & SLOT_CLAIMED - 1
        for addr in counters
        for row in range(1 + N_CPUS)
    )
    traced = 0 if plan.trace is None else cells[plan.trace.head_addr]
    return (counted + traced) % (1 << 63)


@each_restartable
def test_counter_cells_and_rseq_area_full_of_rubbish(kind: str) -> None:
    """Whatever the program writes there: same target, and nothing else is written."""
    rng = random.Random(kind)
    layout, operand = LAYOUTS[1], rng.choice(OPERANDS)
    plan = KINDS[kind](layout, operand)
    machine = Machine(encode_image(plan, layout))
    for cpu in (N_CPUS, 1 << 31, NO_CPU, NO_CPU - 1, *(rng.getrandbits(32) for _ in range(8))):
        for state in states_of(plan, layout, rng, cpu):
            machine.enter(state)
            machine.step_out()
            after = check_left(machine, plan, state)
            expected = unpack_cells(state.counters, layout)
            run_plan(plan, state.registers[REGISTER_NUMBERS[operand]], expected, cpu)
            assert after.counters == pack_cells(expected)
