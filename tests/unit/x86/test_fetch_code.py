# SPDX-License-Identifier: Apache-2.0
"""The controller's own critical sections are what the kernel accepts, and commit once."""

from __future__ import annotations

import struct

import capstone
import pytest

from optpoline.x86.fetch_code import (
    FREE_PAIRS_OFF,
    SUBTRACT_OFF,
    TAKE_COUNTS_OFF,
    assemble_fetch_code,
)

ADDR = 0x7F12_3456_7000
TEXT_SIZE = 0x100
CODE = assemble_fetch_code(ADDR)


def disassemble(start: int, end: int) -> list[str]:
    """Return the instructions between two addresses, which must end there."""
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    code = CODE[start - ADDR : end - ADDR]
    found = list(engine.disasm(code, start))
    assert sum(insn.size for insn in found) == len(code)
    return [f"{insn.mnemonic} {insn.op_str}".strip() for insn in found]


@pytest.mark.parametrize("number", range(3))
def test_descriptor(number: int) -> None:
    off = TEXT_SIZE + 32 * number
    version, flags, start, size, abort = struct.unpack_from("<IIQQQ", CODE, off)
    assert (version, flags) == (0, 0)
    assert not start <= abort < start + size
    assert ADDR <= start < ADDR + TEXT_SIZE
    assert CODE[abort - ADDR - 4 : abort - ADDR] == bytes.fromhex("53300553")
    # The store of rseq_cs ends where the section begins, and loads this descriptor's address.
    lea, store = disassemble(start - 12, start)
    assert lea == f"lea rax, [rip + {ADDR + off - (start - 5):#x}]"
    assert store == "mov qword ptr fs:[r8 + 8], rax"
    # It checks its CPU first and writes to the row once, last.
    section = disassemble(start, start + size)
    assert section[0] == "cmp dword ptr fs:[r8 + 4], ecx"
    assert section[1].startswith("jne ")
    commits = [insn for insn in section if insn.startswith(("xchg", "mov qword ptr [r11]"))]
    assert commits == section[-1:]


@pytest.mark.parametrize("off", [TAKE_COUNTS_OFF, FREE_PAIRS_OFF, SUBTRACT_OFF])
def test_functions_begin_where_they_should(off: int) -> None:
    assert disassemble(ADDR + off, ADDR + off + 6) == ["xor r10d, r10d", "cmp r10, rdx"]


def test_subtraction_is_locked() -> None:
    code = disassemble(ADDR + SUBTRACT_OFF, ADDR + TEXT_SIZE)
    assert code[4:7] == [
        "mov rax, qword ptr [r11]",
        "and rax, rcx",
        "lock sub qword ptr [r11], rax",
    ]
