# SPDX-License-Identifier: Apache-2.0
"""A register is dead exactly where every part of it is written before it is read."""

from __future__ import annotations

import pytest

from optpoline.model import Addr
from optpoline.x86.liveness import WHOLE_REGISTER, RegisterFate, run_register

CASES = [
    ("31c0", "rax", RegisterFate.DEAD),  # xor eax, eax
    ("4889d8", "rax", RegisterFate.DEAD),  # mov rax, rbx
    ("8b03", "rax", RegisterFate.DEAD),  # mov eax, [rbx]
    ("4889c3", "rax", RegisterFate.LIVE),  # mov rbx, rax
    ("8b00", "rax", RegisterFate.LIVE),  # mov eax, [rax]: read as an address first
    ("488d04c5000000004889c3", "rax", RegisterFate.LIVE),  # lea rax, [rax*8]
    ("b00131c0", "rax", RegisterFate.DEAD),  # mov al, 1; xor eax, eax
    ("b001 0fb6d8 31c0", "rax", RegisterFate.DEAD),  # mov al; movzx ebx, al; xor eax, eax
    ("b001 0fb7d8", "rax", RegisterFate.LIVE),  # mov al; movzx ebx, ax
    ("b401 0fb6d8", "rax", RegisterFate.LIVE),  # mov ah; movzx ebx, al
    ("66b80100 6689c3 31c0", "rax", RegisterFate.DEAD),  # mov ax; mov bx, ax; xor eax, eax
    ("480f44c3", "rax", RegisterFate.LIVE),  # cmove rax, rbx
    ("e8fb000000", "rax", RegisterFate.BRANCH),  # call: followed (gcc -fipa-ra)
    ("e8fb000000", "rbx", RegisterFate.BRANCH),
    ("ffd3", "rax", RegisterFate.LIVE),  # call rbx
    ("ffd0", "rax", RegisterFate.LIVE),  # call rax
    ("c3", "rax", RegisterFate.LIVE),  # ret: a result
    ("ffe3", "rax", RegisterFate.LIVE),  # jmp rbx
    ("ff2500000000", "rax", RegisterFate.LIVE),  # jmp [rip]: a tail call
    ("ff2500000000", "rsi", RegisterFate.LIVE),
    ("0f05", "rax", RegisterFate.LIVE),  # syscall
    ("0f0b", "rax", RegisterFate.LIVE),  # ud2
    ("cc", "rax", RegisterFate.LIVE),  # int3
    ("4150 415b", "r8", RegisterFate.LIVE),  # push r8; pop r11
    ("4150 415b", "r11", RegisterFate.DEAD),
    ("f348ab", "rax", RegisterFate.LIVE),  # rep stosq
    ("48f7e3", "rax", RegisterFate.LIVE),  # mul rbx
    ("0fa2", "rax", RegisterFate.LIVE),  # cpuid
    ("90", "rax", RegisterFate.LIVE),  # the end
]


@pytest.mark.parametrize(("code", "register", "fate"), CASES)
def test_fate(code: str, register: str, fate: RegisterFate) -> None:
    assert run_register(bytes.fromhex(code), Addr(0x1000), register).fate is fate


def test_branches_are_left_to_the_caller() -> None:
    # mov al, 1; je +4
    run = run_register(bytes.fromhex("b0017404"), Addr(0x1000), "rax")
    assert run.fate is RegisterFate.BRANCH
    assert run.successors == (0x1008, 0x1004)
    assert 0 < run.pending < WHOLE_REGISTER
    # What was written before the branch is not asked for again: movzx ebx, al; xor eax, eax
    code = bytes.fromhex("0fb6d831c0")
    assert run_register(code, Addr(0x1008), "rax").fate is RegisterFate.LIVE
    assert run_register(code, Addr(0x1008), "rax", run.pending).fate is RegisterFate.DEAD
