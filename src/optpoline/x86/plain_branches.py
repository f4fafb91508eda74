# SPDX-License-Identifier: Apache-2.0
"""Plain indirect branches through a register that are as long as a direct one.

A compiler plugin fills them up with prefixes of no effect, which are part of the
instruction; so a direct branch fits in their place, and no boundary moves::

    2e 2e 2e ff d0    cs cs cs call *%rax       e8 rel32    call block
    2e 2e 41 ff e0    cs cs jmp *%r8            e9 rel32    jmp block

What such a branch did is done by a thunk of one jump, for the way that no guard takes.
It is as safe as the branch was, and no safer.

Non-goal: operands in memory, for which a block would need a register.
"""

from __future__ import annotations

from dataclasses import dataclass

from optpoline.x86.assembler import (
    CALL32_OPCODE,
    INT3,
    JMP32_OPCODE,
    JMP32_SIZE,
    REGISTER_NUMBERS,
    BlockCode,
)

__all__ = ["PlainBranch", "decode_plain_branch", "encode_plain_thunk"]

_HARMLESS_PREFIXES = b"\x2e\x3e"
"""cs and ds (notrack as well): what may stand before a direct branch, too. Linux puts no uprobe on
an instruction that has one (``is_prefix_bad`` in arch/x86/kernel/uprobes.c). That is needed: it
keeps the first byte as the *file* has it, and would put that back over an opcode of ours."""

_REX, _REX_MASK = 0x40, 0xF0
_REX_B = 1
_GROUP5 = 0xFF
"""Opcode of call, jmp and others; which of them says the middle of its ModRM byte."""
_CALL, _JMP = 0xD0, 0xE0
"""ModRM bytes of ``call *%rax`` and ``jmp *%rax``; the low three bits are the register."""
_STACK_POINTER = "rsp"

_NAMES = {number: name for name, number in REGISTER_NUMBERS.items() if name != _STACK_POINTER}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainBranch:
    """An indirect branch through a register.

    Attributes:
        operand: The register.
        is_call: Whether it is a call, not a jump.
    """

    operand: str
    is_call: bool

    @property
    def direct_opcode(self) -> bytes:
        """The opcode of the direct branch that may stand in its place."""
        return CALL32_OPCODE if self.is_call else JMP32_OPCODE


def decode_plain_branch(code: bytes) -> PlainBranch | None:
    """Decode an instruction that a direct branch can take the place of.

    Args:
        code: All of the instruction, prefixes included.

    Returns:
        What it is; None if it is anything else, too short, or goes through memory.

    >>> decode_plain_branch(bytes.fromhex("2e2e41ffe0"))
    PlainBranch(operand='r8', is_call=False)
    >>> decode_plain_branch(bytes.fromhex("ffd0")) is None
    True
    """
    if len(code) < JMP32_SIZE:
        return None
    body = code.lstrip(_HARMLESS_PREFIXES)
    extension = 0
    if len(body) == 3 and body[0] & _REX_MASK == _REX:
        extension = body[0] & _REX_B
        body = body[1:]
    if len(body) != 2 or body[0] != _GROUP5:
        return None
    opcode, low = body[1] & 0xF8, body[1] & 7
    operand = _NAMES.get(extension << 3 | low)
    if opcode not in (_CALL, _JMP) or operand is None:
        return None
    return PlainBranch(operand=operand, is_call=opcode == _CALL)


def encode_plain_thunk(operand: str) -> BlockCode:
    """Return code that jumps where a register points, and lets nothing run on behind it.

    >>> encode_plain_thunk("r8").code.hex(" ")
    '41 ff e0 cc'
    """
    number = REGISTER_NUMBERS[operand]
    rex = bytes((_REX | _REX_B,)) if number > 7 else b""
    # jmp *%reg     FF /4
    code = rex + bytes((_GROUP5, _JMP | number & 7, INT3))
    return BlockCode(code=code, text_size=len(code))
