# SPDX-License-Identifier: Apache-2.0
"""Register sets: field order against the kernel's header, and what is derived."""

from __future__ import annotations

import struct

import pytest

from optpoline.x86.registers import REGISTERS_SIZE, Registers, decode_registers

# struct user_regs_struct, arch/x86/include/asm/user_64.h
KERNEL_ORDER = [
    "r15",
    "r14",
    "r13",
    "r12",
    "rbp",
    "rbx",
    "r11",
    "r10",
    "r9",
    "r8",
    "rax",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "orig_rax",
    "rip",
    "cs",
    "eflags",
    "rsp",
    "ss",
    "fs_base",
    "gs_base",
    "ds",
    "es",
    "fs",
    "gs",
]

NUMBERED = struct.pack("<27Q", *range(27))


def test_field_order() -> None:
    assert list(Registers._fields) == KERNEL_ORDER
    regs = decode_registers(NUMBERED)
    assert (regs.rax, regs.orig_rax, regs.rip, regs.rsp) == (10, 15, 16, 19)
    assert regs.encode() == NUMBERED
    assert len(NUMBERED) == REGISTERS_SIZE


def test_wrong_size() -> None:
    with pytest.raises(struct.error):
        decode_registers(NUMBERED[:-1])


@pytest.mark.parametrize("result", [0, 5, -1, -514, -(1 << 63), (1 << 63) - 1])
def test_result_is_signed(result: int) -> None:
    assert decode_registers(NUMBERED).with_result(result).result == result


def test_call() -> None:
    regs = decode_registers(NUMBERED)
    assert regs.in_syscall
    call = regs.with_call(insn_addr=0x1000, sp=0x2000, nr=9, args=(1, 2, 3, 4, -1))
    assert (call.rdi, call.rsi, call.rdx, call.r10) == (1, 2, 3, 4)
    assert (call.r8, call.r9) == (2**64 - 1, 0)
    assert (call.rax, call.rip, call.rsp) == (9, 0x1000, 0x2000)
    assert not call.in_syscall
    assert (call.rbx, call.rbp, call.eflags) == (regs.rbx, regs.rbp, regs.eflags)


def test_call_with_too_many_arguments() -> None:
    with pytest.raises(ValueError, match="at most six"):
        decode_registers(NUMBERED).with_call(insn_addr=0, sp=0, nr=0, args=(0,) * 7)


@pytest.mark.parametrize(
    ("orig_rax", "rax", "expected"),
    [(435, 0, True), (56, 0, True), (435, 1234, False), (1, 0, False), ((1 << 64) - 1, 0, False)],
)
def test_newborn(orig_rax: int, rax: int, expected: bool) -> None:
    regs = decode_registers(bytes(REGISTERS_SIZE))._replace(orig_rax=orig_rax, rax=rax)
    assert regs.is_newborn is expected
