# SPDX-License-Identifier: Apache-2.0
"""The instructions that only learning blocks have.

They reach counters through a register, count with a ``lock`` prefix, and use the thread's
own memory behind ``%fs``. Operands in memory have displacements of 32 bits throughout, so
that an instruction is as long for any register but r12 and rsp, which need a byte more.

Encodings: Intel SDM vol. 2, each with its mnemonic beside it.
"""

from __future__ import annotations

from optpoline.x86.assembler import DISP32_SIZE, REGISTER_NUMBERS, Assembler, Label, RowOffset

__all__ = ["CounterAssembler"]

_LOCK = b"\xf0"
_FS = b"\x64"
_ABSOLUTE = b"\x25"
"""SIB byte: no base, no index, disp32 alone."""


class CounterAssembler(Assembler):
    """An assembler that knows them."""

    # --- registers

    def lea(self, register: str, data: int | Label) -> None:
        """Load an address within reach."""
        # lea disp32(%rip), %reg   REX.W+R 8d /r
        self.relative(register, 0x8D, data)

    def mov_from_literal(self, register: str, literal_addr: int) -> None:
        """Load the u64 at ``literal_addr``."""
        # mov disp32(%rip), %reg   REX.W+R 8b /r
        self.relative(register, 0x8B, literal_addr)

    def mov_low32(self, register: str, value: int) -> None:
        """Load a value of 32 bits; the high half becomes 0."""
        number = REGISTER_NUMBERS[register]
        # mov $imm32, %reg32       [REX.B] b8+r id
        self.emit(_rex(base=number) + bytes((0xB8 | number & 7,)) + value.to_bytes(4, "little"))

    def and_low32(self, register: str, value: int) -> None:
        """And with a value of 32 bits; the high half becomes 0."""
        number = REGISTER_NUMBERS[register]
        # and $imm32, %reg32       [REX.B] 81 /4 id
        self.emit(
            _rex(base=number) + bytes((0x81, 0xE0 | number & 7)) + value.to_bytes(4, "little")
        )

    def lsl_low32(self, register: str) -> None:
        """Load the limit of the segment that the register selects; ZF says whether it could."""
        number = REGISTER_NUMBERS[register]
        # lsl %reg32, %reg32       [REX.RB] 0f 03 /r
        modrm = 0xC0 | (number & 7) << 3 | number & 7
        self.emit(_rex(reg=number, base=number) + bytes((0x0F, 0x03, modrm)))

    def shl(self, register: str, count: int) -> None:
        """Shift all 64 bits left."""
        number = REGISTER_NUMBERS[register]
        # shl $imm8, %reg          REX.W+B c1 /4 ib
        self.emit(_rex(wide=True, base=number) + bytes((0xC1, 0xE0 | number & 7, count)))

    def add_imm32(self, register: str, value: int) -> None:
        """Add a value that fits a sign-extended imm32."""
        number = REGISTER_NUMBERS[register]
        # add $imm32, %reg         REX.W+B 81 /0 id
        self._with_disp(_rex(wide=True, base=number) + bytes((0x81, 0xC0 | number & 7)), value)

    # --- memory through a register

    def cmp_at(self, base: str, disp: int, register: str) -> None:
        """Compare a register with the u64 at a distance from another."""
        # cmp disp32(%base), %reg  REX.W+RB 3b /r
        self._with_disp(_based(b"\x3b", REGISTER_NUMBERS[register], base), disp)

    def cmp_at_zero(self, base: str, disp: int) -> None:
        """Compare the u64 at a distance from a register with 0."""
        # cmpq $0, disp32(%base)   REX.W+B 83 /7 ib
        self._with_disp(_based(b"\x83", 7, base), disp, b"\x00")

    def mov_to(self, base: str, disp: int, register: str) -> None:
        """Store a register at a distance from another."""
        # mov %reg, disp32(%base)  REX.W+RB 89 /r
        self._with_disp(_based(b"\x89", REGISTER_NUMBERS[register], base), disp)

    def mov_from(self, register: str, base: str, disp: int) -> None:
        """Load a register from a distance from another."""
        # mov disp32(%base), %reg  REX.W+RB 8b /r
        self._with_disp(_based(b"\x8b", REGISTER_NUMBERS[register], base), disp)

    def mov_imm32_to(self, base: str, disp: int, value: int) -> None:
        """Store a u32 at a distance from a register."""
        # movl $imm32, disp32(%base)   [REX.B] c7 /0 id
        imm = value.to_bytes(4, "little")
        self._with_disp(_based(b"\xc7", 0, base, wide=False), disp, imm)

    def inc_at(self, base: str, disp: int) -> None:
        """Add one to the u64 at a distance from a register; not atomic between CPUs."""
        # incq disp32(%base)       REX.W+B ff /0
        self._with_disp(_based(b"\xff", 0, base), disp)

    def lock_inc_at(self, base: str, disp: int) -> None:
        """Add one to the u64 at a distance from a register, atomically."""
        # lock incq disp32(%base)  f0 REX.W+B ff /0
        self._with_disp(_LOCK + _based(b"\xff", 0, base), disp)

    def _with_disp(self, code: bytes, disp: int, rest: bytes = b"") -> None:
        """Add an instruction with a signed number of 32 bits, between ``code`` and ``rest``."""
        whole = code + _disp32(disp) + rest
        if isinstance(disp, RowOffset):
            self.emit_value(whole, len(code), disp)
        else:
            self.emit(whole)

    # --- shared memory

    def lock_inc_mem(self, data_addr: int) -> None:
        """Add one to the u64 at ``data_addr``, atomically."""
        # lock incq disp32(%rip)   f0 REX.W ff /0
        self.emit_relative(_LOCK + b"\x48\xff\x05" + bytes(DISP32_SIZE), 4, data_addr)

    def lock_bts_mem(self, data_addr: int, bit: int) -> None:
        """Set a bit of the u64 at ``data_addr``, atomically; CF says whether it was set."""
        # lock btsq $imm8, disp32(%rip)   f0 REX.W 0f ba /5 ib
        code = _LOCK + b"\x48\x0f\xba\x2d" + bytes(DISP32_SIZE) + bytes((bit,))
        self.emit_relative(code, 5, data_addr)

    def lock_xadd_mem(self, data_addr: int, register: str) -> None:
        """Add a register to the u64 at ``data_addr``, atomically; it gets what was there."""
        number = REGISTER_NUMBERS[register]
        # lock xadd %reg, disp32(%rip)    f0 REX.W+R 0f c1 /r
        code = _LOCK + _rex(wide=True, reg=number) + bytes((0x0F, 0xC1, (number & 7) << 3 | 5))
        self.emit_relative(code + bytes(DISP32_SIZE), len(code), data_addr)

    # --- the thread's own memory

    def mov_to_thread(self, off: int, register: str) -> None:
        """Store a register at an offset from the thread pointer."""
        number = REGISTER_NUMBERS[register]
        # mov %reg, %fs:disp32     64 REX.W+R 89 /r, SIB 25
        code = _FS + _rex(wide=True, reg=number) + bytes((0x89, (number & 7) << 3 | 4))
        self.emit(code + _ABSOLUTE + _disp32(off))

    def mov_zero_to_thread(self, off: int) -> None:
        """Store a u64 of 0 at an offset from the thread pointer."""
        # movq $0, %fs:disp32      64 REX.W c7 /0 id, SIB 25
        self.emit(_FS + b"\x48\xc7\x04" + _ABSOLUTE + _disp32(off) + bytes(4))

    def mov_low32_from_thread(self, register: str, off: int) -> None:
        """Load the u32 at an offset from the thread pointer; the high half becomes 0."""
        number = REGISTER_NUMBERS[register]
        # mov %fs:disp32, %reg32   64 [REX.R] 8b /r, SIB 25
        code = _FS + _rex(reg=number) + bytes((0x8B, (number & 7) << 3 | 4))
        self.emit(code + _ABSOLUTE + _disp32(off))

    def signature(self, value: int) -> None:
        """Add an undefined instruction that ends with a u32, as abort handlers are marked."""
        # ud1 disp32(%rip), %edi   0f b9 /r, the displacement being the signature
        self.emit(b"\x0f\xb9\x3d" + value.to_bytes(4, "little"))


def _rex(*, wide: bool = False, reg: int = 0, base: int = 0) -> bytes:
    """Return a REX prefix for the registers named, nothing where none is needed."""
    rex = wide << 3 | (reg >> 3) << 2 | base >> 3
    return bytes((0x40 | rex,)) if rex else b""


def _disp32(value: int) -> bytes:
    """Return a signed displacement."""
    return value.to_bytes(DISP32_SIZE, "little", signed=True)


def _based(opcode: bytes, reg: int, base: str, *, wide: bool = True) -> bytes:
    """Return an instruction up to the displacement of its operand ``disp32(%base)``."""
    number = REGISTER_NUMBERS[base]
    # ModRM: mod 10, disp32; r/m 4 means that a SIB byte follows, here with no index.
    sib = b"\x24" if number & 7 == 4 else b""
    modrm = bytes((0x80 | (reg & 7) << 3 | number & 7,))
    return _rex(wide=wide, reg=reg, base=number) + opcode + modrm + sib
