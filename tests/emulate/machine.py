# SPDX-License-Identifier: Apache-2.0
"""One block in an emulated CPU, surrounded by nothing.

Only the block, its literals, its counters and a stack are mapped, with the
rights they have in a program. Leaving the block therefore ends in a fetch from
unmapped memory, and any other access is an error.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import unicorn
from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import Uc, UcError

from optpoline.x86.assembler import REGISTER_NUMBERS
from tests.emulate.block_kinds import Image

__all__ = ["ARITHMETIC_FLAGS", "Machine", "State", "random_state"]

ARITHMETIC_FLAGS = 0x8D5
"""CF, PF, AF, ZF, SF and OF."""

_KEPT_FLAGS = 0x4_0402
"""AC and DF, which a program may have set; bit 1 is always set."""

_PAGE_SIZE = 4096
_STACK_ADDR = 0x7FFC_1234_0000
_STACK_SIZE = 2 * _PAGE_SIZE
_UNTIL = 0x10  # never reached; unmapped
_MAX_INSNS = 10_000

_REGISTERS = {name: getattr(x86, f"UC_X86_REG_{name.upper()}") for name in REGISTER_NUMBERS}
_VECTORS = tuple(getattr(x86, f"UC_X86_REG_XMM{i}") for i in range(16))
_RIP, _EFLAGS = x86.UC_X86_REG_RIP, x86.UC_X86_REG_EFLAGS


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a program has before or after a block.

    Attributes:
        pc: Program counter.
        flags: The flags register.
        registers: The sixteen general registers by number.
        vectors: xmm0 to xmm15.
        stack: All bytes of the stack, below the stack pointer too.
        counters: The page of counter cells.
        fixed: Code and literals.
    """

    pc: int
    flags: int
    registers: tuple[int, ...]
    vectors: tuple[int, ...]
    stack: bytes
    counters: bytes
    fixed: bytes


def random_state(rng: random.Random, operand: str, value: int, counters: bytes) -> State:
    """Return a random state with a value in the operand."""
    registers = [rng.getrandbits(64) for _ in REGISTER_NUMBERS]
    # On a call the return address makes rsp a multiple of 8 only; deep enough for a red zone.
    registers[REGISTER_NUMBERS["rsp"]] = _STACK_ADDR + 8 * rng.randrange(64, _STACK_SIZE // 8 - 8)
    registers[REGISTER_NUMBERS[operand]] = value
    return State(
        pc=0,
        flags=_KEPT_FLAGS & (rng.getrandbits(32) | 2) | ARITHMETIC_FLAGS & rng.getrandbits(32),
        registers=tuple(registers),
        vectors=tuple(rng.getrandbits(128) for _ in _VECTORS),
        stack=rng.randbytes(_STACK_SIZE),
        counters=counters,
        fixed=b"",
    )


class Machine:
    """A CPU that knows one block.

    Args:
        image: The block.
        code: Its bytes, where they are not as encoded (a redirected head).
    """

    def __init__(self, image: Image, code: bytes | None = None) -> None:
        """Map the block, its literals, its counters and a stack."""
        self._image = image
        self._code = image.code if code is None else code
        layout = image.layout
        self._cpu = Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        code_size = -(-len(self._code) // _PAGE_SIZE) * _PAGE_SIZE
        rx = unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC
        rw = unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE
        self._cpu.mem_map(layout.block_addr, code_size, rx)
        self._cpu.mem_map(layout.literal_addr, _PAGE_SIZE, rx)
        self._cpu.mem_map(layout.counter_addr, _PAGE_SIZE, rw)
        self._cpu.mem_map(_STACK_ADDR, _STACK_SIZE, rw)
        self._cpu.mem_write(layout.block_addr, self._code)
        for value, addr in image.literals.values.items():
            self._cpu.mem_write(addr, value.to_bytes(8, "little"))
        self._fixed = self._read_fixed()

    @property
    def fixed(self) -> bytes:
        """Code and literals as they were mapped."""
        return self._fixed

    def run(self, state: State, start_off: int = 0) -> State:
        """Run from an offset in the block until it is left.

        Raises:
            AssertionError: if it is not left by a branch to unmapped memory.
        """
        self.load(state)
        self.go_on(state.registers, state.flags, start_off)
        return self.read_state()

    def load(self, state: State) -> None:
        """Set all that a program has but what ``go_on`` sets."""
        self._cpu.mem_write(_STACK_ADDR, state.stack)
        self._cpu.mem_write(self._image.layout.counter_addr, state.counters)
        self._cpu.reg_write_batch(list(zip(_VECTORS, state.vectors, strict=True)))

    def go_on(
        self, registers: tuple[int, ...], flags: int, start_off: int = 0
    ) -> tuple[int, int, tuple[int, ...]]:
        """Run from an offset in the block until it is left; the rest is as it was left.

        Returns:
            Program counter, flags and general registers.

        Raises:
            AssertionError: if it is not left by a branch to unmapped memory.
        """
        cpu = self._cpu
        values = zip(_REGISTERS.values(), registers, strict=True)
        cpu.reg_write_batch([*values, (_EFLAGS, flags)])
        try:
            cpu.emu_start(self._image.layout.block_addr + start_off, _UNTIL, count=_MAX_INSNS)
        except UcError as error:
            if error.errno != unicorn.UC_ERR_FETCH_UNMAPPED:
                raise AssertionError(f"{error} at {cpu.reg_read(_RIP):#x}") from error
        else:
            raise AssertionError("the block was not left")
        pc, flags, *after = cpu.reg_read_batch([_RIP, _EFLAGS, *_REGISTERS.values()])
        return pc, flags, tuple(after)

    def read_state(self) -> State:
        """Return all there is."""
        cpu = self._cpu
        values = cpu.reg_read_batch([_RIP, _EFLAGS, *_REGISTERS.values(), *_VECTORS])
        return State(
            pc=values[0],
            flags=values[1],
            registers=tuple(values[2:18]),
            vectors=tuple(values[18:]),
            stack=bytes(cpu.mem_read(_STACK_ADDR, _STACK_SIZE)),
            counters=bytes(cpu.mem_read(self._image.layout.counter_addr, _PAGE_SIZE)),
            fixed=self._read_fixed(),
        )

    def _read_fixed(self) -> bytes:
        """Return code and literals as they are now."""
        layout = self._image.layout
        code = self._cpu.mem_read(layout.block_addr, len(self._code))
        return bytes(code + self._cpu.mem_read(layout.literal_addr, _PAGE_SIZE))
