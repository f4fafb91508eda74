# SPDX-License-Identifier: Apache-2.0
"""Instruction boundaries and scans, against capstone and plain loops."""

from __future__ import annotations

import random

import capstone
import numpy as np
import pytest

from optpoline.model import Addr
from optpoline.x86.decode import (
    Flow,
    decode_ending_at,
    decode_one,
    decode_range,
    find_boundaries,
    is_redirectable,
    scan_branches,
    scan_call_targets,
    scan_code_pointers,
)

BASE = Addr(0x5555_5555_0000)


def as_array(code: bytes) -> np.ndarray:
    return np.frombuffer(code, dtype=np.uint8)


@pytest.mark.parametrize(
    ("code", "flow", "target"),
    [
        ("e800010000", Flow.CALL, 0x105),
        ("2ee800010000", Flow.CALL, 0x106),
        ("e9fbffffff", Flow.JUMP, 0),
        ("eb10", Flow.JUMP, 0x12),
        ("0f8400010000", Flow.COND_JUMP, 0x106),
        ("2e0f8500010000", Flow.COND_JUMP, 0x107),
        ("ffd0", Flow.INDIRECT_CALL, None),
        ("ff2500000000", Flow.INDIRECT_JUMP, None),
        ("c3", Flow.RETURN, None),
        ("0f0b", Flow.OTHER, None),
        ("4889c8", Flow.NEXT, None),
    ],
)
def test_flow(code: str, flow: Flow, target: int | None) -> None:
    raw = bytes.fromhex(code)
    insn = decode_one(raw + b"\x90" * 4, Addr(BASE))
    assert insn is not None
    assert (insn.addr, insn.end, insn.flow) == (BASE, BASE + len(raw), flow)
    assert insn.target == (None if target is None else BASE + target)


def test_bad_bytes() -> None:
    assert decode_one(b"\x06", Addr(BASE)) is None
    assert decode_one(b"\xe8\x00", Addr(BASE)) is None
    assert next(decode_range(b"\x06\xc3", Addr(BASE))).flow is Flow.OTHER


def test_scan_finds_each_branch_to_a_target_and_nothing_else() -> None:
    rng = random.Random(1)
    code = bytearray(rng.randbytes(5000))
    targets = [BASE + 17, BASE + 4000, BASE - 0x1000]
    opcodes = (b"\xe8", b"\xe9", b"\x0f\x80", b"\x0f\x8f")
    expected = set()
    for start in range(0, 4990, 45):
        opcode = rng.choice(opcodes)
        end = BASE + start + len(opcode) + 4
        disp = (rng.choice(targets) - end).to_bytes(4, "little", signed=True)
        code[start : start + len(opcode) + 4] = opcode + disp
        expected.add(end)
    # The very first and the very last bytes count too.
    code[-5:] = b"\xe8" + (targets[0] - (BASE + 5000)).to_bytes(4, "little", signed=True)
    expected.add(BASE + 5000)
    found = scan_branches(as_array(bytes(code)), BASE, np.array(targets))
    assert set(found.tolist()) == expected
    assert scan_branches(as_array(bytes(code)), BASE, np.array([BASE + 5])).size == 0
    assert scan_branches(as_array(b"\xe8"), BASE, np.array(targets)).size == 0


def test_candidates_inside_instructions_are_rejected() -> None:
    # movabs $imm64, %rax with the bytes of a call in it; call +0
    code = bytes.fromhex("48b8e80000000000c3c3") + bytes.fromhex("e800000000")
    ends = {BASE + 7, BASE + 15}
    assert [insn.end for insn in decode_ending_at(code, BASE, ends)] == [BASE + 15]
    assert decode_ending_at(code, BASE, frozenset()) == []
    assert find_boundaries(code, BASE, {BASE, BASE + 2, BASE + 10, BASE + 99}) == {
        BASE,
        BASE + 10,
    }


def test_boundaries_as_capstone_sees_them() -> None:
    # A function of glibc's kind: prefixes, SIB bytes, VEX, immediates of every size.
    code = bytes.fromhex(
        "f30f1efa 4157 4881ec88000000 64488b042528000000 4889442478 31c0 c5f877 c5fd6f0417"
        "66662e0f1f840000000000 498d7c2408 e800000000 85c0 0f8510000000 c744240c01000000 ebf0 c3"
    )
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    expected = [(insn.address, insn.size) for insn in disassembler.disasm(code, BASE)]
    assert [(insn.addr, insn.size) for insn in decode_range(code, BASE)] == expected
    assert sum(size for _, size in expected) == len(code)


def test_call_targets() -> None:
    code = bytes.fromhex("90e8fbffffff90e9fbffffff")
    assert scan_call_targets(as_array(code), BASE).tolist() == [BASE + 1]


@pytest.mark.parametrize(
    ("code", "pointer"),
    [
        ("488d0510000000", BASE + 0x17),  # lea 0x10(%rip), %rax
        ("4c8d3d10000000", BASE + 0x17),  # lea 0x10(%rip), %r15
        ("488d042578563412", 0x12345678),  # lea 0x12345678, %rax
        ("bf78563412", 0x12345678),  # mov $0x12345678, %edi
        ("41b878563412", 0x12345678),  # mov $0x12345678, %r8d
        ("48c7c078563412", 0x12345678),  # mov $0x12345678, %rax
        ("48c7442408785634 12", 0x12345678),  # movq $0x12345678, 8(%rsp)
        ("48c7050000000078563412", 0x12345678),  # movq $0x12345678, 0(%rip)
        ("48c70078563412", 0x12345678),  # movq $0x12345678, (%rax)
        ("48c780000100007856 3412", 0x12345678),  # movq $0x12345678, 0x100(%rax)
        ("6878563412", 0x12345678),  # push $0x12345678
        ("48b8efcdab9078563412", 0x1234567890ABCDEF),  # movabs
    ],
)
def test_code_pointers(code: str, pointer: int) -> None:
    raw = bytes.fromhex(code)
    # Also as the last instruction of a text.
    for text in (b"\x90" * 20 + raw, b"\x90" * 20 + raw + b"\xc3" * 20):
        start = Addr(BASE - 20)
        assert pointer in scan_code_pointers(as_array(text), start).tolist()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("e800000000", True),
        ("2ee900000000", True),
        ("3e0f8400000000", True),
        ("f2e900000000", True),
        ("66e80000", False),
        ("eb00", False),
        ("7400", False),
        ("ff2500000000", False),
        ("64e800000000", False),
    ],
)
def test_redirectable(code: str, expected: bool) -> None:
    assert is_redirectable(bytes.fromhex(code)) is expected
