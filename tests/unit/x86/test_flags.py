# SPDX-License-Identifier: Apache-2.0
"""Flags along straight-line code, one instruction kind at a time."""

from __future__ import annotations

import pytest
from unicorn import x86_const as x86
from unicorn.unicorn import Uc
from unicorn.unicorn_const import UC_ARCH_X86, UC_MODE_64

from optpoline.model import Addr
from optpoline.x86.flags import ARITHMETIC_FLAGS, FlagsFate, run_flags

BASE = Addr(0x401000)


def test_the_mask_holds_six_flags() -> None:
    assert ARITHMETIC_FLAGS.bit_count() == 6


@pytest.mark.parametrize(
    ("code", "fate"),
    [
        ("31c0", FlagsFate.DEAD),  # xor eax, eax
        ("83f801", FlagsFate.DEAD),  # cmp eax, 1
        ("4889c8 85c0", FlagsFate.DEAD),  # mov; test
        ("c3", FlagsFate.DEAD),  # ret
        ("e800000000", FlagsFate.DEAD),  # call
        ("ffd0", FlagsFate.DEAD),  # call rax
        ("0f0b", FlagsFate.DEAD),  # ud2
        ("ff2500000000", FlagsFate.DEAD),  # jmp [rip]: a tail call
        ("ffe0", FlagsFate.LIVE),  # jmp rax: nobody knows where
        ("ff24c500000000", FlagsFate.LIVE),  # jmp [rax*8]
        ("0f92c0", FlagsFate.LIVE),  # setb al
        ("0f44c1", FlagsFate.LIVE),  # cmove eax, ecx
        ("7200", FlagsFate.LIVE),  # jb
        ("83d000", FlagsFate.LIVE),  # adc
        ("9c", FlagsFate.LIVE),  # pushfq
        ("9f", FlagsFate.LIVE),  # lahf
        ("f5", FlagsFate.LIVE),  # cmc
        ("0f05", FlagsFate.LIVE),  # syscall: r11 gets them
        ("cc", FlagsFate.LIVE),  # int3
        ("06", FlagsFate.LIVE),  # no instruction
        ("90", FlagsFate.LIVE),  # the text ends
        ("ffc0 9c", FlagsFate.LIVE),  # inc leaves CF
        ("ffc0 0f94c0 31c0", FlagsFate.DEAD),  # inc; sete reads ZF, which inc wrote
        ("ffc0 7200", FlagsFate.LIVE),  # inc; jb
        ("d3e0 0f94c0", FlagsFate.LIVE),  # shl eax, cl; sete
        ("0fa5c8 0f94c0", FlagsFate.LIVE),  # shld eax, ecx, cl; sete
        ("c1e000 0f94c0", FlagsFate.LIVE),  # shl eax, 0; sete
        ("c1e003 0f94c0", FlagsFate.DEAD),  # shl eax, 3 writes all but leaves AF undefined
        ("f3a6 0f94c0", FlagsFate.LIVE),  # repe cmpsb may compare nothing
        ("9d", FlagsFate.DEAD),  # popfq
    ],
)
def test_fates(code: str, fate: FlagsFate) -> None:
    assert run_flags(bytes.fromhex(code), BASE).fate is fate


def test_branches_are_left_to_the_caller() -> None:
    run = run_flags(bytes.fromhex("eb10"), BASE)
    assert (run.fate, run.pending, run.successors) == (
        FlagsFate.BRANCH,
        ARITHMETIC_FLAGS,
        (BASE + 0x12,),
    )
    # inc; jne: CF alone is left
    run = run_flags(bytes.fromhex("ffc07510"), BASE)
    assert run.fate is FlagsFate.BRANCH
    assert run.pending.bit_count() == 1
    assert run.successors == (BASE + 0x14, BASE + 4)
    # jrcxz reads no flag
    assert run_flags(bytes.fromhex("e310"), BASE).pending == ARITHMETIC_FLAGS


@pytest.mark.parametrize(
    "code",
    ["31c0", "85c0", "83f801", "4801c8", "48f7d8", "c1e003", "0fafc1", "48ffc0 83f800", "21c8"],
)
def test_dead_means_that_no_flag_survives(code: str) -> None:
    """Run dead code from both extremes of the flags and compare what is defined after it."""
    raw = bytes.fromhex(code)
    assert run_flags(raw, BASE).fate is FlagsFate.DEAD
    results = []
    for flags in (0x202, 0x202 | 0x8D5):
        machine = Uc(UC_ARCH_X86, UC_MODE_64)
        machine.mem_map(BASE, 0x1000)
        machine.mem_write(BASE, raw)
        machine.reg_write(x86.UC_X86_REG_EFLAGS, flags)
        machine.reg_write(x86.UC_X86_REG_RAX, 5)
        machine.reg_write(x86.UC_X86_REG_RCX, 3)
        machine.emu_start(BASE, BASE + len(raw))
        results.append(machine.reg_read(x86.UC_X86_REG_EFLAGS))
    assert results[0] == results[1]
