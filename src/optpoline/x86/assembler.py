# SPDX-License-Identifier: Apache-2.0
"""Emit the dozen x86-64 instructions that blocks are made of.

Every byte string has its mnemonic beside it. Branches inside a block are
forward only and use the short form where it reaches; branches out of the block
are always ``rel32``, and one that does not reach raises ``EncodeRangeError``:
it is never turned into an indirect branch (design rule 3). ``int3`` follows
each unconditional jump, against straight-line speculation.

Layout is found by growing: all internal branches start short, those that do
not reach become long, until nothing changes. Lengths only grow, so it ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from optpoline.errors import EncodeRangeError
from optpoline.model import Addr

__all__ = [
    "DISP32_SIZE",
    "INT3",
    "JMP32_OPCODE",
    "JMP32_SIZE",
    "REGISTER_NUMBERS",
    "Assembler",
    "Condition",
    "Label",
    "encode_disp32",
    "encode_jmp32",
]

DISP32_SIZE = 4
JMP32_OPCODE = b"\xe9"
JMP32_SIZE = 5
INT3 = 0xCC

REGISTER_NUMBERS = {
    name: number
    for number, name in enumerate(
        (
            *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
        )
    )
}
"""Register name to its number in ModRM and REX (Intel SDM vol. 2, table 2-2)."""


class Condition(IntEnum):
    """Low nibble of ``jcc`` opcodes (Intel SDM vol. 2, appendix B.1.4.7)."""

    BELOW = 0x2
    ABOVE_EQUAL = 0x3
    EQUAL = 0x4
    NOT_EQUAL = 0x5
    ABOVE = 0x7


@dataclass(frozen=True, slots=True)
class Label:
    """A place in the block, bound once with ``Assembler.bind``."""

    number: int


@dataclass(slots=True)
class _Bytes:
    """Fixed bytes; ``data_addr`` is what a trailing rip-relative operand points to."""

    code: bytes
    data_addr: int | None = None
    disp_off: int = 0


@dataclass(slots=True)
class _Branch:
    """A jump or jcc, to a label of the block or to an absolute address."""

    condition: Condition | None
    label: Label | None
    dst_addr: int
    is_long: bool

    def size(self) -> int:
        """Length in bytes, with the int3 behind an unconditional jump."""
        if self.condition is None:
            return (5 if self.is_long else 2) + 1
        return 6 if self.is_long else 2


@dataclass(slots=True)
class _Bind:
    """Where a label is."""

    label: Label


def encode_disp32(src_end: int, dst_addr: int) -> bytes:
    """Return the 32-bit displacement from the end of an instruction.

    Args:
        src_end: Address after the instruction.
        dst_addr: What it should point to.

    Raises:
        EncodeRangeError: if the distance does not fit.

    >>> encode_disp32(0x1005, 0x2000).hex()
    'fb0f0000'
    """
    delta = dst_addr - src_end
    if not -(1 << 31) <= delta < 1 << 31:
        raise EncodeRangeError(src_end, dst_addr)
    return delta.to_bytes(DISP32_SIZE, "little", signed=True)


def encode_jmp32(src_addr: int, dst_addr: int) -> bytes:
    """Return ``jmp rel32`` without the int3 behind it.

    >>> encode_jmp32(0x1000, 0x1005).hex()
    'e900000000'
    """
    return JMP32_OPCODE + encode_disp32(src_addr + JMP32_SIZE, dst_addr)


class Assembler:
    """Collects the instructions of one block and lays them out at ``addr``."""

    def __init__(self, addr: Addr) -> None:
        """Start a block at ``addr``."""
        self._addr = addr
        self._items: list[_Bytes | _Branch | _Bind] = []
        self._n_labels = 0

    # --- data instructions

    def cmp_imm32(self, register: str, value: int) -> None:
        """Compare a register with a value that fits a sign-extended imm32."""
        number = REGISTER_NUMBERS[register]
        imm = value.to_bytes(4, "little", signed=True)
        if number == 0:
            # cmp $imm32, %rax
            self._items.append(_Bytes(b"\x48\x3d" + imm))
        else:
            # cmp $imm32, %reg     REX.W+B 81 /7
            rex = 0x48 | number >> 3
            self._items.append(_Bytes(bytes((rex, 0x81, 0xF8 | number & 7)) + imm))

    def cmp_low32(self, register: str, value: int) -> None:
        """Compare the low half of a register with a value of 32 bits.

        The form of five bytes that %eax has is left alone: at the head of a block
        a thread could stand behind it, where a redirected head has its ``int3``.
        """
        number = REGISTER_NUMBERS[register]
        imm = value.to_bytes(4, "little")
        # cmp $imm32, %reg32       [REX.B] 81 /7
        rex = b"\x41" if number >> 3 else b""
        self._items.append(_Bytes(rex + bytes((0x81, 0xF8 | number & 7)) + imm))

    def cmp_mem(self, register: str, data_addr: int) -> None:
        """Compare a register with the u64 at ``data_addr``."""
        # cmp disp32(%rip), %reg   REX.W+R 3b /r
        self._rip_relative(register, 0x3B, data_addr)

    def sub_mem(self, register: str, data_addr: int) -> None:
        """Subtract the u64 at ``data_addr`` from a register."""
        # sub disp32(%rip), %reg   REX.W+R 2b /r
        self._rip_relative(register, 0x2B, data_addr)

    def add_mem(self, register: str, data_addr: int) -> None:
        """Add the u64 at ``data_addr`` to a register."""
        # add disp32(%rip), %reg   REX.W+R 03 /r
        self._rip_relative(register, 0x03, data_addr)

    def cmp_mem_zero(self, data_addr: int) -> None:
        """Compare the u64 at ``data_addr`` with 0."""
        # cmpq $0, disp32(%rip)    REX.W 83 /7 ib
        self._items.append(_Bytes(b"\x48\x83\x3d" + bytes(4) + b"\x00", data_addr, 3))

    def mov_to_mem(self, data_addr: int, register: str) -> None:
        """Store a register to the u64 at ``data_addr``."""
        # mov %reg, disp32(%rip)   REX.W+R 89 /r
        self._rip_relative(register, 0x89, data_addr)

    def inc_mem(self, data_addr: int) -> None:
        """Add one to the u64 at ``data_addr``; not atomic between CPUs."""
        # incq disp32(%rip)        REX.W ff /0
        self._items.append(_Bytes(b"\x48\xff\x05" + bytes(4), data_addr, 3))

    def _rip_relative(self, register: str, opcode: int, data_addr: int) -> None:
        """Add ``op reg, disp32(%rip)``."""
        number = REGISTER_NUMBERS[register]
        rex = 0x48 | (number >> 3) << 2
        modrm = (number & 7) << 3 | 0b101
        self._items.append(_Bytes(bytes((rex, opcode, modrm)) + bytes(4), data_addr, 3))

    # --- branches

    def label(self) -> Label:
        """Make a label that is not bound yet."""
        self._n_labels += 1
        return Label(self._n_labels - 1)

    def bind(self, label: Label) -> None:
        """Put a label here; a jump to it that ends just before is dropped."""
        last = self._items[-1] if self._items else None
        if isinstance(last, _Branch) and last.condition is None and last.label == label:
            self._items.pop()
        self._items.append(_Bind(label))

    def jump(self, dst_addr: int) -> None:
        """Jump out of the block, with int3 behind."""
        self._items.append(_Branch(None, None, dst_addr, True))

    def jump_label(self, label: Label) -> None:
        """Jump forward inside the block, with int3 behind."""
        self._items.append(_Branch(None, label, 0, False))

    def branch(self, condition: Condition, dst_addr: int) -> None:
        """Branch out of the block on a condition."""
        self._items.append(_Branch(condition, None, dst_addr, True))

    def branch_label(self, condition: Condition, label: Label) -> None:
        """Branch forward inside the block on a condition."""
        self._items.append(_Branch(condition, label, 0, False))

    # --- layout

    def finish(self) -> bytes:
        """Return the bytes of the block.

        Raises:
            EncodeRangeError: if something outside the block is out of reach.
        """
        while True:
            offsets, labels = self._layout()
            if not self._widen(offsets, labels):
                return self._emit(offsets, labels)

    def _layout(self) -> tuple[list[int], dict[Label, int]]:
        """Return each item's offset and each label's."""
        offsets: list[int] = []
        labels: dict[Label, int] = {}
        off = 0
        for item in self._items:
            offsets.append(off)
            match item:
                case _Bytes(code):
                    off += len(code)
                case _Branch():
                    off += item.size()
                case _Bind(label):
                    labels[label] = off
        return offsets, labels

    def _widen(self, offsets: list[int], labels: dict[Label, int]) -> bool:
        """Make short branches long that do not reach; tell whether there were any."""
        changed = False
        for item, off in zip(self._items, offsets, strict=True):
            if not isinstance(item, _Branch) or item.label is None or item.is_long:
                continue
            if labels[item.label] - (off + 2) > 127:
                item.is_long = changed = True
        return changed

    def _emit(self, offsets: list[int], labels: dict[Label, int]) -> bytes:
        """Return the bytes, all lengths being settled."""
        out = bytearray()
        for item, off in zip(self._items, offsets, strict=True):
            match item:
                case _Bytes(code, None):
                    out += code
                case _Bytes(code, data_addr, disp_off) if data_addr is not None:
                    disp = encode_disp32(self._addr + off + len(code), data_addr)
                    out += code[:disp_off] + disp + code[disp_off + DISP32_SIZE :]
                case _Branch():
                    out += self._emit_branch(item, off, labels)
                case _:
                    pass
        return bytes(out)

    def _emit_branch(self, item: _Branch, off: int, labels: dict[Label, int]) -> bytes:
        """Return one branch, with its int3 where it is unconditional."""
        dst = item.dst_addr if item.label is None else self._addr + labels[item.label]
        src = self._addr + off
        if item.condition is None:
            if item.is_long:
                # jmp rel32 ; int3
                return encode_jmp32(src, dst) + bytes((INT3,))
            # jmp rel8 ; int3
            return bytes((0xEB, dst - src - 2, INT3))
        if item.is_long:
            # jcc rel32
            return bytes((0x0F, 0x80 | item.condition)) + encode_disp32(src + 6, dst)
        # jcc rel8
        return bytes((0x70 | item.condition, dst - src - 2))
