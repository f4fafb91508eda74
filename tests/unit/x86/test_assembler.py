# SPDX-License-Identifier: Apache-2.0
"""The instructions of the assembler, its labels and the widths of its branches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpoline.errors import EncodeRangeError
from optpoline.model import Addr
from optpoline.x86.assembler import (
    INT3,
    JMP32_SIZE,
    LINE_SIZE,
    REGISTER_NUMBERS,
    Assembler,
    Condition,
    encode_disp32,
    encode_jmp32,
)
from tests.emulate.disassemble import disassemble

ADDR = Addr(0x1000_0000)
DATA_ADDR = 0x1000_8000


def assemble_text(asm: Assembler) -> list[str]:
    """Return the instructions of a block as text."""
    return [f"{insn.mnemonic} {insn.text}".rstrip() for insn in disassemble(asm.finish(), ADDR)]


@pytest.mark.parametrize("register", REGISTER_NUMBERS)
@pytest.mark.parametrize("value", [0, 1, 0x7F, 0x80, 0x401000, (1 << 31) - 1])
def test_cmp_imm32(register: str, value: int) -> None:
    asm = Assembler(ADDR)
    asm.cmp_imm32(register, value)
    shown = hex(value) if value > 9 else str(value)
    assert assemble_text(asm) == [f"cmpq ${shown}, %{register}"]


@pytest.mark.parametrize("value", [1 << 31, 1 << 63, -(1 << 31) - 1])
def test_cmp_imm32_refuses_what_does_not_fit(value: int) -> None:
    with pytest.raises(OverflowError):
        Assembler(ADDR).cmp_imm32("rcx", value)


@pytest.mark.parametrize("register", REGISTER_NUMBERS)
@pytest.mark.parametrize("value", [0, 1, 0x80, 0x401000, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
def test_cmp_low32(register: str, value: int) -> None:
    asm = Assembler(ADDR)
    asm.cmp_low32(register, value)
    code = asm.finish()
    (insn,) = disassemble(code, ADDR)
    low_half = register + "d" if register[1:].isdigit() else "e" + register[1:]
    assert (insn.mnemonic, insn.writes) == ("cmpl", ())
    assert insn.text.endswith(f", %{low_half}")
    assert code[-4:] == value.to_bytes(4, "little")
    # Long enough to be a head, with the int3 of its jump.
    assert insn.size > JMP32_SIZE


@pytest.mark.parametrize("value", [1 << 32, 1 << 63, -1])
@pytest.mark.parametrize("register", ["rax", "r9"])
def test_cmp_low32_refuses_what_does_not_fit(register: str, value: int) -> None:
    with pytest.raises(OverflowError):
        Assembler(ADDR).cmp_low32(register, value)


@pytest.mark.parametrize("register", REGISTER_NUMBERS)
def test_memory_operands(register: str) -> None:
    asm = Assembler(ADDR)
    asm.cmp_mem(register, DATA_ADDR)
    asm.mov_to_mem(DATA_ADDR, register)
    asm.cmp_mem_zero(DATA_ADDR)
    asm.inc_mem(DATA_ADDR)
    insns = disassemble(asm.finish(), ADDR)
    assert [insn.memory_addr for insn in insns] == [DATA_ADDR] * 4
    assert [insn.mnemonic for insn in insns] == ["cmpq", "movq", "cmpq", "incq"]
    assert insns[0].text.endswith(f"(%rip), %{register}")
    assert insns[1].text.startswith(f"%{register}, ")
    assert insns[2].text.startswith("$0, ")
    # All are long enough to be a head, with the int3 of its jump.
    assert min(insn.size for insn in insns) > 5


@given(st.integers(-(1 << 34), 1 << 34))
def test_disp32_reaches_two_gib(delta: int) -> None:
    src_end = 1 << 40
    if -(1 << 31) <= delta < 1 << 31:
        disp = encode_disp32(src_end, src_end + delta)
        assert int.from_bytes(disp, "little", signed=True) == delta
    else:
        with pytest.raises(EncodeRangeError) as caught:
            encode_disp32(src_end, src_end + delta)
        assert (caught.value.src_addr, caught.value.dst_addr) == (src_end, src_end + delta)


def test_jmp32_counts_from_its_end() -> None:
    (insn,) = disassemble(encode_jmp32(0x2000, 0x1000), 0x2000)
    assert (insn.mnemonic, insn.branch_addr, insn.size) == ("jmp", 0x1000, 5)


@pytest.mark.parametrize("condition", Condition)
def test_branches_out_are_long_and_jumps_have_int3(condition: Condition) -> None:
    asm = Assembler(ADDR)
    asm.branch(condition, ADDR + 16)
    asm.jump(ADDR + 16)
    names = {
        "ABOVE": "ja",
        "ABOVE_EQUAL": "jae",
        "BELOW": "jb",
        "EQUAL": "je",
        "NOT_EQUAL": "jne",
    }
    assert assemble_text(asm) == [
        f"{names[condition.name]} {ADDR + 16:#x}",
        f"jmp {ADDR + 16:#x}",
        "int3",
    ]


@pytest.mark.parametrize("n_insns", [0, 1, 17, 18, 19, 40])
@pytest.mark.parametrize("is_jump", [True, False])
def test_inner_branch_takes_the_short_form_where_it_reaches(n_insns: int, is_jump: bool) -> None:
    asm = Assembler(ADDR)
    label = asm.label()
    if is_jump:
        asm.jump_label(label)
    else:
        asm.branch_label(Condition.EQUAL, label)
    for _ in range(n_insns):
        asm.inc_mem(DATA_ADDR)
    asm.inc_mem(DATA_ADDR)
    asm.bind(label)
    asm.jump(ADDR)
    insns = disassemble(asm.finish(), ADDR)
    skipped = 7 * (n_insns + 1) + is_jump  # with the int3 of a jump
    size = 2 if skipped <= 127 else 5 if is_jump else 6
    assert insns[0].size == size
    assert insns[0].branch_addr == ADDR + size + skipped


def test_one_widened_branch_pushes_another_out_of_reach() -> None:
    # The inner branch goes over 126 bytes until the outer one, inside it, grows.
    asm = Assembler(ADDR)
    outer, inner = asm.label(), asm.label()
    asm.branch_label(Condition.EQUAL, outer)
    asm.branch_label(Condition.BELOW, inner)
    for _ in range(17):
        asm.inc_mem(DATA_ADDR)  # 119 bytes, 121 for the outer branch
    asm.bind(outer)
    asm.branch(Condition.EQUAL, ADDR)  # 125 for the inner branch
    asm.branch_label(Condition.EQUAL, inner)  # 127: still short
    asm.bind(inner)
    asm.jump(ADDR)
    assert [insn.size for insn in disassemble(asm.finish(), ADDR)][:2] == [2, 2]

    asm = Assembler(ADDR)
    outer, inner = asm.label(), asm.label()
    asm.branch_label(Condition.EQUAL, outer)
    asm.branch_label(Condition.BELOW, inner)
    for _ in range(18):
        asm.inc_mem(DATA_ADDR)  # 126 bytes; 128 for the outer branch
    asm.bind(inner)
    asm.bind(outer)
    asm.jump(ADDR)
    insns = disassemble(asm.finish(), ADDR)
    assert [insn.size for insn in insns][:2] == [6, 2]
    assert insns[0].branch_addr == insns[1].branch_addr == ADDR + 8 + 126


@pytest.mark.parametrize("n_before", [0, 1, 2, 7, 8, 9])
@pytest.mark.parametrize("n_inside", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("begin", [0, 16, 48])
def test_a_run_lies_in_one_line_if_it_fits(n_before: int, n_inside: int, begin: int) -> None:
    addr = Addr(ADDR + begin)
    assert addr % LINE_SIZE == begin
    asm = Assembler(addr)
    start, end = asm.label(), asm.label()
    asm.branch_label(Condition.EQUAL, start)
    for _ in range(n_before):
        asm.inc_mem(DATA_ADDR)
    asm.jump(ADDR)
    asm.keep_in_line(end)
    asm.bind(start)
    for _ in range(n_inside):
        asm.inc_mem(DATA_ADDR)
    asm.jump(ADDR)
    asm.bind(end)
    run_size = 7 * n_inside + 6
    code = asm.finish()
    start_off = len(code) - run_size
    plain_off = 2 + 7 * n_before + 6
    lines = {(begin + off) // LINE_SIZE for off in (start_off, len(code) - 1)}
    plain_lines = {(begin + off) // LINE_SIZE for off in (plain_off, plain_off + run_size - 1)}
    if run_size > LINE_SIZE or len(plain_lines) == 1:
        assert start_off == plain_off
    else:
        assert len(lines) == 1
        assert (begin + start_off) % LINE_SIZE == 0
    assert set(code[plain_off:start_off]) <= {INT3}
    assert disassemble(code, addr)[0].branch_addr == addr + start_off


def test_runs_inside_of_a_run_and_behind_it() -> None:
    # The outer run does not fit a line: the inner does, behind 6 + 56 bytes, and moves.
    asm = Assembler(ADDR)
    outer, inner = asm.label(), asm.label()
    asm.jump(ADDR)
    asm.keep_in_line(outer)
    for _ in range(8):
        asm.inc_mem(DATA_ADDR)
    asm.keep_in_line(inner)
    asm.inc_mem(DATA_ADDR)
    asm.bind(inner)
    asm.inc_mem(DATA_ADDR)
    asm.bind(outer)
    asm.jump(ADDR)
    insns = [insn for insn in disassemble(asm.finish(), ADDR) if insn.mnemonic != "int3"]
    assert [insn.off for insn in insns] == [0, *range(6, 62, 7), *range(LINE_SIZE, 79, 7)]


def test_a_jump_to_what_follows_is_dropped() -> None:
    asm = Assembler(ADDR)
    label = asm.label()
    asm.jump_label(label)
    asm.bind(asm.label())
    asm.bind(label)
    asm.jump(ADDR)
    assert [insn.mnemonic for insn in disassemble(asm.finish(), ADDR)] == ["jmp", "int3"]


def test_labels_bound_one_behind_the_other_are_one_place() -> None:
    asm = Assembler(ADDR)
    one, other = asm.label(), asm.label()
    asm.branch_label(Condition.EQUAL, one)
    asm.branch_label(Condition.BELOW, other)
    asm.jump_label(other)
    asm.bind(one)
    asm.bind(other)
    asm.jump(ADDR)
    insns = disassemble(asm.finish(), ADDR)
    last_jump_addr = ADDR + insns[-2].off
    assert insns[0].branch_addr == insns[1].branch_addr == last_jump_addr
    assert asm.finish()[-1] == INT3


def test_finish_can_be_called_twice() -> None:
    asm = Assembler(ADDR)
    label = asm.label()
    asm.branch_label(Condition.EQUAL, label)
    for _ in range(30):
        asm.inc_mem(DATA_ADDR)
    asm.bind(label)
    asm.jump(ADDR)
    assert asm.finish() == asm.finish()


def test_data_out_of_reach() -> None:
    asm = Assembler(ADDR)
    asm.inc_mem(ADDR + (1 << 32))
    with pytest.raises(EncodeRangeError):
        asm.finish()
