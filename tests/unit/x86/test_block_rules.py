# SPDX-License-Identifier: Apache-2.0
"""Blocks as they are encoded break no rule; broken on purpose, each breaks its own."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from optpoline.model import Addr, BlockPlan, OperandLoad
from optpoline.x86.assembler import INT3, LINE_SIZE, REGISTER_NUMBERS
from optpoline.x86.block_rules import judge_block
from optpoline.x86.block_verdict import BlockRule, BlockScene, decode_redirect
from optpoline.x86.blocks import HEAD_SIZE, encode_block, encode_redirect
from tests.emulate.block_kinds import (
    COUNTERS_SIZE,
    KINDS,
    LAYOUTS,
    OPERANDS,
    Image,
    Layout,
    LiteralTable,
    encode_image,
)
from tests.emulate.block_runs import interesting_values, random_counters
from tests.emulate.disassemble import disassemble
from tests.emulate.machine import NO_CPU, STACK_ADDR, Machine, State, random_state

FIXED, PIE = LAYOUTS[0], LAYOUTS[1]
ONE = encode_image(KINDS["one"](FIXED, "rax"), FIXED)
"""cmp rax, imm32 (6 bytes); je rel32 (6); jmp rel32 (5); int3."""
ONE_PIE = encode_image(KINDS["one-counted"](PIE, "rdx"), PIE)
"""cmp rdx, [rip+literal] (7); je rel32 (6); inc [rip+counter] (7); jmp rel32 (5); int3."""
BASED = encode_image(KINDS["based-tree"](PIE, "rcx"), PIE)
"""sub rcx, [rip+literal] (7); ...; add rcx, [rip+literal] (7); inc; jmp; int3."""

N_MUTATIONS = 25
"""Of each kind of block in the test that emulates those that pass."""


def scene_of(image: Image) -> BlockScene:
    """Return what is around a block."""
    layout = image.layout
    values = {int(addr): value for value, addr in image.literals.values.items()}
    code = {*layout.targets, layout.thunk_addr}
    return BlockScene(
        thunk_addrs=frozenset({layout.thunk_addr}),
        operand=image.plan.operand,
        literals=(layout.literal_addr, layout.literal_addr + 4096),
        counters=(layout.counter_addr, layout.counter_addr + COUNTERS_SIZE),
        read_literal=lambda addr: values.get(addr, 0),
        is_code=lambda addr: addr in code,
        is_arena=lambda addr: layout.block_addr <= addr < layout.counter_addr + COUNTERS_SIZE,
        text_size=len(image.text) if image.text != image.code else None,
        rows=image.plan.rows,
        is_below_stack_free=image.plan.is_below_stack_free,
        load=image.plan.load,
    )


def rules_of(
    image: Image, code: bytes | None = None, scene: BlockScene | None = None
) -> set[BlockRule]:
    """Return the rules that a block breaks."""
    found = judge_block(
        image.code if code is None else code, image.layout.block_addr, scene or scene_of(image)
    )
    return {fault.rule for fault in found.faults}


def put(code: bytes, off: int, new: str | bytes) -> bytes:
    """Return bytes with others over them."""
    data = bytes.fromhex(new) if isinstance(new, str) else new
    return code[:off] + data + code[off + len(data) :]


def moved(code: bytes, off: int, delta: int) -> bytes:
    """Return bytes with the displacement at an offset changed."""
    disp = int.from_bytes(code[off : off + 4], "little", signed=True) + delta
    return put(code, off, disp.to_bytes(4, "little", signed=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_as_encoded_are_sound(kind: str, layout: Layout) -> None:
    for operand in OPERANDS:
        image = encode_image(KINDS[kind](layout, operand), layout)
        verdict = judge_block(image.code, layout.block_addr, scene_of(image))
        assert verdict.faults == ()
        assert verdict.stale == ()


@pytest.mark.parametrize(
    ("rule", "insns"),
    [
        # call rel32; nop
        (BlockRule.CALL, "e800000000 90"),
        # call *%rax
        (BlockRule.INDIRECT_BRANCH, "ffd0 90909090"),
        # jmp *%rax
        (BlockRule.INDIRECT_BRANCH, "ffe0 90909090"),
        # jmp *disp32(%rip)
        (BlockRule.INDIRECT_BRANCH, "ff2500000000"),
        # ret
        (BlockRule.INDIRECT_BRANCH, "c3 9090909090"),
        # push %rax
        (BlockRule.STACK, "50 9090909090"),
        # pushfq; popfq
        (BlockRule.STACK, "9c9d 90909090"),
        # mov $1,%eax
        (BlockRule.REGISTER_WRITE, "b801000000 90"),
        # lea 0(%rax),%rsp
        (BlockRule.REGISTER_WRITE, "488d6000 9090"),
        # xor %rcx,%rcx
        (BlockRule.REGISTER_WRITE, "4831c9 909090"),
        # nops
        (BlockRule.UNKNOWN_INSN, "909090909090"),
        # ud2
        (BlockRule.UNKNOWN_INSN, "0f0b 90909090"),
        # a byte that is no instruction
        (BlockRule.UNKNOWN_INSN, "06 9090909090"),
        # loop: not a branch on flags
        (BlockRule.UNKNOWN_INSN, "e300 90909090"),
        # int3 on the way
        (BlockRule.FALL_OUT, "cc 9090909090"),
    ],
)
def test_forbidden_instructions(rule: BlockRule, insns: str) -> None:
    assert rule in rules_of(ONE, put(ONE.code, 6, insns))


def test_forbidden_instructions_are_named_even_where_nothing_leads() -> None:
    assert BlockRule.INDIRECT_BRANCH in rules_of(ONE, ONE.code + bytes.fromhex("ffe0"))
    assert BlockRule.STRAY in rules_of(ONE, ONE.code + bytes.fromhex("90"))
    assert BlockRule.STRAY in rules_of(ONE, ONE.code + bytes.fromhex("cc"))


def test_int3_fills_lines_only() -> None:
    # Behind the block some int3 and its jump to the thunk again, which the guard leads to.
    for off in (0, 16, 32):
        layout = replace(FIXED, block_addr=Addr(FIXED.block_addr + off))
        image = encode_image(KINDS["one"](layout, "rax"), layout)
        for n_fill, rules in ((46 - off, set()), (45 - off, {BlockRule.STRAY})):
            jump = moved(image.code, 13, -6 - n_fill)[12:]
            code = put(image.code, 6, b"\x0f\x84" + (6 + n_fill).to_bytes(4, "little"))
            assert layout.block_addr % LINE_SIZE == off
            assert rules_of(image, code + bytes([INT3]) * n_fill + jump) == rules


def test_a_branch_must_lead_where_the_operand_points() -> None:
    # The guard, to the next target; the miss, to beside the thunk; jne for je.
    assert rules_of(ONE, moved(ONE.code, 8, 0x130)) == {BlockRule.EXIT}
    assert rules_of(ONE, moved(ONE.code, 13, 1)) == {BlockRule.EXIT}
    assert rules_of(ONE, put(ONE.code, 7, "85")) == {BlockRule.EXIT}
    # The compare, with one target more.
    assert rules_of(ONE, put(ONE.code, 2, bytes([ONE.code[2] ^ 0x10]))) == {BlockRule.EXIT}
    # Half a register proves nothing: cmp %eax; and 81 /7 without REX.
    half = encode_image(KINDS["one"](FIXED, "rsi"), FIXED)
    assert BlockRule.EXIT in rules_of(half, put(half.code, 0, "40"))


def test_a_literal_is_what_was_compared_with() -> None:
    scene = scene_of(ONE_PIE)
    wrong = replace(scene, read_literal=lambda addr: scene.read_literal(addr) + 1)
    assert rules_of(ONE_PIE, scene=wrong) == {BlockRule.EXIT}
    based = scene_of(BASED)
    wrong = replace(based, read_literal=lambda addr: based.read_literal(addr) ^ 1 << 40)
    assert rules_of(BASED, scene=wrong) == {BlockRule.EXIT}


def test_operands_are_in_their_part_of_the_arena() -> None:
    # The literal's displacement out of the arena, and unaligned.
    assert BlockRule.LITERAL in rules_of(ONE_PIE, moved(ONE_PIE.code, 3, 0x100000))
    assert BlockRule.LITERAL in rules_of(ONE_PIE, moved(ONE_PIE.code, 3, 4))
    # A counter proves nothing of where to branch.
    assert BlockRule.EXIT in rules_of(ONE_PIE, moved(ONE_PIE.code, 3, 0x10000))
    # The counter's displacement into the literals, and out of the arena.
    assert rules_of(ONE_PIE, moved(ONE_PIE.code, 16, -0x10000)) == {BlockRule.COUNTER}
    assert rules_of(ONE_PIE, moved(ONE_PIE.code, 16, 0x100000)) == {BlockRule.COUNTER}


def test_the_operand_is_the_thunks_register() -> None:
    scene = replace(scene_of(ONE_PIE), operand="rax")
    assert rules_of(ONE_PIE, scene=scene) == {BlockRule.OPERAND}
    # One compare of a block with another register: REX.B, 81 /7.
    chain = encode_image(KINDS["chain"](FIXED, "rsi"), FIXED)
    unknown = replace(scene_of(chain), operand=None)
    assert rules_of(chain, scene=unknown) == set()
    other = put(chain.code, 13, "49")
    assert chain.code[13:15] == bytes.fromhex("4881")
    assert rules_of(chain, other, unknown) == {BlockRule.OPERAND}


def test_the_operand_is_given_back() -> None:
    add = BASED.code.index(bytes.fromhex("48030d"))
    # sub and add of different literals; sub in place of add; no sub; add twice is no block.
    assert BlockRule.REBASE in rules_of(BASED, moved(BASED.code, add + 3, 8))
    assert BlockRule.REGISTER_WRITE in rules_of(BASED, put(BASED.code, add, "482b0d"))
    without = put(BASED.code, 0, "483b0d")
    assert BlockRule.REBASE in rules_of(BASED, without)
    # To the thunk without an add: the inc and jmp moved over it.
    short = BASED.code[:add] + BASED.code[add + 7 :]
    assert rules_of(BASED, short) & {BlockRule.REBASE, BlockRule.EXIT}


def test_branches_inside_only_lead_forward_to_instructions() -> None:
    tree = encode_image(KINDS["tree"](FIXED, "rax"), FIXED)
    insns = disassemble(tree.code, FIXED.block_addr)
    inner = next(i for i in insns if i.size == 2 and i.mnemonic.startswith("j"))
    assert BlockRule.EXIT in rules_of(tree, put(tree.code, inner.off + 1, "fe"))  # to itself
    disp = tree.code[inner.off + 1]
    assert BlockRule.EXIT in rules_of(tree, put(tree.code, inner.off + 1, bytes([disp + 1])))


def test_flags_are_the_blocks_own() -> None:
    assert BlockRule.FLAGS in rules_of(ONE, put(ONE.code, 0, "909090909090"))
    # inc destroys what the compare said.
    code = ONE_PIE.code
    swapped = code[:7] + code[13:20] + code[7:13] + code[20:]
    assert {BlockRule.FLAGS, BlockRule.EXIT} <= rules_of(ONE_PIE, swapped)


def test_nothing_runs_on_behind_a_jump() -> None:
    assert BlockRule.SPECULATION in rules_of(ONE, ONE.code[:-1])
    assert BlockRule.SPECULATION in rules_of(ONE, put(ONE.code, 17, "90"))
    assert rules_of(ONE, ONE.code[:-6]) == {BlockRule.FALL_OUT}


def test_prefixes_are_not_ours() -> None:
    # lock inc; gs inc; repne jmp (bnd); ds je
    for prefix, off in (("f0", 13), ("65", 13), ("f2", 20), ("3e", 7)):
        code = ONE_PIE.code[:off] + bytes.fromhex(prefix) + ONE_PIE.code[off:]
        assert BlockRule.UNKNOWN_INSN in rules_of(ONE_PIE, code)


def test_a_head_can_be_redirected() -> None:
    shifted = judge_block(ONE.code, Addr(FIXED.block_addr + 8), scene_of(ONE))
    assert BlockRule.HEAD in {fault.rule for fault in shifted.faults}
    # cmp $1,%rax is four bytes long.
    assert BlockRule.HEAD in rules_of(ONE, bytes.fromhex("4883f801") + ONE.code[6:])
    empty = encode_image(KINDS["empty"](FIXED, "rax"), FIXED)
    assert rules_of(empty) == set()


def test_targets_in_an_arena_and_stale_ones() -> None:
    target = int(FIXED.targets[0])
    scene = scene_of(ONE)
    inside = replace(scene, is_arena=lambda addr: addr == target)
    assert rules_of(ONE, scene=inside) == {BlockRule.ARENA}
    gone = replace(scene, is_code=lambda addr: False)
    verdict = judge_block(ONE.code, FIXED.block_addr, gone)
    assert verdict.faults == ()
    assert set(verdict.stale) == {FIXED.targets[0], FIXED.thunk_addr}


def test_redirections() -> None:
    head, addr = ONE.code[:HEAD_SIZE], FIXED.block_addr
    word = encode_redirect(head, addr, FIXED.other_addr).to_bytes(HEAD_SIZE, "little")
    assert decode_redirect(word, head, addr) == FIXED.other_addr
    assert decode_redirect(head, head, addr) is None
    for off in (0, 5, 6, 7):
        assert decode_redirect(put(word, off, bytes([word[off] ^ 1])), head, addr) is None
    assert decode_redirect(word[:5], head, addr) is None


@pytest.mark.parametrize("kind", KINDS)
def test_what_passes_goes_where_it_should(kind: str) -> None:
    """Change any one byte: either a rule is broken, or no run goes astray."""
    rng = random.Random(kind)
    for _ in range(N_MUTATIONS):
        layout, operand = rng.choice(LAYOUTS), rng.choice(OPERANDS)
        plan = KINDS[kind](layout, operand)
        image = encode_image(plan, layout)
        off = rng.randrange(len(image.code))
        code = put(image.code, off, bytes([rng.randrange(256)]))
        if rules_of(image, code):
            continue
        machine = Machine(image, code)
        for value in rng.sample(interesting_values(plan, layout, rng), 8):
            counters = random_counters(plan, layout, rng)
            before = random_state(rng, operand, value, counters).with_rseq_cs(0)
            machine.enter(before)
            # Undisturbed, or disturbed somewhere.
            for _ in range(rng.choice((0, rng.randrange(40)))):
                if not machine.is_left:
                    machine.step()
            if plan.rows is not None and not machine.is_left:
                machine.return_to_user(rng.choice((0, 3, NO_CPU)))
            machine.step_out()
            after = machine.read_state()
            assert after.pc in (value, layout.thunk_addr), (kind, off, code.hex())
            assert outside_frame(after, plan) == outside_frame(before, plan)
            assert after.rseq_cs == 0
            if after.pc == layout.thunk_addr or plan.base is None:
                assert after.registers == before.registers


# --- operands in memory

FROM_BASE = OperandLoad(code=bytes.fromhex("4c 8b 9b 10 00 00 00"))
"""mov 0x10(%rbx), %r11."""
FROM_DATA = OperandLoad(
    code=bytes.fromhex("4c 8b 1d 00 00 00 00"), data_addr=Addr(0x5555_2000_0000)
)
"""mov disp32(%rip), %r11."""


def loaded(kind: str, load: OperandLoad, layout: Layout = PIE) -> Image:
    """Return a block of some kind that begins with a load."""
    return encode_image(replace(KINDS[kind](layout, "r11"), load=load), layout)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block_that_loads_its_operand_is_sound(kind: str) -> None:
    for load in (FROM_BASE, FROM_DATA):
        assert rules_of(loaded(kind, load)) == set()


def test_what_a_block_loads_is_what_its_site_reads() -> None:
    image = loaded("one-counted", FROM_BASE)
    scene = scene_of(image)
    for other in (
        "4c 8b 9b 18 00 00 00",  # of another place
        "48 8b 8b 10 00 00 00",  # into another register
        "4c 8d 9b 10 00 00 00",  # lea
        "4c 8b 1d 10 00 00 00",  # relative to %rip
    ):
        assert BlockRule.LOAD in rules_of(image, put(image.code, 0, other))
    bare = encode_image(KINDS["one-counted"](PIE, "r11"), PIE)
    assert BlockRule.LOAD in rules_of(bare, scene=scene)
    assert rules_of(image, scene=replace(scene, load=None)) != set()
    relative = loaded("one-counted", FROM_DATA)
    moved = replace(FROM_DATA, data_addr=Addr(0x5555_2000_0008))
    assert rules_of(relative, scene=replace(scene_of(relative), load=moved)) == {BlockRule.LOAD}
    far = replace(FROM_DATA, data_addr=Addr(0x7FFF_2000_0000))
    assert rules_of(relative, scene=replace(scene_of(relative), load=far)) == {BlockRule.LOAD}


def test_a_miss_goes_behind_the_load_of_the_thunk() -> None:
    image = loaded("one", FROM_BASE)
    twice = replace(image.plan, load=None, thunk_addr=image.plan.thunk_addr)
    code = (
        FROM_BASE.code
        + encode_block(
            twice, Addr(PIE.block_addr + FROM_BASE.size), LiteralTable(PIE.literal_addr)
        ).code
    )
    assert len(code) == len(image.code)
    assert rules_of(image, code) == {BlockRule.EXIT}
    # A thunk that does not load is entered at its begin.
    scene = scene_of(image)
    elsewhere = replace(scene, thunk_addrs=frozenset({Addr(PIE.thunk_addr + 1)}))
    assert rules_of(image, scene=elsewhere) == {BlockRule.EXIT}


def outside_frame(state: State, plan: BlockPlan) -> bytes:
    """Return the stack without what is dead of it."""
    off = state.registers[REGISTER_NUMBERS["rsp"]] - STACK_ADDR
    n_dead = 8 if plan.is_below_stack_free else 0
    return state.stack[: off - n_dead] + state.stack[off:]
