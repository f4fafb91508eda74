# SPDX-License-Identifier: Apache-2.0
"""Know a retpoline thunk by its name or, in stripped files, by its body.

The body of GCC's ``thunk``; Clang's has the same instructions with padding
before label 1::

        call 1f
    2:  pause
        lfence
        jmp 2b                 speculation that mispredicts the ret ends here
    1:  mov %REG,(%rsp)
        ret

``lea 8(%rsp),%rsp`` at label 1 drops the return address instead: what is then
on top of the stack is the target (``__x86_indirect_thunk``) or a return address
(``__x86_return_thunk``, which is no indirect branch of ours). Only the name
tells those two apart. ``lfence; jmp *%REG`` is AMD's form.

Non-goal: who calls the body, which says whether it is shared or ``thunk-inline``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from iced_x86 import Code, Decoder, FlowControl, Instruction, Mnemonic, OpKind, Register

from optpoline.model import Addr, ThunkFlavour

__all__ = [
    "STACK_OPERAND",
    "THUNK_NAME_MARKS",
    "ThunkBody",
    "ThunkShape",
    "decode_thunk_body",
    "find_thunk_bodies",
    "flavour_of",
    "has_inline_form",
    "thunk_name_operand",
]

STACK_OPERAND = ""
"""Operand of a thunk that takes its target from the stack, not from a register."""

THUNK_NAME_MARKS = (b"__x86_indirect_", b"__llvm_retpoline_", b"__llvm_lvi_thunk_")
"""One of these is in the symbol of every named thunk."""

_NAME_PREFIXES = (
    "__x86_indirect_thunk_",
    "__x86_indirect_call_thunk_",
    "__x86_indirect_jump_thunk_",
    "__llvm_retpoline_",
    "__llvm_lvi_thunk_",
)

_REGISTERS: dict[int, str] = {
    Register.RAX: "rax",
    Register.RCX: "rcx",
    Register.RDX: "rdx",
    Register.RBX: "rbx",
    Register.RBP: "rbp",
    Register.RSI: "rsi",
    Register.RDI: "rdi",
    Register.R8: "r8",
    Register.R9: "r9",
    Register.R10: "r10",
    Register.R11: "r11",
    Register.R12: "r12",
    Register.R13: "r13",
    Register.R14: "r14",
    Register.R15: "r15",
}
_REGISTER_NAMES = frozenset(_REGISTERS.values())

# lfence: in every body but the kernel's newest, which ends speculation with int3.
_LFENCE = bytes.fromhex("0faee8")
# call over an int3
_CALL_OVER_INT3 = bytes.fromhex("e801000000cc")
# pause, the instruction before lfence in a retpoline body
_PAUSE = bytes.fromhex("f390")

_MAX_CAPTURE_SIZE = 64
"""Longest way in bytes from the call to label 1: Clang pads to 16, twice that for a cache line."""

MAX_BODY_SIZE = 5 + _MAX_CAPTURE_SIZE + 16
"""Bytes that are enough to decode any body."""

_CAPTURE_MNEMONICS = frozenset((Mnemonic.PAUSE, Mnemonic.LFENCE, Mnemonic.INT3, Mnemonic.NOP))


class ThunkShape(Enum):
    """How a body does its branch."""

    RETPOLINE = "retpoline"
    PADDED_RETPOLINE = "padded retpoline"
    STACK = "stack"
    LFENCE = "lfence"


@dataclass(frozen=True, slots=True, kw_only=True)
class ThunkBody:
    """The code of one thunk.

    Attributes:
        addr: Its first instruction.
        size: Its length in bytes.
        shape: How it does its branch.
        operand: Register that holds the target, ``STACK_OPERAND`` for a STACK body.
    """

    addr: Addr
    size: int
    shape: ThunkShape
    operand: str


def flavour_of(shape: ThunkShape) -> ThunkFlavour:
    """Say whose thunk a body without a name most likely is."""
    match shape:
        case ThunkShape.PADDED_RETPOLINE:
            return ThunkFlavour.CLANG
        case ThunkShape.LFENCE:
            return ThunkFlavour.EXTERN
        case ThunkShape.RETPOLINE | ThunkShape.STACK:
            return ThunkFlavour.GCC


def thunk_name_operand(name: str) -> str | None:
    """Return the operand that a symbol names, or None if it names no thunk.

    >>> thunk_name_operand("__x86_indirect_thunk_r11")
    'r11'
    >>> thunk_name_operand("__x86_indirect_thunk")
    ''
    >>> thunk_name_operand("__x86_return_thunk") is None
    True
    """
    # Link-time optimisation adds ".lto_priv.0" and the like.
    stem = name.partition(".")[0]
    if stem == "__x86_indirect_thunk":
        return STACK_OPERAND
    for prefix in _NAME_PREFIXES:
        if stem.startswith(prefix):
            register = stem.removeprefix(prefix)
            return register if register in _REGISTER_NAMES else None
    return None


def decode_thunk_body(code: bytes, addr: Addr) -> ThunkBody | None:
    """Recognise the body of a thunk at the start of ``code``.

    >>> body = decode_thunk_body(bytes.fromhex("e807000000f3900faee8ebf948890424c3"), Addr(0))
    >>> body.operand, body.size
    ('rax', 17)
    """
    code = code[:MAX_BODY_SIZE]
    first = Decoder(64, code, ip=addr).decode()
    if first.flow_control == FlowControl.CALL:
        return _decode_retpoline(code, addr, first)
    if first.mnemonic == Mnemonic.LFENCE:
        jump = Decoder(64, code[first.len :], ip=first.next_ip).decode()
        operand = _REGISTERS.get(jump.op0_register)
        if jump.code == Code.JMP_RM64 and jump.op0_kind == OpKind.REGISTER and operand:
            size = first.len + jump.len
            return ThunkBody(addr=addr, size=size, shape=ThunkShape.LFENCE, operand=operand)
    return None


def _decode_retpoline(code: bytes, addr: Addr, call: Instruction) -> ThunkBody | None:
    """Recognise a body whose first instruction is ``call``."""
    entry = call.near_branch_target
    capture_size = entry - call.next_ip
    if not 0 < capture_size <= _MAX_CAPTURE_SIZE:
        return None
    decoder = Decoder(64, code[call.len :], ip=call.next_ip)
    shape = ThunkShape.RETPOLINE
    is_closed = False
    while decoder.ip < entry:
        raw = decoder.decode()
        if raw.flow_control == FlowControl.UNCONDITIONAL_BRANCH:
            if not call.next_ip <= raw.near_branch_target <= raw.ip:
                return None
            is_closed = True
        elif raw.mnemonic not in _CAPTURE_MNEMONICS:
            return None
        elif is_closed:
            shape = ThunkShape.PADDED_RETPOLINE
        elif raw.mnemonic == Mnemonic.INT3:
            is_closed = True
    if not is_closed or decoder.ip != entry:
        return None
    load, ret = decoder.decode(), decoder.decode()
    operand = _stored_register(load)
    if operand == STACK_OPERAND:
        shape = ThunkShape.STACK
    if operand is None or ret.code != Code.RETNQ:
        return None
    return ThunkBody(addr=addr, size=ret.next_ip - addr, shape=shape, operand=operand)


def _stored_register(raw: Instruction) -> str | None:
    """Name what an instruction puts where ``ret`` will find it, or None if nothing."""
    if raw.code == Code.LEA_R64_M and raw.op0_register == Register.RSP:
        is_drop = raw.memory_displacement == 8 and raw.memory_index == Register.NONE
        return STACK_OPERAND if is_drop and raw.memory_base == Register.RSP else None
    is_store = (
        raw.code == Code.MOV_RM64_R64
        and raw.op0_kind == OpKind.MEMORY
        and raw.memory_base == Register.RSP
        and raw.memory_index == Register.NONE
        and raw.memory_displacement == 0
    )
    return _REGISTERS.get(raw.op1_register) if is_store else None


def find_thunk_bodies(text: bytes, base: Addr) -> Iterator[ThunkBody]:
    """Find every body in a text, at any offset, in no particular order.

    A text without any costs two searches for a byte string.

    Args:
        text: Bytes of the text.
        base: Address of the first.
    """
    for off in _body_offs(text):
        body = decode_thunk_body(text[off : off + MAX_BODY_SIZE], Addr(base + off))
        if body is not None:
            yield body


def _body_offs(text: bytes) -> Iterator[int]:
    """Yield offsets at which a body may begin."""
    pos = text.find(_LFENCE)
    while pos >= 0:
        # ff /4 jmp *reg, 41 before it for r8 to r15
        if text[pos + 3 : pos + 4] == b"\xff" or text[pos + 3 : pos + 5] == b"\x41\xff":
            yield pos
        elif pos >= 5:
            start = pos - len(_PAUSE) if text[pos - 2 : pos] == _PAUSE else pos
            if start >= 5 and text[start - 5] == 0xE8:
                yield start - 5
        pos = text.find(_LFENCE, pos + 3)
    pos = text.find(_CALL_OVER_INT3)
    while pos >= 0:
        yield pos
        pos = text.find(_CALL_OVER_INT3, pos + 6)


def has_inline_form(text: bytes, off: int, size: int) -> bool:
    """Say whether the bytes around a body are those of ``thunk-inline``.

    GCC writes an inline call as ``jmp 3f; body; 3: call body``; an inline jump
    is the body alone, which no bytes around it give away.

    Args:
        text: Bytes of the text.
        off: Offset of the body.
        size: Its length in bytes.
    """
    end = off + size
    # eb disp8, jmp over the body
    is_jumped_over = off >= 2 and text[off - 2 : off] == bytes((0xEB, size & 0xFF))
    # e8 rel32, call back to the body
    call_back = b"\xe8" + (-(size + 5)).to_bytes(4, "little", signed=True)
    return is_jumped_over and text[end : end + 5] == call_back
