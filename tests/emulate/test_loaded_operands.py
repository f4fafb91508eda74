# SPDX-License-Identifier: Apache-2.0
"""Blocks of branches through memory: what the branch does, and then what any block does.

The branch itself runs first, on the same emulated CPU: where it goes, what it leaves on the
stack. A direct branch of its length leaves the same there, so that is how its block is entered.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest

from optpoline.model import Addr, BlockPlan, tree_targets
from optpoline.x86.assembler import REGISTER_NUMBERS
from optpoline.x86.plain_branches import decode_plain_branch, encode_plain_thunk
from tests.emulate.block_kinds import KINDS, LAYOUTS, Layout, LiteralTable, encode_image
from tests.emulate.block_runs import check_run, random_counters
from tests.emulate.machine import FS_BASE, STACK_ADDR, Machine, State, random_state

SITE_OFF = 0x940
"""Of the branch, in code of its own."""
DATA_OFF = 0x800
"""Among the literals: where operands lie that no register tells of."""
STACK_OPERAND = STACK_ADDR + 0x1A40
THREAD_OPERAND = FS_BASE + 0x128

Registers = Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A form of operand.

    Attributes:
        code: The branch; where its last four bytes are 0, they lead to data.
        operand: Register that is free.
        registers: What some registers must hold.
        at: Where its target is, of all registers; None for data.
    """

    code: str
    operand: str
    registers: Registers
    at: Callable[[Registers], int] | None


def _fixed(addr: int) -> Callable[[Registers], int]:
    """Return an address whatever registers hold."""
    return lambda _: addr


ON_STACK = _fixed(STACK_OPERAND)
FORMS = {
    "call base": Form(
        code="2e 2e 2e ff 13", operand="r11", registers={"rbx": STACK_OPERAND}, at=ON_STACK
    ),
    "call base+disp8": Form(
        code="2e 2e ff 53 f0", operand="r11", registers={"rbx": STACK_OPERAND + 16}, at=ON_STACK
    ),
    "call high base+disp32": Form(
        code="2e 41 ff 95 40 01 00 00",
        operand="rax",
        registers={"r13": STACK_OPERAND - 0x140},
        at=ON_STACK,
    ),
    "call base is operand": Form(
        code="2e 2e ff 50 08", operand="rax", registers={"rax": STACK_OPERAND - 8}, at=ON_STACK
    ),
    "jmp base+index": Form(
        code="2e 2e ff 24 c2",
        operand="rdx",
        registers={"rdx": STACK_OPERAND - 8 * 5, "rax": 5},
        at=ON_STACK,
    ),
    "jmp high index is operand": Form(
        code="2e 43 ff a4 fc 00 01 00 00",
        operand="r15",
        registers={"r12": STACK_OPERAND - 0x100 + 24, "r15": -3},
        at=ON_STACK,
    ),
    "call stack": Form(
        code="2e 2e ff 14 24", operand="r11", registers={}, at=lambda has: has["rsp"]
    ),
    "call stack+disp8": Form(
        code="2e ff 54 24 78", operand="r11", registers={}, at=lambda has: has["rsp"] + 0x78
    ),
    "call stack+index": Form(
        code="2e 2e ff 14 cc",
        operand="r10",
        registers={"rcx": 3},
        at=lambda has: has["rsp"] + 24,
    ),
    "jmp stack+disp8": Form(
        code="2e ff 64 24 78", operand="r9", registers={}, at=lambda has: has["rsp"] + 0x78
    ),
    "jmp red zone": Form(
        code="2e ff 64 24 f8", operand="rcx", registers={}, at=lambda has: has["rsp"] - 8
    ),
    "call thread": Form(
        code="2e 64 ff 14 25 28 01 00 00", operand="r11", registers={}, at=_fixed(THREAD_OPERAND)
    ),
    "jmp thread+base": Form(
        code="2e 64 41 ff 20", operand="r11", registers={"r8": 0x128}, at=_fixed(THREAD_OPERAND)
    ),
    "call rip": Form(code="2e ff 15 00 00 00 00", operand="r11", registers={}, at=None),
    "jmp rip": Form(code="2e ff 25 00 00 00 00", operand="rax", registers={}, at=None),
}


def _site(form: Form, layout: Layout) -> tuple[bytes, Addr]:
    """Return the bytes of a branch, and the address after it."""
    code = bytes.fromhex(form.code)
    end = Addr(layout.block_addr + SITE_OFF + len(code))
    if form.at is None:
        disp = layout.literal_addr + DATA_OFF - end
        code = code[:-4] + disp.to_bytes(4, "little", signed=True)
    return code, end


def _plan(kind: str, form: Form, layout: Layout) -> BlockPlan:
    """Return the plan of a kind of block for a branch."""
    code, end = _site(form, layout)
    branch = decode_plain_branch(code)
    assert branch is not None
    found = branch.find_operand(form.operand, end)
    assert found is not None
    operand, load = found
    assert operand == form.operand
    plan = KINDS[kind](layout, operand)
    # What a jump leaves below the stack pointer is not dead.
    return replace(plan, load=load, is_below_stack_free=plan.is_below_stack_free and branch.is_call)


def _state_at(form: Form, target: int, counters: bytes, rng: random.Random) -> State:
    """Return the state of a program at a branch that leads to a target."""
    state = random_state(rng, form.operand, rng.getrandbits(64), counters)
    numbers = {REGISTER_NUMBERS[name]: value for name, value in form.registers.items()}
    has = [numbers.get(i, value) % (1 << 64) for i, value in enumerate(state.registers)]
    # Room for what the stack pointer leads to, and nothing of it where other operands are.
    has[REGISTER_NUMBERS["rsp"]] = STACK_ADDR + 0x1000 + 8 * rng.randrange(64)
    state = replace(state, registers=tuple(has))
    if form.at is None:
        return state
    at = form.at(dict(zip(REGISTER_NUMBERS, has, strict=True)))
    word = target.to_bytes(8, "little")
    if at == THREAD_OPERAND:
        off = at - FS_BASE + 0x800
        return replace(state, thread=state.thread[:off] + word + state.thread[off + 8 :])
    off = at - STACK_ADDR
    return replace(state, stack=state.stack[:off] + word + state.stack[off + 8 :])


def _targets(plan: BlockPlan, layout: Layout, rng: random.Random) -> list[int]:
    """Return targets that a block knows and others; code can be at all of them."""
    others = [layout.targets[-1] + 0x10_0000, rng.getrandbits(46) | 1 << 45]
    return [*rng.sample(layout.targets, 3), *others, *list(tree_targets(plan.tree))[:2]]


@pytest.mark.parametrize("name", FORMS)
def test_a_branch_through_memory(name: str) -> None:
    form, rng = FORMS[name], random.Random(name)
    for kind in rng.sample(sorted(KINDS), 6):
        layout = rng.choice(LAYOUTS)
        code, _ = _site(form, layout)
        plan = _plan(kind, form, layout)
        for target in _targets(plan, layout, rng):
            literals = LiteralTable(layout.literal_addr)
            literals.values[target] = Addr(layout.literal_addr + DATA_OFF)
            image = encode_image(plan, layout, literals)
            at_site = _state_at(form, target, random_counters(plan, layout, rng), rng)
            before = Machine(image, bytes(SITE_OFF) + code).run(at_site, SITE_OFF)
            assert before.pc == target
            loaded = list(before.registers)
            loaded[REGISTER_NUMBERS[form.operand]] = target
            state = replace(before, registers=tuple(loaded))
            check_run(Machine(image), plan, layout, state, before)


@pytest.mark.parametrize("name", FORMS)
def test_the_thunk_does_what_the_branch_did(name: str) -> None:
    form, rng, layout = FORMS[name], random.Random(name), LAYOUTS[1]
    code, _ = _site(form, layout)
    plan = _plan("empty", form, layout)
    target = layout.targets[3]
    literals = LiteralTable(layout.literal_addr)
    literals.values[target] = Addr(layout.literal_addr + DATA_OFF)
    image = encode_image(plan, layout, literals)
    at_site = _state_at(form, target, random_counters(plan, layout, rng), rng)
    before = Machine(image, bytes(SITE_OFF) + code).run(at_site, SITE_OFF)
    thunk = encode_plain_thunk(form.operand, plan.load, layout.block_addr).code
    whole = Machine(image, thunk).run(before)
    assert whole.pc == target
    assert whole.stack == before.stack
    # Behind the load of the block, which has it in its register.
    behind = Machine(image, thunk).run(whole, plan.miss_addr - plan.thunk_addr)
    assert (behind.pc, behind.registers) == (target, whole.registers)
