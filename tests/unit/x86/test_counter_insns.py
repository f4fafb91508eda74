# SPDX-License-Identifier: Apache-2.0
"""The instructions of learning blocks, for every register, as two disassemblers read them."""

from __future__ import annotations

import pytest

from optpoline.model import Addr
from optpoline.x86.assembler import INT3, RECORD_ALIGNMENT, REGISTER_NUMBERS
from optpoline.x86.counter_insns import CounterAssembler
from tests.emulate.disassemble import disassemble

ADDR = Addr(0x1000_0010)
DATA_ADDR = 0x1000_8000

each_register = pytest.mark.parametrize("register", REGISTER_NUMBERS)


def low_half(register: str) -> str:
    """Return the name of a register's low half."""
    return register + "d" if register[1:].isdigit() else "e" + register[1:]


def assemble_text(asm: CounterAssembler) -> list[str]:
    """Return the instructions of a block as text."""
    return [f"{insn.mnemonic} {insn.text}".rstrip() for insn in disassemble(asm.finish(), ADDR)]


@each_register
def test_registers(register: str) -> None:
    asm = CounterAssembler(ADDR)
    asm.mov_low32(register, 0x7B)
    asm.and_low32(register, 0xFFF)
    asm.lsl_low32(register)
    asm.shl(register, 20)
    asm.add_imm32(register, -16)
    asm.add_imm32(register, 0x7FFF_FFFF)
    low = low_half(register)
    assert assemble_text(asm) == [
        f"movl $0x7b, %{low}",
        f"andl $0xfff, %{low}",
        f"lsll %{low}, %{low}",
        f"shlq $0x14, %{register}",
        f"addq $-0x10, %{register}",
        f"addq $0x7fffffff, %{register}",
    ]


@each_register
@pytest.mark.parametrize("other", ["rax", "r9"])
def test_memory_through_a_register(register: str, other: str) -> None:
    asm = CounterAssembler(ADDR)
    asm.cmp_at(register, 0x1234, other)
    asm.cmp_at_zero(register, 0x1234)
    asm.mov_to(register, -8, other)
    asm.mov_from(other, register, -8)
    asm.mov_imm32_to(register, 0x1234, 0x8000_0001)
    asm.inc_at(register, 0x7FFF_FFFF)
    asm.lock_inc_at(register, 0x1234)
    assert assemble_text(asm) == [
        f"cmpq 0x1234(%{register}), %{other}",
        f"cmpq $0, 0x1234(%{register})",
        f"movq %{other}, -8(%{register})",
        f"movq -8(%{register}), %{other}",
        f"movl $0x80000001, 0x1234(%{register})",
        f"incq 0x7fffffff(%{register})",
        f"lock incq 0x1234(%{register})",
    ]
    # The store is long enough to be a head, with the int3 of its jump.
    asm = CounterAssembler(ADDR)
    asm.mov_to(register, -8, other)
    assert len(asm.finish()) >= 7


@each_register
def test_memory_at_an_address(register: str) -> None:
    asm = CounterAssembler(ADDR)
    asm.lea(register, DATA_ADDR)
    asm.mov_from_literal(register, DATA_ADDR)
    asm.lock_inc_mem(DATA_ADDR)
    asm.lock_bts_mem(DATA_ADDR, 63)
    asm.lock_xadd_mem(DATA_ADDR, register)
    insns = disassemble(asm.finish(), ADDR)
    assert [insn.memory_addr for insn in insns] == [DATA_ADDR] * 5
    names = ["leaq", "movq", "lock incq", "lock btsq", "lock xaddq"]
    assert [insn.mnemonic for insn in insns] == names
    assert insns[3].text.startswith("$0x3f, ")
    assert [insn.writes for insn in insns] == [(register,), (register,), (), (), (register,)]


@each_register
def test_the_threads_own_memory(register: str) -> None:
    asm = CounterAssembler(ADDR)
    asm.mov_to_thread(-0x158, register)
    asm.mov_low32_from_thread(register, 0x20)
    asm.mov_zero_to_thread(-0x158)
    assert assemble_text(asm) == [
        f"movq %{register}, %fs:{(1 << 64) - 0x158:#x}",
        f"movl %fs:0x20, %{low_half(register)}",
        f"movq $0, %fs:{(1 << 64) - 0x158:#x}",
    ]


def test_a_signature_is_the_end_of_an_undefined_instruction() -> None:
    asm = CounterAssembler(ADDR)
    asm.signature(0x5305_3053)
    assert asm.finish() == bytes.fromhex("0fb93d53300553")
    (insn,) = disassemble(asm.finish(), ADDR)
    assert (insn.mnemonic, insn.writes) == ("ud1l", ())


def test_records_are_aligned_and_know_labels() -> None:
    asm = CounterAssembler(ADDR)
    start, end = asm.label(), asm.label()
    one = asm.record(0, start, (start, end), 7)
    other = asm.record(1, 2, 3, end)
    asm.lea("rax", one)
    asm.bind(start)
    asm.lea("rcx", other)
    asm.bind(end)
    block = asm.finish_block()
    assert block.text_size == 14
    insns = disassemble(block.code[: block.text_size], ADDR)
    first, second = (insn.memory_addr or 0 for insn in insns)
    assert first % RECORD_ALIGNMENT == 0
    assert second == first + 32
    padding = block.code[14 : first - ADDR]
    assert set(padding) == {INT3}
    words = [
        int.from_bytes(block.code[off : off + 8], "little")
        for off in range(first - ADDR, len(block.code), 8)
    ]
    assert words == [0, ADDR + 7, 7, 7, 1, 2, 3, ADDR + 14]


@pytest.mark.parametrize("value", [1 << 31, -(1 << 31) - 1])
def test_offsets_that_fit_no_displacement(value: int) -> None:
    asm = CounterAssembler(ADDR)
    with pytest.raises(OverflowError):
        asm.inc_at("rax", value)
    with pytest.raises(OverflowError):
        asm.add_imm32("rax", value)
    with pytest.raises(OverflowError):
        asm.mov_zero_to_thread(value)
