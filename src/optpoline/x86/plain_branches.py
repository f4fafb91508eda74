# SPDX-License-Identifier: Apache-2.0
"""Plain indirect branches that are long enough for a direct one.

A compiler plugin fills them up with prefixes of no effect, which are part of the
instruction; so a direct branch fits in their place, and no boundary moves::

    2e 2e 2e ff d0          cs cs cs call *%rax         e8 rel32            call block
    2e 2e 41 ff e0          cs cs jmp *%r8              e9 rel32            jmp block
    2e 2e ff 53 10          cs cs call *0x10(%rbx)      e8 rel32            call block
    2e ff 15 disp32         cs call *disp32(%rip)       2e 2e e8 rel32      cs cs call block

What such a branch did is done by a thunk, for the way that no guard takes: one jump, or,
where the target is in memory, a load and a jump. It is as safe as the branch was, and no safer.
"""

from __future__ import annotations

from dataclasses import dataclass

from optpoline.model import Addr, OperandLoad
from optpoline.x86.assembler import (
    CALL32_OPCODE,
    INT3,
    JMP32_OPCODE,
    JMP32_SIZE,
    REGISTER_NUMBERS,
    BlockCode,
)
from optpoline.x86.memory_operands import MemoryOperand, decode_memory_operand, encode_load

__all__ = [
    "PlainBranch",
    "decode_plain_branch",
    "encode_plain_thunk",
    "find_register",
]

_CS_PREFIX = b"\x2e"
_HARMLESS_PREFIXES = b"\x2e\x3e"
"""cs and ds (notrack as well): what may stand before a direct branch, too. Linux puts no uprobe on
an instruction that has one (``is_prefix_bad`` in arch/x86/kernel/uprobes.c). That is needed: it
keeps the first byte as the *file* has it, and would put that back over an opcode of ours."""

_REX, _REX_MASK = 0x40, 0xF0
_REX_B = 1
_GROUP5 = 0xFF
"""Opcode of call, jmp and others; which of them says the middle of its ModRM byte."""
_CALL, _JMP = 2, 4
_REGISTER_FORM = 0xC0
"""ModRM byte of the form without memory; the low three bits are the register."""
_DISP_SIZE = 4
_STACK_POINTER = "rsp"

_NAMES = {number: name for name, number in REGISTER_NUMBERS.items() if name != _STACK_POINTER}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainBranch:
    """An indirect branch that a direct one may take the place of.

    Attributes:
        operand: The register that holds the target; None if it is in memory.
        memory: Where in memory the target is, or None.
        is_call: Whether it is a call, not a jump.
        opcode_size: Bytes before the last four in which the direct branch differs from it.
    """

    operand: str | None
    is_call: bool
    memory: MemoryOperand | None = None
    opcode_size: int = 1

    @property
    def direct_opcode(self) -> bytes:
        """What a direct branch in its place has in those bytes: prefixes, and the opcode."""
        opcode = CALL32_OPCODE if self.is_call else JMP32_OPCODE
        return _CS_PREFIX * (self.opcode_size - 1) + opcode

    def find_operand(self, dead: str | None, end: Addr) -> tuple[str, OperandLoad | None] | None:
        """Return the register in which blocks find its target, and what loads it there.

        Args:
            dead: A register that is dead there; None if none is known.
            end: Address after the branch.

        Returns:
            None if its target is in memory, and cannot be loaded.
        """
        if self.operand is not None:
            return self.operand, None
        if self.memory is None or dead is None:
            return None
        load = self.memory.load(dead, end, is_pushed=self.is_call)
        return None if load is None else (dead, load)


def decode_plain_branch(code: bytes) -> PlainBranch | None:
    """Decode an instruction that a direct branch can take the place of.

    Args:
        code: All of the instruction, prefixes included.

    Returns:
        What it is; None if it is anything else, too short, or begins with no harmless prefix.

    >>> decode_plain_branch(bytes.fromhex("2e2e41ffe0")).operand
    'r8'
    >>> decode_plain_branch(bytes.fromhex("2eff1500000000")).direct_opcode.hex(" ")
    '2e e8'
    >>> decode_plain_branch(bytes.fromhex("ffd0")) is None
    True
    """
    body = code.lstrip(_HARMLESS_PREFIXES)
    n_prefixes = len(code) - len(body)
    if len(code) < JMP32_SIZE or not n_prefixes:
        return None
    found = _decode_register(body)
    memory: MemoryOperand | None = None
    if found is None:
        in_memory = decode_memory_operand(body, _GROUP5)
        if in_memory is None:
            return None
        middle, memory = in_memory
        operand: str | None = None
    else:
        middle, operand = found
    if middle not in (_CALL, _JMP):
        return None
    n_kept = min(n_prefixes, len(code) - JMP32_SIZE)
    return PlainBranch(
        operand=operand,
        memory=memory,
        is_call=middle == _CALL,
        opcode_size=len(code) - _DISP_SIZE - n_kept,
    )


def _decode_register(body: bytes) -> tuple[int, str] | None:
    """Return the middle of the ModRM byte, and the register, of an instruction through one."""
    extension = 0
    if len(body) == 3 and body[0] & _REX_MASK == _REX:
        extension, body = body[0] & _REX_B, body[1:]
    if len(body) != 2 or body[0] != _GROUP5 or body[1] < _REGISTER_FORM:
        return None
    operand = _NAMES.get(extension << 3 | body[1] & 7)
    return None if operand is None else (body[1] >> 3 & 7, operand)


def encode_plain_thunk(operand: str, load: OperandLoad | None = None, addr: int = 0) -> BlockCode:
    """Return code that jumps where the operand points, and lets nothing run on behind it.

    Args:
        operand: Register that holds the target, or that it is loaded into first.
        load: What loads it, or None.
        addr: Where the code will be; needed for a load only.

    Raises:
        EncodeRangeError: if what is to be loaded is out of reach.

    >>> encode_plain_thunk("r8").code.hex(" ")
    '41 ff e0 cc'
    """
    number = REGISTER_NUMBERS[operand]
    rex = bytes((_REX | _REX_B,)) if number > 7 else b""
    # jmp *%reg     FF /4
    jump = rex + bytes((_GROUP5, _REGISTER_FORM | _JMP << 3 | number & 7, INT3))
    code = jump if load is None else encode_load(load, addr) + jump
    return BlockCode(code=code, text_size=len(code))


def find_register(name: str) -> str | None:
    """Return the register that a compiler means by a name, without size or with; None if none.

    >>> find_register("r11"), find_register("ax"), find_register("xmm0"), find_register("sp")
    ('r11', 'rax', None, None)
    """
    full = name if name in REGISTER_NUMBERS else f"r{name}"
    return full if full in REGISTER_NUMBERS and full != _STACK_POINTER else None
