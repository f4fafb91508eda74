# SPDX-License-Identifier: Apache-2.0
"""Loads read what the branches read that they are made of, by another disassembler."""

from __future__ import annotations

import random
import re

import capstone
import pytest

from optpoline.errors import EncodeRangeError
from optpoline.model import Addr, OperandLoad
from optpoline.x86.assembler import JMP32_SIZE, REGISTER_NUMBERS
from optpoline.x86.memory_operands import decode_memory_operand, encode_load

SITE, BLOCK = 0x5555_5555_5000, 0x5555_1000_0040
MIDDLES = {2: "call", 4: "jmp"}
REGISTERS = sorted(set(REGISTER_NUMBERS) - {"rsp"})


def read_one(code: bytes, addr: int) -> tuple[str, str] | None:
    """Return mnemonic and operands of an instruction, rip-relative ones by their address."""
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    insns = list(decoder.disasm(code, addr))
    if len(insns) != 1 or insns[0].size != len(code):
        return None
    said = re.search(r"\[rip ([+-]) (0x[0-9a-f]+|\d+)\]", insns[0].op_str)
    if said is None:
        return insns[0].mnemonic, re.sub(r" \+ 0\]", "]", insns[0].op_str)
    off = int(said[2], 0) * (1 if said[1] == "+" else -1)
    place = f"[{addr + len(code) + off:#x}]"
    return insns[0].mnemonic, insns[0].op_str.replace(said[0], place)


def bodies(rng: random.Random) -> list[bytes]:
    """Return branches of every form of operand."""
    found: list[bytes] = []
    for rex in (b"", b"\x40", b"\x41", b"\x42", b"\x43", b"\x4f"):
        for modrm in range(256):
            for _ in range(3):
                segment = rng.choice((b"", b"", b"\x64", b"\x65"))
                size = rng.randrange(7)
                rest = bytes(rng.choice((rng.randrange(256), 0x24, 0x05)) for _ in range(size))
                found.append(segment + rex + bytes((0xFF, modrm)) + rest)
    return found


def test_every_form() -> None:
    rng = random.Random(1)
    seen: set[tuple[bool, bool, bool]] = set()
    for body in bodies(rng):
        said = read_one(body, SITE)
        decoded = decode_memory_operand(body, 0xFF)
        is_one = (
            said is not None and said[0] in MIDDLES.values() and said[1].startswith("qword ptr")
        )
        if decoded is None or decoded[0] not in MIDDLES:
            assert not is_one, body.hex(" ")
            continue
        assert said is not None, body.hex(" ")
        middle, operand = decoded
        assert MIDDLES[middle] == said[0]
        register = rng.choice(REGISTERS)
        load = operand.load(register, Addr(SITE + len(body)), is_pushed=False)
        if load is None:
            continue
        code = encode_load(load, BLOCK)
        assert JMP32_SIZE + 2 <= len(code) <= JMP32_SIZE + 4
        assert read_one(code, BLOCK) == ("mov", f"{register}, {said[1]}"), body.hex(" ")
        seen.add((operand.is_relative, operand.is_on_stack, bool(operand.segment)))
    assert len(seen) >= 5


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ("ff 14 24", "[rsp + 8]"),
        ("ff 54 24 7c", "[rsp + 0x84]"),
        ("ff 94 24 00 01 00 00", "[rsp + 0x108]"),
        ("ff 54 24 f0", "[rsp - 8]"),
        ("ff 14 cc", "[rsp + rcx*8 + 8]"),
        ("42 ff 14 e4", "[rsp + r12*8 + 8]"),
        ("ff 54 cc 10", "[rsp + rcx*8 + 0x18]"),
        ("41 ff 54 24 10", "[r12 + 0x10]"),
        ("ff 55 f8", "[rbp - 8]"),
    ],
)
def test_behind_the_return_address(body: str, place: str) -> None:
    decoded = decode_memory_operand(bytes.fromhex(body), 0xFF)
    assert decoded is not None
    load = decoded[1].load("r11", Addr(0), is_pushed=True)
    assert load is not None
    assert read_one(load.code, 0) == ("mov", f"r11, qword ptr {place}")


@pytest.mark.parametrize(
    "body",
    [
        *("ff 54 24 f8", "ff 54 24 f1", "ff 54 24 ff"),
        # call *-8(%rsp,%rcx,8) ; *-0x80(%rsp,%rcx,8) ; *-0x100(%rsp,%r12,8)
        *("ff 54 cc f8", "ff 54 cc 80", "42 ff 94 e4 00 ff ff ff"),
    ],
)
def test_what_the_push_writes_over_is_not_loaded(body: str) -> None:
    decoded = decode_memory_operand(bytes.fromhex(body), 0xFF)
    assert decoded is not None
    assert decoded[1].load("r11", Addr(0), is_pushed=True) is None
    assert decoded[1].load("r11", Addr(0), is_pushed=False) is not None


def test_out_of_reach() -> None:
    # mov disp32(%rip), %r11
    load = OperandLoad(code=bytes.fromhex("4c 8b 1d 00 00 00 00"), data_addr=Addr(SITE))
    with pytest.raises(EncodeRangeError):
        encode_load(load, SITE + (1 << 32))
