# SPDX-License-Identifier: Apache-2.0
"""Operands in memory of indirect branches, and the loads that blocks begin with instead.

A guard compares with a register, so the block of a branch through memory first does what
the branch does first: it reads the operand, once, into a register that is dead there::

    2e 2e ff 53 10              cs cs call *0x10(%rbx)      the site
    4c 8b 9b 10 00 00 00        mov 0x10(%rbx), %r11        what its blocks begin with

The load has the branch's address form, with these differences:

* The displacement has 32 bits wherever the form has a base, so a load is 7 to 9 bytes long.
  A block's head must be longer than the jump that may take its place.
* At a call the block is entered with the return address pushed: what is relative to ``%rsp``
  lies 8 bytes further up.
* What is relative to ``%rip`` is named by its address, and encoded where the load will be.

``%fs`` and ``%gs`` stay as they are; the other segments are ignored in 64-bit mode.
"""

from __future__ import annotations

from dataclasses import dataclass

from optpoline.model import Addr, OperandLoad
from optpoline.x86.assembler import DISP32_SIZE, REGISTER_NUMBERS, encode_disp32

__all__ = ["MemoryOperand", "decode_memory_operand", "encode_load"]

_SEGMENTS = (b"\x64", b"\x65")
"""Prefixes fs and gs."""
_REX, _REX_MASK, _REX_W, _REX_X, _REX_B = 0x40, 0xF0, 0x48, 2, 1
_REX_ADDRESS = 3
"""REX.X and REX.B: high bits of index and base."""
_MOV_LOAD = 0x8B
_REGISTER_FORM = 3
"""Of ModRM.mod: no memory."""
_DISP_SIZES = (0, 1, 4)
"""Bytes of displacement by ModRM.mod."""
_DISP32_FORM = 2
_HAS_SIB = 4
"""In ModRM.rm; in SIB.index: no index."""
_NO_BASE = 5
"""In ModRM.rm (then %rip) or SIB.base, where ModRM.mod is 0."""
_STACK_POINTER = REGISTER_NUMBERS["rsp"]
_WORD_SIZE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOperand:
    """Where in memory an instruction finds its operand.

    Attributes:
        segment: Its segment prefix, fs or gs, or nothing.
        rex: REX.X and REX.B.
        rm: ModRM.rm.
        sib: The SIB byte, or nothing.
        has_base: Whether a register that is not ``%rip`` is added to the displacement.
        disp: The displacement.
    """

    segment: bytes
    rex: int
    rm: int
    sib: bytes
    has_base: bool
    disp: int

    @property
    def is_relative(self) -> bool:
        """Whether it is relative to ``%rip``."""
        return not self.has_base and not self.sib

    @property
    def is_on_stack(self) -> bool:
        """Whether it is relative to ``%rsp``."""
        if not self.has_base or not self.sib or self.rex & _REX_B:
            return False
        return self.sib[0] & 7 == _STACK_POINTER

    def load(self, register: str, end: Addr, *, is_pushed: bool) -> OperandLoad | None:
        """Return the load of the operand into a register.

        Args:
            register: Which.
            end: Address after the branch.
            is_pushed: Whether a return address has been pushed before the load.

        Returns:
            The load; None if it might read what the push has written over, or cannot be encoded.
        """
        disp = self.disp
        if is_pushed and self.is_on_stack:
            has_index = self.sib[0] >> 3 & 7 != _HAS_SIB or self.rex & _REX_X
            # With an index it may be the pushed word wherever below %rsp it counts from.
            if disp < 0 and (has_index or disp > -2 * _WORD_SIZE):
                return None
            disp += _WORD_SIZE
        if not -(1 << 31) <= disp < 1 << 31:
            return None
        number = REGISTER_NUMBERS[register]
        # mov mem, %reg     REX.W+R+X+B 8B /r
        rex = _REX_W | (number >> 3) << 2 | self.rex
        mod = _DISP32_FORM if self.has_base else 0
        modrm = mod << 6 | (number & 7) << 3 | self.rm
        code = self.segment + bytes((rex, _MOV_LOAD, modrm)) + self.sib
        if self.is_relative:
            return OperandLoad(code=code + bytes(DISP32_SIZE), data_addr=Addr(end + disp))
        return OperandLoad(code=code + disp.to_bytes(DISP32_SIZE, "little", signed=True))


def decode_memory_operand(body: bytes, opcode: int) -> tuple[int, MemoryOperand] | None:
    """Decode an instruction of one opcode byte whose only operand is in memory.

    Args:
        body: All of the instruction, but for prefixes of no effect before it.
        opcode: Its opcode.

    Returns:
        The middle of its ModRM byte, and the operand; None if it is anything else.
    """
    segment, body = (body[:1], body[1:]) if body[:1] in _SEGMENTS else (b"", body)
    rex = 0
    if body and body[0] & _REX_MASK == _REX:
        rex, body = body[0] & _REX_ADDRESS, body[1:]
    if len(body) < 2 or body[0] != opcode:
        return None
    mod, middle, rm = body[1] >> 6, body[1] >> 3 & 7, body[1] & 7
    if mod == _REGISTER_FORM:
        return None
    sib_end = 3 if rm == _HAS_SIB else 2
    sib = body[2:sib_end]
    if len(sib) != sib_end - 2:
        return None
    has_base = mod != 0 or (sib[0] & 7 if sib else rm) != _NO_BASE
    raw = body[sib_end:]
    if len(raw) != (_DISP_SIZES[mod] if has_base else DISP32_SIZE):
        return None
    return middle, MemoryOperand(
        segment=segment,
        rex=rex,
        rm=rm,
        sib=sib,
        has_base=has_base,
        disp=int.from_bytes(raw, "little", signed=True),
    )


def encode_load(load: OperandLoad, addr: int) -> bytes:
    """Return a load's bytes at an address.

    Raises:
        EncodeRangeError: if what it reads is out of reach.
    """
    if load.data_addr is None:
        return load.code
    return load.code[:-DISP32_SIZE] + encode_disp32(addr + load.size, load.data_addr)
