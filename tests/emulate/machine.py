# SPDX-License-Identifier: Apache-2.0
"""One block in an emulated CPU, surrounded by nothing.

Only the block, its literals, its counters, a stack and the page that ``%fs`` points into
are mapped, with the rights they have in a program. Leaving the block therefore ends in a fetch
from unmapped memory, and any other access is an error.

The segment whose limit holds the CPU number is in a descriptor table of our own. A thread
can be stopped at any instruction; ``return_to_user`` does to it then what Linux does when it
comes back: it looks at ``rseq_cs`` and the descriptor there, and writes the CPU number.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, replace

import unicorn
from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import Uc, UcError

from optpoline.x86.assembler import REGISTER_NUMBERS
from tests.emulate.block_kinds import COUNTERS_SIZE, N_CPUS, RSEQ, Image

__all__ = [
    "ARITHMETIC_FLAGS",
    "FS_BASE",
    "NO_CPU",
    "STACK_ADDR",
    "Machine",
    "State",
    "random_state",
]

ARITHMETIC_FLAGS = 0x8D5
"""CF, PF, AF, ZF, SF and OF."""

_KEPT_FLAGS = 0x4_0402
"""AC and DF, which a program may have set; bit 1 is always set."""

_PAGE_SIZE = 4096
STACK_ADDR = 0x7FFC_1234_0000
_STACK_SIZE = 2 * _PAGE_SIZE
_UNTIL = 0x10  # never reached; unmapped
_THREAD_ADDR = 0x7F77_0000_0000
FS_BASE = _THREAD_ADDR + 0x800
_GDT_ADDR = 0x7F78_0000_0000
_GDT_SIZE = 16 * 8
_CPU_SEGMENT = 15
"""Number of the CPU-node segment in the table: ``GDT_ENTRY_CPUNODE``."""

_TASK_SIZE = (1 << 47) - 4096
_DESCRIPTOR = struct.Struct("<IIQQQ")
"""struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip."""

NO_CPU = (1 << 32) - 1
"""As an unregistered thread has it in ``cpu_id``; for a segment that cannot be looked at."""

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
        counters: Counter cells and trace.
        fixed: Code and literals.
        thread: The page that ``%fs`` points into.
        cpu: The CPU that the thread is on, as it sees it; ``NO_CPU`` or any u32 if it does not.
    """

    pc: int
    flags: int
    registers: tuple[int, ...]
    vectors: tuple[int, ...]
    stack: bytes
    counters: bytes
    fixed: bytes
    thread: bytes
    cpu: int

    @property
    def rseq_cs(self) -> int:
        """What ``rseq_cs`` holds."""
        off = _RSEQ_OFF + 8
        return int.from_bytes(self.thread[off : off + 8], "little")

    def with_rseq_cs(self, value: int) -> State:
        """Return the state with another ``rseq_cs``."""
        thread = bytearray(self.thread)
        struct.pack_into("<Q", thread, _RSEQ_OFF + 8, value)
        return replace(self, thread=bytes(thread))


_RSEQ_OFF = FS_BASE + RSEQ.offset - _THREAD_ADDR
"""Of struct rseq in that page."""


def random_state(
    rng: random.Random, operand: str, value: int, counters: bytes, cpu: int | None = None
) -> State:
    """Return a random state with a value in the operand, on some CPU."""
    if cpu is None:
        cpu = rng.choice((*range(N_CPUS), *range(N_CPUS), N_CPUS, NO_CPU, rng.getrandbits(32)))
    thread = bytearray(rng.randbytes(_PAGE_SIZE))
    # cpu_id_start holds anything at all: some programs keep other things there.
    struct.pack_into("<I", thread, _RSEQ_OFF + 4, cpu)
    registers = [rng.getrandbits(64) for _ in REGISTER_NUMBERS]
    # On a call the return address makes rsp a multiple of 8 only; deep enough for a red zone.
    registers[REGISTER_NUMBERS["rsp"]] = STACK_ADDR + 8 * rng.randrange(64, _STACK_SIZE // 8 - 8)
    registers[REGISTER_NUMBERS[operand]] = value
    return State(
        pc=0,
        flags=_KEPT_FLAGS & (rng.getrandbits(32) | 2) | ARITHMETIC_FLAGS & rng.getrandbits(32),
        registers=tuple(registers),
        vectors=tuple(rng.getrandbits(128) for _ in _VECTORS),
        stack=rng.randbytes(_STACK_SIZE),
        counters=counters,
        fixed=b"",
        thread=bytes(thread),
        cpu=cpu,
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
        self._cpu.mem_map(layout.counter_addr, COUNTERS_SIZE, rw)
        self._cpu.mem_map(STACK_ADDR, _STACK_SIZE, rw)
        self._cpu.mem_map(_THREAD_ADDR, _PAGE_SIZE, rw)
        self._cpu.mem_map(_GDT_ADDR, _PAGE_SIZE, unicorn.UC_PROT_READ)
        self._cpu.reg_write(x86.UC_X86_REG_FS_BASE, FS_BASE)
        self._cpu.mem_write(layout.block_addr, self._code)
        for value, addr in image.literals.values.items():
            self._cpu.mem_write(addr, value.to_bytes(8, "little"))
        self._fixed = self._read_fixed()
        self._state_cpu = NO_CPU

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
        self._cpu.mem_write(STACK_ADDR, state.stack)
        self._cpu.mem_write(self._image.layout.counter_addr, state.counters)
        self._cpu.mem_write(_THREAD_ADDR, state.thread)
        self._load_segment(state.cpu)
        self._state_cpu = state.cpu
        self._cpu.reg_write_batch(list(zip(_VECTORS, state.vectors, strict=True)))

    def _load_segment(self, cpu: int) -> None:
        """Put a CPU number, and some node above it, into the limit of its segment."""
        limit = cpu & 0xFFF | 0x5A << 12
        # Base 0, present, read-only data, privilege 3, limit in bytes.
        word = limit & 0xFFFF | (limit >> 16) << 48 | 0xF1 << 40
        self._cpu.mem_write(_GDT_ADDR + 8 * _CPU_SEGMENT, word.to_bytes(8, "little"))
        size = 8 if cpu == NO_CPU else _GDT_SIZE
        self._cpu.reg_write(x86.UC_X86_REG_GDTR, (0, _GDT_ADDR, size - 1, 0))

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

    # --- a thread that is stopped in between

    def enter(self, state: State) -> None:
        """Put a thread at the head of the block."""
        self.load(state)
        self.set_context((self._image.layout.block_addr, state.flags, *state.registers))

    def enter_again(self, registers: tuple[int, ...], flags: int) -> None:
        """Put the thread at the head once more, as a signal handler would come there."""
        self.set_context((self._image.layout.block_addr, flags, *registers))

    @property
    def pc(self) -> int:
        """Where the thread is."""
        return int(self._cpu.reg_read(_RIP))

    @property
    def is_left(self) -> bool:
        """Whether it has left the block."""
        start = self._image.layout.block_addr
        return not start <= self.pc < start + len(self._image.text)

    def step(self) -> None:
        """Let it do one instruction."""
        try:
            self._cpu.emu_start(self.pc, _UNTIL, count=1)
        except UcError as error:
            if error.errno != unicorn.UC_ERR_FETCH_UNMAPPED or not self.is_left:
                raise AssertionError(f"{error} at {self.pc:#x}") from error

    def step_out(self) -> None:
        """Let it go on until it has left the block."""
        for _ in range(_MAX_INSNS):
            if self.is_left:
                return
            self.step()
        raise AssertionError("the block was not left")

    def context(self) -> tuple[int, ...]:
        """Return what a signal frame has: program counter, flags, registers."""
        return tuple(self._cpu.reg_read_batch([_RIP, _EFLAGS, *_REGISTERS.values()]))

    def set_context(self, values: tuple[int, ...]) -> None:
        """Go on as a signal frame says."""
        numbers = (_RIP, _EFLAGS, *_REGISTERS.values())
        self._cpu.reg_write_batch(list(zip(numbers, values, strict=True)))

    def return_to_user(self, cpu: int) -> bool:
        """Do what the kernel does to a thread that was preempted; tell whether it was disturbed.

        After rseq_ip_fixup and rseq_get_rseq_cs of kernel/rseq.c, where a failed check would
        kill the program.
        """
        area = FS_BASE + RSEQ.offset
        at = int.from_bytes(self._cpu.mem_read(area + 8, 8), "little")
        is_inside = False
        if at:
            assert at % 32 == 0
            version, flags, start, size, abort = _DESCRIPTOR.unpack(self._cpu.mem_read(at, 32))
            assert version == flags == 0
            assert max(start, start + size, abort) < _TASK_SIZE
            assert (abort - start) % (1 << 64) >= size
            signature = int.from_bytes(self._cpu.mem_read(abort - 4, 4), "little")
            assert signature == RSEQ.signature
            is_inside = (self.pc - start) % (1 << 64) < size
            if is_inside:
                self._cpu.reg_write(_RIP, abort)
            self._cpu.mem_write(area + 8, bytes(8))
        self._cpu.mem_write(area, struct.pack("<II", cpu % N_CPUS, cpu))
        self._load_segment(cpu)
        return is_inside

    def read_state(self) -> State:
        """Return all there is."""
        cpu = self._cpu
        values = cpu.reg_read_batch([_RIP, _EFLAGS, *_REGISTERS.values(), *_VECTORS])
        return State(
            pc=values[0],
            flags=values[1],
            registers=tuple(values[2:18]),
            vectors=tuple(values[18:]),
            stack=bytes(cpu.mem_read(STACK_ADDR, _STACK_SIZE)),
            counters=bytes(cpu.mem_read(self._image.layout.counter_addr, COUNTERS_SIZE)),
            fixed=self._read_fixed(),
            thread=bytes(cpu.mem_read(_THREAD_ADDR, _PAGE_SIZE)),
            cpu=self._state_cpu,
        )

    def _read_fixed(self) -> bytes:
        """Return code and literals as they are now."""
        layout = self._image.layout
        code = self._cpu.mem_read(layout.block_addr, len(self._code))
        return bytes(code + self._cpu.mem_read(layout.literal_addr, _PAGE_SIZE))
