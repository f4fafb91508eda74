# SPDX-License-Identifier: Apache-2.0
"""Bytes of blocks: golden files, and rules that hold for every kind of block.

``OPTPOLINE_UPDATE_GOLDEN=1`` writes the golden files anew; read the difference.
"""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from optpoline.errors import EncodeRangeError
from optpoline.model import Addr, BlockPlan, Guard, Miss, Split, TreeNode, tree_targets
from optpoline.x86.assembler import JMP32_SIZE, REGISTER_NUMBERS
from optpoline.x86.blocks import (
    BLOCK_ALIGNMENT,
    HEAD_SIZE,
    LINE_SIZE,
    POISON,
    encode_block,
    encode_redirect,
    fits_immediate,
    place_block,
)
from tests.emulate.block_kinds import (
    KINDS,
    LAYOUTS,
    OPERANDS,
    Image,
    Layout,
    LiteralTable,
    encode_image,
)
from tests.emulate.disassemble import Insn, disassemble

GOLDEN = Path(__file__).parents[2] / "golden" / "blocks"
UPDATE = "OPTPOLINE_UPDATE_GOLDEN" in os.environ

BORDER = next(layout for layout in LAYOUTS if layout.name == "border")

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
each_kind = pytest.mark.parametrize("kind", KINDS)


def name_addr(image: Image, addr: int) -> str:
    """Return a name for an address that a block branches or points to."""
    layout = image.layout
    if addr == layout.thunk_addr:
        return "thunk"
    if addr in layout.targets:
        return f"target {layout.targets.index(Addr(addr))}"
    for value, literal_addr in image.literals.values.items():
        if addr == literal_addr:
            return f"literal {value:#x}"
    if layout.counter_addr <= addr < layout.counter_addr + 4096:
        return f"counter {(addr - layout.counter_addr) // 8}"
    off = addr - layout.block_addr
    return f"+{off:#x}" if 0 <= off < len(image.code) else "signature"


def listing(image: Image) -> str:
    """Return a block as offset, bytes, instruction and what it refers to."""
    lines: list[str] = []
    for insn in disassemble(image.text, image.layout.block_addr):
        code = image.code[insn.off : insn.off + insn.size].hex(" ")
        line = f"{insn.off:04x}  {code:32}  {insn.mnemonic} {insn.text}".rstrip()
        addr = insn.branch_addr if insn.branch_addr is not None else insn.memory_addr
        if addr is not None:
            line = f"{line:80}  ; {name_addr(image, addr)}"
        lines.append(line)
    return "\n".join((*lines, *list_records(image))) + "\n"


def list_records(image: Image) -> list[str]:
    """Return the descriptors behind a block's code, as offsets in it."""
    start = -(-len(image.text) // 32) * 32 if len(image.code) > len(image.text) else 0
    assert set(image.code[len(image.text) : start]) <= {POISON}
    lines: list[str] = []
    for off in range(start, len(image.code), 32) if start else ():
        version, flags, first, size, abort = struct.unpack_from("<IIQQQ", image.code, off)
        assert version == flags == 0
        first, abort = first - image.layout.block_addr, abort - image.layout.block_addr
        lines.append(f"{off:04x}  sequence +{first:#x} to +{first + size:#x}, abort +{abort:#x}")
    return lines


def check_golden(name: str, text: str) -> None:
    """Compare text with a golden file."""
    path = GOLDEN / f"{name}.txt"
    if UPDATE:
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=lambda layout: layout.name)
@each_kind
def test_golden_kind(kind: str, layout: Layout) -> None:
    operand = "rax" if layout.name == "fixed" else "r11"
    image = encode_image(KINDS[kind](layout, operand), layout)
    check_golden(f"{kind}-{layout.name}-{operand}", listing(image))


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=lambda layout: layout.name)
def test_golden_registers(layout: Layout) -> None:
    # One guard and one open slot: each instruction that names the operand.
    parts: list[str] = []
    for operand in OPERANDS:
        for kind in ("learn-known", "learn-known-segment", "traced"):
            plan = KINDS[kind](layout, operand)
            tree = Guard(layout.targets[1 if kind == "traced" else 0], None, Miss())
            plan = replace(plan, tree=tree, open_slots=plan.open_slots[:1])
            parts.append(f"{operand} {kind}\n{listing(encode_image(plan, layout))}")
    check_golden(f"registers-{layout.name}", "\n".join(parts))


def test_no_golden_file_is_left_over() -> None:
    names = {f"{kind}-fixed-rax.txt" for kind in KINDS} | {f"{kind}-pie-r11.txt" for kind in KINDS}
    names |= {"registers-fixed.txt", "registers-pie.txt"}
    assert {path.name for path in GOLDEN.iterdir()} == names


PROMOTED = tuple(kind for kind in KINDS if KINDS[kind](LAYOUTS[0], "rdx").rows is None)
each_promoted = pytest.mark.parametrize("kind", PROMOTED)
BRANCHES = ("je", "jne", "jb", "ja", "jae")


@each_layout
@each_kind
def test_rules_of_every_block(kind: str, layout: Layout) -> None:
    for operand in OPERANDS:
        image = encode_image(KINDS[kind](layout, operand), layout)
        insns = disassemble(image.text, layout.block_addr)
        check_branches(insns, image)
        if image.plan.rows is None:
            check_promoted(insns, image)
        else:
            check_learning(insns, image)


def check_branches(insns: list[Insn], image: Image) -> None:
    """Check what must hold for the branches of any block."""
    plan, layout = image.plan, image.layout
    starts = {insn.off for insn in insns}
    targets = set(tree_targets(plan.tree)) - plan.thunk_targets
    for insn, following in pairwise(insns):
        if insn.mnemonic == "jmp":
            assert following.mnemonic == "int3"
        elif insn.mnemonic in BRANCHES:
            assert following.mnemonic != "int3"
        if following.mnemonic in BRANCHES and following.branch_addr in targets:
            # Whether it is a target is decided by all 64 bits.
            assert (insn.mnemonic, following.mnemonic) == ("cmpq", "je")
        if following.mnemonic == "ja":
            # Equal operands have left by then.
            assert insn.mnemonic in ("je", "jne")
    assert insns[-1].mnemonic == "int3"
    for insn in insns:
        assert not insn.is_indirect
        if insn.branch_addr is not None:
            off = insn.branch_addr - layout.block_addr
            is_out = insn.branch_addr in targets | {plan.thunk_addr}
            # Forward only: a block cannot loop.
            assert is_out or (off in starts and off > insn.off)
    assert {insn.branch_addr for insn in insns} & targets == targets


def check_promoted(insns: list[Insn], image: Image) -> None:
    """Check what must hold for the bytes of a promoted block."""
    plan, layout = image.plan, image.layout
    literals = set(image.literals.values.values())
    assert image.text == image.code
    assert {insn.mnemonic for insn in insns} <= {
        *("cmpl", "cmpq", "incq", *BRANCHES, "jmp", "int3"),
        *(("subq", "addq") if plan.base is not None else ()),
    }
    if plan.base is not None:
        check_base(insns, image)
    for insn, following in pairwise(insns):
        if following.mnemonic in ("je", "jne"):
            assert insn.mnemonic == "cmpq"
        if insn.mnemonic == "cmpl":
            # Half an operand chooses a way inside the block, no more.
            assert insn.memory_addr is None
            assert following.mnemonic in ("jb", "jae")
            assert following.branch_addr is not None
            assert 0 < following.branch_addr - layout.block_addr < len(image.code)
    for insn in insns:
        assert insn.writes == () or insn.mnemonic in ("subq", "addq")
        match insn.mnemonic:
            case "incq":
                assert insn.memory_addr == plan.miss_count_addr
            case "cmpq":
                assert insn.memory_addr is None or insn.memory_addr in literals
    needed = needed_literals(plan.tree) if plan.base is None else {plan.base}
    assert set(image.literals.values) == needed


def check_learning(insns: list[Insn], image: Image) -> None:
    """Check what memory a learning block names, and what it writes."""
    plan, layout = image.plan, image.layout
    assert plan.rows is not None
    literals = set(image.literals.values.values())
    assert plan.miss_count_addr is not None
    counts = {addr for _, addr in plan.hit_count_addrs} | {plan.miss_count_addr}
    counts |= {slot.count_addr for slot in plan.open_slots}
    slots = {slot.target_addr for slot in plan.open_slots}
    slots.add(Addr(plan.miss_count_addr - 8))
    scratch = "rcx" if plan.operand == "rax" else "rax"
    for insn in insns:
        written = set(insn.writes) - {plan.operand}
        assert written <= ({scratch} if plan.is_below_stack_free else set())
        match insn.mnemonic:
            case "lock incq":
                assert insn.memory_addr is None or insn.memory_addr in counts
            case "lock btsq":
                assert insn.memory_addr in counts
            case "incq":
                # In a row of a CPU, never in the shared one.
                assert insn.memory_addr is None
                assert "%r" in insn.text
            case "movq":
                assert insn.memory_addr is None or insn.memory_addr in slots | literals
            case "cmpq":
                assert insn.memory_addr is None or insn.memory_addr in slots | literals
            case "lock xaddq":
                assert plan.trace is not None
                assert insn.memory_addr == plan.trace.head_addr
        if "%fs" in insn.text:
            assert plan.rows.rseq is not None
    ends = {insn.branch_addr for insn in insns if insn.mnemonic == "jmp"}
    assert ends >= set(tree_targets(plan.tree)) - plan.thunk_targets - {
        insn.branch_addr for insn in insns if insn.mnemonic == "je"
    }
    assert layout.thunk_addr in ends


def check_base(insns: list[Insn], image: Image) -> None:
    """Check that the operand is changed first, and put right on the one way to the thunk."""
    plan = image.plan
    assert plan.base is not None
    assert [insn.mnemonic for insn in insns].count("subq") == 1
    assert insns[0].mnemonic == "subq"
    (again,) = [i for i, insn in enumerate(insns) if insn.mnemonic == "addq"]
    for insn in (insns[0], insns[again]):
        assert insn.writes == (plan.operand,)
        assert insn.memory_addr == image.literals.values[plan.base]
    # Whatever goes to the thunk, or looks at the operand in a slot, comes by there.
    thunk_jumps = [i for i, insn in enumerate(insns) if insn.branch_addr == plan.thunk_addr]
    assert thunk_jumps
    assert all(i > again for i in thunk_jumps)
    assert all(insn.mnemonic != "movq" for insn in insns[:again])
    for insn in insns[:again]:
        off = (insn.branch_addr or 0) - image.layout.block_addr
        assert not insns[again].off < off < len(image.code)


def keys_of(tree: TreeNode) -> set[int]:
    """Return every address that a tree names."""
    match tree:
        case Guard(target, below, otherwise, _):
            return {target} | keys_of(otherwise) | (keys_of(below) if below else set())
        case Split(key, below, above, _):
            return {key} | keys_of(below) | keys_of(above)
        case Miss():
            return set()


def needed_literals(tree: TreeNode) -> set[int]:
    """Return the addresses that must be compared whole and fit no immediate."""
    match tree:
        case Guard(target, below, otherwise, _):
            needed = needed_literals(otherwise) | (needed_literals(below) if below else set())
            return needed if fits_immediate(target) else needed | {target}
        case Split(key, below, above, _):
            needed = needed_literals(below) | needed_literals(above)
            n_halves = len({named >> 32 for named in keys_of(tree)})
            return needed if fits_immediate(key) or n_halves == 1 else needed | {key}
        case Miss():
            return set()


def split_at(layout: Layout, low: int, high: int, *, falls_below: bool = False) -> BlockPlan:
    """Return a plan that splits two targets, one guard on either side."""
    t = layout.targets
    tree = Split(t[high], Guard(t[low], None, Miss()), Guard(t[high], None, Miss()), falls_below)
    return BlockPlan(operand="rbx", tree=tree, thunk_addr=layout.thunk_addr)


@each_layout
@each_kind
def test_counters_decide_no_branch_to_a_target(kind: str, layout: Layout) -> None:
    # What follows a compare with a counter cell stays inside the block.
    plan = KINDS[kind](layout, "rdx")
    image = encode_image(plan, layout)
    slots = {slot.target_addr for slot in plan.open_slots}
    for insn, following in pairwise(disassemble(image.text, layout.block_addr)):
        is_slot = insn.memory_addr in slots or ("(%r" in insn.text and "(%rip" not in insn.text)
        if insn.mnemonic.startswith("cmp") and is_slot:
            assert following.mnemonic in ("je", "jne")
            assert following.branch_addr is not None
            assert 0 < following.branch_addr - layout.block_addr < len(image.text)


@each_layout
@each_kind
def test_head_can_be_redirected(kind: str, layout: Layout) -> None:
    for operand in OPERANDS:
        check_head(encode_image(KINDS[kind](layout, operand), layout), layout)


def check_head(image: Image, layout: Layout) -> None:
    """Check what one 8-byte store may do to the head of a block."""
    addr, other = layout.block_addr, layout.other_addr
    insns = disassemble(image.text, addr)
    boundaries = [insn.off for insn in insns if 0 < insn.off < HEAD_SIZE]
    assert insns[0].size >= JMP32_SIZE
    assert all(off >= JMP32_SIZE for off in boundaries)

    head = image.code.ljust(HEAD_SIZE, bytes((POISON,)))[:HEAD_SIZE]
    new = encode_redirect(head, addr, other).to_bytes(HEAD_SIZE, "little")
    jump, stop = disassemble(new[: JMP32_SIZE + 1], addr)
    assert (jump.mnemonic, jump.branch_addr) == ("jmp", other)
    # No straight-line speculation past the jump into half an instruction.
    assert stop.mnemonic == "int3"
    # Byte 5 can change only where no thread can be about to execute it.
    assert JMP32_SIZE not in boundaries or head[JMP32_SIZE] == POISON
    assert new[JMP32_SIZE + 1 :] == head[JMP32_SIZE + 1 :]


def test_redirect_out_of_reach() -> None:
    head = bytes(8)
    with pytest.raises(EncodeRangeError) as caught:
        encode_redirect(head, Addr(0x1000), Addr(0x1005 + (1 << 31)))
    assert caught.value.dst_addr == 0x1005 + (1 << 31)
    encode_redirect(head, Addr(0x1000), Addr(0x1005 + (1 << 31) - 1))


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        (0, True),
        ((1 << 31) - 1, True),
        (1 << 31, False),
        ((1 << 32) - 1, False),
        ((1 << 64) - 1, False),
    ],
)
def test_fits_immediate(value: int, fits: bool) -> None:
    assert fits_immediate(value) is fits


@each_layout
def test_compares_with_all_64_bits_of_rsp_too(layout: Layout) -> None:
    # No thunk takes its target in rsp; the encoder does not depend on that.
    assert "rsp" in REGISTER_NUMBERS
    image = encode_image(KINDS["mixed"](layout, "rsp"), layout)
    insns = disassemble(image.code, layout.block_addr)
    whole = [insn for insn in insns if insn.mnemonic == "cmpq"]
    assert whole
    assert all(insn.text.endswith(("%rsp", "(%rip)")) for insn in whole)
    assert all(insn.text.endswith("%esp") for insn in insns if insn.mnemonic == "cmpl")


@pytest.mark.parametrize("operand", ["eax", "rip", "xmm0", "", "r16"])
def test_unknown_operand(operand: str) -> None:
    with pytest.raises(KeyError):
        encode_image(KINDS["one"](LAYOUTS[0], operand), LAYOUTS[0])


def far_plan(
    *, target: int = 0x40_0000, thunk: int = 0x40_1000, miss: int | None = None
) -> BlockPlan:
    """Return a plan with one address to be put out of reach."""
    return BlockPlan(
        operand="rax",
        tree=Guard(Addr(target), None, Miss()),
        thunk_addr=Addr(thunk),
        miss_count_addr=None if miss is None else Addr(miss),
    )


@pytest.mark.parametrize(
    "plan",
    [
        far_plan(target=0x7F00_0000_0000),
        far_plan(thunk=0x7F00_0000_0000),
        far_plan(miss=0x7F00_0000_0000),
        far_plan(target=(1 << 64) - 1),
    ],
)
def test_out_of_reach_is_an_error_never_an_indirect_branch(plan: BlockPlan) -> None:
    with pytest.raises(EncodeRangeError):
        encode_block(plan, Addr(0x1000_0000), LiteralTable(Addr(0x1100_0000)))


def test_literal_out_of_reach() -> None:
    target = Addr(0x5555_5555_0000)
    with pytest.raises(EncodeRangeError):
        encode_block(
            far_plan(target=target, thunk=target + 64),
            Addr(target - 4096),
            LiteralTable(Addr(0x1000)),
        )


def test_a_literal_is_shared_between_nodes() -> None:
    # The split compares whole, for its keys lie on both sides of a multiple of 4 GiB.
    layout = BORDER
    image = encode_image(split_at(layout, 7, 8), layout)
    assert disassemble(image.code, layout.block_addr)[0].mnemonic == "cmpq"
    assert list(image.literals.values) == [layout.targets[8], layout.targets[7]]


@pytest.mark.parametrize("falls_below", [False, True])
@pytest.mark.parametrize(
    ("layout", "low", "high", "expected"),
    [
        (LAYOUTS[0], 0, 1, "cmpq"),  # an immediate holds all of it
        (LAYOUTS[1], 0, 1, "cmpl"),
        (BORDER, 0, 7, "cmpl"),  # high half 0, but no immediate holds it
        (BORDER, 7, 8, "cmpq"),
        (BORDER, 0, 15, "cmpq"),
        (BORDER, 8, 15, "cmpl"),
    ],
)
def test_split_compares_half_only_where_all_keys_agree_on_the_other(
    layout: Layout, low: int, high: int, expected: str, falls_below: bool
) -> None:
    image = encode_image(split_at(layout, low, high, falls_below=falls_below), layout)
    assert disassemble(image.code, layout.block_addr)[0].mnemonic == expected


def test_split_looks_at_the_keys_far_below_it() -> None:
    # Its own key and both children agree; a grandchild does not.
    t = BORDER.targets
    inner = Guard(t[3], None, Guard(t[9], None, Miss()))
    tree = Split(t[5], inner, Guard(t[5], None, Miss()))
    plan = BlockPlan(operand="rbx", tree=tree, thunk_addr=BORDER.thunk_addr)
    assert disassemble(encode_image(plan, BORDER).code, BORDER.block_addr)[0].mnemonic == "cmpq"


@each_layout
@pytest.mark.parametrize("falls_below", [False, True])
def test_the_way_that_falls_through_takes_no_branch(layout: Layout, falls_below: bool) -> None:
    t = layout.targets
    low, high = Guard(t[0], None, Miss()), Guard(t[15], None, Miss())
    split, guard = Split(t[8], low, high, falls_below), Guard(t[8], low, high, falls_below)
    for tree, jump in (
        (split, "jae" if falls_below else "jb"),
        (guard, "ja" if falls_below else "jb"),
    ):
        plan = BlockPlan(operand="rbx", tree=tree, thunk_addr=layout.thunk_addr)
        insns = disassemble(encode_image(plan, layout).code, layout.block_addr)
        inner = [insn for insn in insns if insn.mnemonic in ("jb", "ja", "jae")]
        assert [insn.mnemonic for insn in inner] == [jump]
        hits = [insn.branch_addr for insn in insns if insn.mnemonic == "je"]
        # Code follows in the order of the ways: first the one without a branch.
        assert hits[-2:] == ([t[0], t[15]] if falls_below else [t[15], t[0]])


@pytest.mark.parametrize("size", [1, 16, 17, 26, 48, 49, 63, 64, 65, 100, 128, 4096])
def test_place_of_a_block(size: int) -> None:
    for addr in range(0x1000, 0x1000 + 2 * LINE_SIZE):
        place = place_block(addr, size)
        assert addr <= place < addr + LINE_SIZE
        assert place % BLOCK_ALIGNMENT == 0
        assert place_block(place, size) == place
        # No more lines than it must touch; and no good place was passed over.
        n_lines = (place + size - 1) // LINE_SIZE - place // LINE_SIZE + 1
        assert n_lines == -(-size // LINE_SIZE)
        for earlier in range(-(-addr // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT, place, 16):
            assert earlier % LINE_SIZE + size > LINE_SIZE


@each_layout
@each_kind
def test_place_changes_no_instruction(kind: str, layout: Layout) -> None:
    plan = KINDS[kind](layout, "rcx")
    literals = LiteralTable(layout.literal_addr)
    here = encode_block(plan, layout.block_addr, literals)
    before = without_padding(here.code[: here.text_size], layout.block_addr)
    for off in range(BLOCK_ALIGNMENT, 2 * LINE_SIZE, BLOCK_ALIGNMENT):
        addr = Addr(layout.block_addr + off)
        there = encode_block(plan, addr, literals)
        insns = without_padding(there.code[: there.text_size], addr)
        if off % LINE_SIZE == 0 or is_chain(plan.tree):
            assert there.text_size == here.text_size
            assert [insn.off for insn in insns] == [insn.off for insn in before]
            # Records are aligned: there may be 16 bytes of padding more, or less.
            assert len(there.code) - len(here.code) in (-16, 0, 16)
            assert off % 32 or len(there.code) == len(here.code)
        for a, b in zip(before, insns, strict=True):
            assert a.mnemonic == b.mnemonic
            if a.memory_addr != b.memory_addr:
                # What moves with the block: descriptors, and the signature's operand.
                assert a.mnemonic in ("leaq", "ud1l")


def without_padding(text: bytes, addr: Addr) -> list[Insn]:
    """Return a block's instructions but for those that only fill a line."""
    insns = disassemble(text, addr)
    return insns[:1] + [
        insn for before, insn in pairwise(insns) if not before.mnemonic == insn.mnemonic == "int3"
    ]


def is_chain(tree: TreeNode) -> bool:
    """Tell whether a tree has no halves."""
    while isinstance(tree, Guard) and tree.below is None:
        tree = tree.otherwise
    return isinstance(tree, Miss)


def test_size_of_a_whole_dispatch_site() -> None:
    # 128 guards in binary order: every inner branch finds its width.
    layout = LAYOUTS[1]
    targets = tuple(Addr(layout.targets[0] + 64 * i) for i in range(128))

    def balanced(low: int, high: int) -> Guard | Miss:
        if low == high:
            return Miss()
        middle = (low + high) // 2
        return Guard(targets[middle], balanced(low, middle), balanced(middle + 1, high))

    plan = BlockPlan(operand="rdi", tree=balanced(0, 128), thunk_addr=layout.thunk_addr)
    image = encode_image(plan, layout)
    insns = disassemble(image.code, layout.block_addr)
    assert {insn.branch_addr for insn in insns if insn.mnemonic == "je"} == set(targets)
    assert len(image.code) < 128 * 24
    assert layout.block_addr % BLOCK_ALIGNMENT == 0
