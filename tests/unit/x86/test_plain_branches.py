# SPDX-License-Identifier: Apache-2.0
"""Plain branches are known by their bytes, and their thunks do what they did."""

from __future__ import annotations

import capstone
import pytest
from unicorn import UC_ARCH_X86, UC_MODE_64, x86_const
from unicorn.unicorn import Uc

from optpoline.x86.assembler import REGISTER_NUMBERS
from optpoline.x86.plain_branches import PlainBranch, decode_plain_branch, encode_plain_thunk

OPERANDS = sorted(set(REGISTER_NUMBERS) - {"rsp"})
CODE_ADDR, TARGET = 0x10_0000, 0x7654_3210_0000


def read_with_capstone(code: bytes) -> list[tuple[str, str]]:
    """Return mnemonic and operand of each instruction."""
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    return [(insn.mnemonic, insn.op_str) for insn in decoder.disasm(code, 0)]


@pytest.mark.parametrize("prefixes", ["2e2e2e", "2e2e3e", "3e3e3e", "2e2e2e2e"])
def test_what_a_disassembler_says(prefixes: str) -> None:
    seen: set[str] = set()
    for rex in (b"", b"\x40", b"\x41", b"\x48", b"\x4f"):
        for modrm in range(256):
            code = bytes.fromhex(prefixes)[len(rex) :] + rex + bytes((0xFF, modrm))
            insns = read_with_capstone(code)
            found = decode_plain_branch(code)
            if len(insns) != 1 or len(code) < 5:
                assert found is None, code.hex(" ")
                continue
            mnemonic, operand = insns[0][0].split()[-1], insns[0][1]
            if mnemonic in ("call", "jmp") and operand in OPERANDS:
                assert found == PlainBranch(operand=operand, is_call=mnemonic == "call")
                direct = read_with_capstone(found.direct_opcode + bytes(4))
                assert [name for name, _ in direct] == [mnemonic]
                seen.add(operand)
            elif mnemonic in ("call", "jmp") and operand.startswith("qword ptr "):
                assert found is not None, code.hex(" ")
                assert (found.operand, found.is_call) == (None, mnemonic == "call")
                assert found.memory is not None
            else:
                assert found is None, code.hex(" ")
    assert seen == set(OPERANDS)


@pytest.mark.parametrize(
    "code",
    ["ff d0", "2e 2e ff d0", "f2 f2 f2 ff d0", "2e 2e f2 ff d0", "66 2e 2e ff d0",
     "2e ff 53 10 90", "2e ff 53 10", "ff 15 00 00 00 00", "2e 67 ff 53 10", "2e 2e 2e ff 18",
     "64 2e 2e ff 53 10", "2e 64 64 ff 53 10", "2e 2e 2e ff 50", "2e 2e 2e ff 14",
     "2e 2e 2e ff d4", "41 2e 2e ff d0", "e8 00 00 00 00", "2e 2e 2e ff d0 90"],
)  # fmt: skip
def test_what_is_none(code: str) -> None:
    assert decode_plain_branch(bytes.fromhex(code)) is None


@pytest.mark.parametrize(
    ("code", "direct"),
    [
        ("2e 2e 2e ff d0", "e8"),
        ("2e 2e ff 53 10", "e8"),
        ("2e 41 ff 53 10", "e8"),
        ("2e ff 54 24 78", "e8"),
        ("2e 41 ff 54 24 78", "e8"),
        ("2e ff 15 00 00 00 00", "2e e8"),
        ("3e 42 ff 24 ed 00 00 00 00", "2e 2e 2e e9"),
        ("2e 64 ff 14 25 00 00 00 00", "2e 2e 2e e8"),
    ],
)
def test_a_direct_branch_of_its_length(code: str, direct: str) -> None:
    site = bytes.fromhex(code)
    branch = decode_plain_branch(site)
    assert branch is not None
    assert branch.direct_opcode == bytes.fromhex(direct)
    written = site[: -4 - branch.opcode_size] + branch.direct_opcode + b"\x01\x02\x03\x04"
    assert len(written) == len(site)
    assert written[:1] == site[:1] or len(site) == 5
    insns = read_with_capstone(written)
    assert [name.split()[-1] for name, _ in insns] == ["call" if branch.is_call else "jmp"]


@pytest.mark.parametrize("operand", OPERANDS)
def test_thunk_goes_where_the_register_points(operand: str) -> None:
    thunk = encode_plain_thunk(operand)
    assert read_with_capstone(thunk.code) == [("jmp", operand), ("int3", "")]
    assert thunk.text_size == len(thunk.code)
    machine = Uc(UC_ARCH_X86, UC_MODE_64)
    machine.mem_map(CODE_ADDR, 4096)
    machine.mem_map(TARGET, 4096)
    machine.mem_write(CODE_ADDR, thunk.code)
    numbers = {name: getattr(x86_const, f"UC_X86_REG_{name.upper()}") for name in REGISTER_NUMBERS}
    before = {name: 0x1000 + number for name, number in REGISTER_NUMBERS.items()}
    before[operand] = TARGET
    for name, value in before.items():
        machine.reg_write(numbers[name], value)
    machine.emu_start(CODE_ADDR, TARGET, count=1)
    assert machine.reg_read(x86_const.UC_X86_REG_RIP) == TARGET
    assert {name: machine.reg_read(number) for name, number in numbers.items()} == before
