# SPDX-License-Identifier: Apache-2.0
"""Emit the dozen x86-64 instructions that blocks are made of.

Every byte string has its mnemonic beside it. Branches inside a block are
forward only and use the short form where it reaches; branches out of the block
are always ``rel32``, and one that does not reach raises ``EncodeRangeError``:
it is never turned into an indirect branch (design rule 3). ``int3`` follows
each unconditional jump, against straight-line speculation.

Layout is found by growing: all internal branches start short, those that do
not reach become long, until nothing changes. Branches only grow, so it ends. A *run* of
code that is to lie in one line moves to the next where it would not. Lines are those of memory:
a block that crosses any has another layout where it begins elsewhere in a line.

Behind the instructions may lie *records*, data that is never executed: padding of
``int3`` up to their alignment, then each record's words.

Whoever wants to have the same block elsewhere too asks for its *relocations*: the places
in the bytes that follow from an address (``x86/templates.py``). Low halves that splits
compare with are not among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

from optpoline.errors import EncodeRangeError
from optpoline.model import Addr, OperandLoad

__all__ = [
    "CALL32_OPCODE",
    "DISP32_SIZE",
    "INT3",
    "JMP32_OPCODE",
    "JMP32_SIZE",
    "LINE_SIZE",
    "RECORD_ALIGNMENT",
    "REGISTER_NUMBERS",
    "Assembler",
    "BlockCode",
    "Condition",
    "Label",
    "Relocation",
    "RelocationKind",
    "RowOffset",
    "encode_disp32",
    "encode_jmp32",
]

DISP32_SIZE = 4
WORD_SIZE = 8
CALL32_OPCODE = b"\xe8"
JMP32_OPCODE = b"\xe9"
JMP32_SIZE = 5
INT3 = 0xCC

LINE_SIZE = 64
"""Bytes of a cache line and of what is fetched and predicted at once."""

RECORD_ALIGNMENT = 32
"""Of records in bytes: what ``struct rseq_cs`` wants (include/uapi/linux/rseq.h)."""

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
    """A place in the block, bound once with ``Assembler.bind``, or a record."""

    number: int


Word = int | Label | tuple[Label, Label]
"""A u64 of a record: a value, a label's address, or the distance from one to another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCode:
    """A block's bytes.

    Attributes:
        code: Instructions, then padding and records if there are any.
        text_size: Bytes of the instructions.
    """

    code: bytes
    text_size: int


class RowOffset(int):
    """Where in its row a counter cell is: an operand that is relocated with the cell."""


class RelocationKind(Enum):
    """How a place in a block follows from an address."""

    RELATIVE = "i32: an address outside the block, from the end of its instruction"
    VALUE = "i32: an address itself"
    ROW_OFFSET = "i32: where in its row a cell is"
    OWN = "u64: an address inside the block"


class Relocation(NamedTuple):
    """One place in the bytes of a block that follows from an address.

    Attributes:
        off: Where, in bytes from the start of the block.
        kind: How.
        value: The address; the offset in its row of a cell.
    """

    off: int
    kind: RelocationKind
    value: int


@dataclass(slots=True)
class _Bytes:
    """Fixed bytes; ``data_addr`` is what a trailing rip-relative operand points to.

    Or bytes with the operand ``value``, which follows from an address.
    """

    code: bytes
    data_addr: int | Label | None = None
    operand_off: int = 0
    value: int | None = None


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


@dataclass(slots=True)
class _Padding:
    """What moves a run of code into one line.

    Attributes:
        end: Where the run ends.
        run_size: Its bytes.
        size: Bytes of ``int3`` before it.
    """

    end: Label
    run_size: int = 0
    size: int = 0


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
        self._items: list[_Bytes | _Branch | _Bind | _Padding] = []
        self._paddings: list[_Padding] = []
        self._records: list[tuple[Label, tuple[Word, ...]]] = []
        self._n_labels = 0

    # --- instructions without a branch

    def emit(self, code: bytes) -> None:
        """Add an instruction that is the same wherever it is."""
        self._items.append(_Bytes(code))

    def emit_relative(self, code: bytes, disp_off: int, data: int | Label) -> None:
        """Add an instruction with a rip-relative operand.

        Args:
            code: Its bytes with any displacement.
            disp_off: Where in them the displacement is.
            data: The address that the operand means, or the label.
        """
        self._items.append(_Bytes(code, data, disp_off))

    def emit_value(self, code: bytes, value_off: int, value: int) -> None:
        """Add an instruction with a 32-bit operand that follows from an address.

        Args:
            code: Its bytes.
            value_off: Where in them the operand is.
            value: What it is.
        """
        self._items.append(_Bytes(code, None, value_off, value))

    def cmp_imm32(self, register: str, value: int) -> None:
        """Compare a register with a value that fits a sign-extended imm32."""
        number = REGISTER_NUMBERS[register]
        imm = value.to_bytes(4, "little", signed=True)
        if number == 0:
            # cmp $imm32, %rax
            self.emit_value(b"\x48\x3d" + imm, 2, value)
        else:
            # cmp $imm32, %reg     REX.W+B 81 /7
            rex = 0x48 | number >> 3
            self.emit_value(bytes((rex, 0x81, 0xF8 | number & 7)) + imm, 3, value)

    def cmp_low32(self, register: str, value: int) -> None:
        """Compare the low half of a register with a value of 32 bits.

        The form of five bytes that %eax has is left alone: at the head of a block
        a thread could stand behind it, where a redirected head has its ``int3``.
        """
        number = REGISTER_NUMBERS[register]
        imm = value.to_bytes(4, "little")
        # cmp $imm32, %reg32       [REX.B] 81 /7
        rex = b"\x41" if number >> 3 else b""
        self.emit(rex + bytes((0x81, 0xF8 | number & 7)) + imm)

    def cmp_mem(self, register: str, data_addr: int) -> None:
        """Compare a register with the u64 at ``data_addr``."""
        # cmp disp32(%rip), %reg   REX.W+R 3b /r
        self.relative(register, 0x3B, data_addr)

    def sub_mem(self, register: str, data_addr: int) -> None:
        """Subtract the u64 at ``data_addr`` from a register."""
        # sub disp32(%rip), %reg   REX.W+R 2b /r
        self.relative(register, 0x2B, data_addr)

    def add_mem(self, register: str, data_addr: int) -> None:
        """Add the u64 at ``data_addr`` to a register."""
        # add disp32(%rip), %reg   REX.W+R 03 /r
        self.relative(register, 0x03, data_addr)

    def cmp_mem_zero(self, data_addr: int) -> None:
        """Compare the u64 at ``data_addr`` with 0."""
        # cmpq $0, disp32(%rip)    REX.W 83 /7 ib
        self.emit_relative(b"\x48\x83\x3d" + bytes(4) + b"\x00", 3, data_addr)

    def mov_to_mem(self, data_addr: int, register: str) -> None:
        """Store a register to the u64 at ``data_addr``."""
        # mov %reg, disp32(%rip)   REX.W+R 89 /r
        self.relative(register, 0x89, data_addr)

    def inc_mem(self, data_addr: int) -> None:
        """Add one to the u64 at ``data_addr``; not atomic between CPUs."""
        # incq disp32(%rip)        REX.W ff /0
        self.emit_relative(b"\x48\xff\x05" + bytes(4), 3, data_addr)

    def load(self, load: OperandLoad) -> None:
        """Load an operand that is in memory."""
        if load.data_addr is None:
            self.emit(load.code)
        else:
            self.emit_relative(load.code, load.size - DISP32_SIZE, load.data_addr)

    def relative(self, register: str, opcode: int, data: int | Label) -> None:
        """Add an instruction of one opcode byte with a 64-bit register and disp32(%rip)."""
        number = REGISTER_NUMBERS[register]
        rex = 0x48 | (number >> 3) << 2
        modrm = (number & 7) << 3 | 0b101
        self.emit_relative(bytes((rex, opcode, modrm)) + bytes(4), 3, data)

    # --- branches

    def label(self) -> Label:
        """Make a label that is not bound yet."""
        self._n_labels += 1
        return Label(self._n_labels - 1)

    def bind(self, label: Label) -> None:
        """Put a label here; a jump to it that ends just before is dropped."""
        at = len(self._items) - 1
        while at >= 0 and isinstance(self._items[at], _Bind):
            at -= 1
        last = self._items[at] if at >= 0 else None
        if isinstance(last, _Branch) and last.condition is None and last.label == label:
            del self._items[at]
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

    def keep_in_line(self, end: Label) -> None:
        """Let all from here, where nothing falls in, to ``end`` lie in one line if it fits."""
        self._paddings.append(_Padding(end))
        self._items.append(self._paddings[-1])

    # --- records

    def record(self, *words: Word) -> Label:
        """Add four words behind the instructions, aligned; return where they will be."""
        label = self.label()
        self._records.append((label, words))
        return label

    # --- layout

    def finish(self) -> bytes:
        """Return the bytes of the block, records and all."""
        return self.finish_block().code

    def finish_block(self, relocations: list[Relocation] | None = None) -> BlockCode:
        """Return the block.

        Args:
            relocations: Gets those of the block, in no order.

        Raises:
            EncodeRangeError: if something outside the block is out of reach.
        """
        while True:
            offsets, labels = self._layout()
            if not self._widen(offsets, labels):
                break
        if relocations is not None:
            relocations += self._relocations(offsets, labels)
        return self._emit(offsets, labels)

    def _layout(self) -> tuple[list[int], list[int]]:
        """Return each item's offset and each label's, by its number."""
        if self._paddings:
            self._measure_runs()
        offsets: list[int] = []
        labels = [0] * self._n_labels
        off = 0
        for item in self._items:
            offsets.append(off)
            if isinstance(item, _Bytes):
                off += len(item.code)
            elif isinstance(item, _Branch):
                off += item.size()
            elif isinstance(item, _Bind):
                labels[item.label.number] = off
            else:
                room = -(self._addr + off) % LINE_SIZE
                item.size = room if room < item.run_size <= LINE_SIZE else 0
                off += item.size
        for label, words in self._records:
            off += -(self._addr + off) % RECORD_ALIGNMENT
            labels[label.number] = off
            off += WORD_SIZE * len(words)
        return offsets, labels

    def _measure_runs(self) -> None:
        """Note how long each run is. One that fits a line has no padding inside."""
        off = 0
        starts: dict[Label, list[tuple[_Padding, int]]] = {}
        for item in self._items:
            if isinstance(item, _Bytes):
                off += len(item.code)
            elif isinstance(item, _Branch):
                off += item.size()
            elif isinstance(item, _Padding):
                starts.setdefault(item.end, []).append((item, off))
            else:
                for padding, start in starts.get(item.label, ()):
                    padding.run_size = off - start

    def _widen(self, offsets: list[int], labels: list[int]) -> bool:
        """Make short branches long that do not reach; tell whether there were any."""
        changed = False
        for item, off in zip(self._items, offsets, strict=True):
            if not isinstance(item, _Branch) or item.label is None or item.is_long:
                continue
            if labels[item.label.number] - (off + 2) > 127:
                item.is_long = changed = True
        return changed

    def _emit(self, offsets: list[int], labels: list[int]) -> BlockCode:
        """Return the bytes, all lengths being settled."""
        out = bytearray()
        for item, off in zip(self._items, offsets, strict=True):
            if isinstance(item, _Bytes):
                out += self._emit_bytes(item, off, labels)
            elif isinstance(item, _Branch):
                out += self._emit_branch(item, off, labels)
            elif isinstance(item, _Padding):
                out += bytes((INT3,)) * item.size
        text_size = len(out)
        for label, words in self._records:
            out += bytes((INT3,)) * (labels[label.number] - len(out))
            for word in words:
                out += self._word(word, labels).to_bytes(WORD_SIZE, "little")
        return BlockCode(code=bytes(out), text_size=text_size)

    def _emit_bytes(self, item: _Bytes, off: int, labels: list[int]) -> bytes:
        """Return one instruction that is no branch."""
        data, code, at = item.data_addr, item.code, item.operand_off
        if data is None:
            return code
        data_addr = self._addr + labels[data.number] if isinstance(data, Label) else data
        disp = encode_disp32(self._addr + off + len(code), data_addr)
        return code[:at] + disp + code[at + DISP32_SIZE :]

    def _word(self, word: Word, labels: list[int]) -> int:
        """Return the value of a record's word."""
        match word:
            case int():
                return word
            case Label():
                return self._addr + labels[word.number]
            case (start, end):
                return labels[end.number] - labels[start.number]

    def _emit_branch(self, item: _Branch, off: int, labels: list[int]) -> bytes:
        """Return one branch, with its int3 where it is unconditional."""
        dst = item.dst_addr if item.label is None else self._addr + labels[item.label.number]
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

    # --- relocations

    def _relocations(self, offsets: list[int], labels: list[int]) -> Iterator[Relocation]:
        """Yield all places that follow from an address, all lengths being settled."""
        for item, off in zip(self._items, offsets, strict=True):
            if isinstance(item, _Bytes):
                if isinstance(item.data_addr, int):
                    at = off + item.operand_off
                    yield Relocation(at, RelocationKind.RELATIVE, item.data_addr)
                elif item.value is not None:
                    is_row = isinstance(item.value, RowOffset)
                    kind = RelocationKind.ROW_OFFSET if is_row else RelocationKind.VALUE
                    yield Relocation(off + item.operand_off, kind, item.value)
            elif isinstance(item, _Branch) and item.label is None:
                # jmp rel32 has one byte before its displacement, jcc rel32 two.
                at = off + (1 if item.condition is None else 2)
                yield Relocation(at, RelocationKind.RELATIVE, item.dst_addr)
        for label, words in self._records:
            for number, word in enumerate(words):
                if isinstance(word, Label):
                    at = labels[label.number] + WORD_SIZE * number
                    yield Relocation(at, RelocationKind.OWN, self._addr + labels[word.number])
