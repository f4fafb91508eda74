# SPDX-License-Identifier: Apache-2.0
"""The general registers of an x86-64 thread as ptrace carries them.

The layout is ``struct user_regs_struct`` (Linux, arch/x86/include/asm/user_64.h):
27 u64 in the order of the fields below; it is what NT_PRSTATUS holds.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = ["REGISTERS_SIZE", "USER_CODE_SELECTOR", "Registers", "decode_registers"]

_LAYOUT = struct.Struct("<27Q")
_U64_MASK = (1 << 64) - 1

REGISTERS_SIZE = _LAYOUT.size
"""Bytes of one NT_PRSTATUS register set."""

USER_CODE_SELECTOR = 0x33
"""cs of a thread in 64-bit mode (__USER_CS); 0x23 is 32-bit compatibility mode."""

_NO_SYSCALL = _U64_MASK
"""orig_rax of a thread that came into the kernel by an interrupt or exception."""

_CLONES = (56, 435)
"""clone and clone3; who calls it gets the number of the one that it makes, and that one 0."""


class Registers(NamedTuple):
    """One thread's general registers, each an unsigned 64-bit number.

    >>> regs = decode_registers(bytes(REGISTERS_SIZE))._replace(rip=0x1000)
    >>> decode_registers(regs.encode()).rip == regs.rip
    True
    """

    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int

    @property
    def in_syscall(self) -> bool:
        """Whether the thread came into the kernel by a system call."""
        return self.orig_rax != _NO_SYSCALL

    @property
    def syscall_args(self) -> tuple[int, ...]:
        """The six arguments of the call it came in by."""
        return self.rdi, self.rsi, self.rdx, self.r10, self.r8, self.r9

    @property
    def result(self) -> int:
        """Rax as a signed number: what a system call returned, or minus an error number."""
        return self.rax - (1 << 64) if self.rax >> 63 else self.rax

    @property
    def is_newborn(self) -> bool:
        """Whether the thread was made by clone or clone3, and has not run since."""
        return self.orig_rax in _CLONES and self.rax == 0

    def with_result(self, result: int) -> Registers:
        """Return these registers with rax set to a signed number."""
        return self._replace(rax=result & _U64_MASK)

    def with_call(self, *, insn_addr: int, sp: int, nr: int, args: tuple[int, ...]) -> Registers:
        """Return these registers ready to execute a system call.

        Args:
            insn_addr: Address of a ``syscall`` instruction.
            sp: Stack pointer.
            nr: Number of the system call.
            args: Up to six arguments; negative ones are taken as two's complement.

        Raises:
            ValueError: if there are more than six arguments.
        """
        if len(args) > 6:
            raise ValueError(f"a system call has at most six arguments, not {len(args)}")
        rdi, rsi, rdx, r10, r8, r9 = (*(a & _U64_MASK for a in args), *(0,) * (6 - len(args)))
        # orig_rax = -1: else the kernel would take rax for a result to be restarted.
        return self._replace(
            rax=nr, orig_rax=_NO_SYSCALL, rip=insn_addr, rsp=sp,
            rdi=rdi, rsi=rsi, rdx=rdx, r10=r10, r8=r8, r9=r9,
        )  # fmt: skip

    def encode(self) -> bytes:
        """Return them as ``struct user_regs_struct``."""
        return _LAYOUT.pack(*self)


def decode_registers(data: bytes) -> Registers:
    """Decode a ``struct user_regs_struct``.

    Raises:
        struct.error: if data does not have REGISTERS_SIZE bytes.
    """
    return Registers._make(_LAYOUT.unpack(data))
