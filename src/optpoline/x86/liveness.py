# SPDX-License-Identifier: Apache-2.0
"""Follow one general register along straight-line code until its value is dead or read.

``run_register`` answers for one run of instructions up to the next branch, as
``flags.run_flags`` does for the flags; the caller follows the branches. In doubt
a register is live: an instruction that writes it only sometimes counts as writing
nothing, and whatever ends a run in an unusual way as reading it. The lowest two
bytes are followed by themselves: compilers write and read them alone (``setae %al``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from iced_x86 import (
    Decoder,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    Mnemonic,
    OpAccess,
    Register,
    RegisterExt,
    UsedRegister,
)

from optpoline.model import Addr

__all__ = ["WHOLE_REGISTER", "RegisterFate", "RegisterRun", "run_register"]

_READS = frozenset(
    (OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE)
)
_LOW_BYTE, _HIGH_BYTE, _REST = 1, 2, 4
WHOLE_REGISTER = _LOW_BYTE | _HIGH_BYTE | _REST
"""Parts of a register: bits 0 to 7, 8 to 15, and the others."""

_HIGH_BYTES = frozenset((Register.AH, Register.BH, Register.CH, Register.DH))
_PARTS_BY_SIZE = {1: _LOW_BYTE, 2: _LOW_BYTE | _HIGH_BYTE}
"""What a name of so many bytes covers; writing the low half clears the other."""

_REGISTERS = {
    "rax": Register.RAX,
    "rcx": Register.RCX,
    "rdx": Register.RDX,
    "rbx": Register.RBX,
    "rbp": Register.RBP,
    "rsi": Register.RSI,
    "rdi": Register.RDI,
    **{f"r{n}": Register.R8 + n - 8 for n in range(8, 16)},
}

_INFO = InstructionInfoFactory()


class RegisterFate(Enum):
    """What becomes of the register's value at the end of a run."""

    DEAD = "dead"
    LIVE = "live"
    BRANCH = "branch"
    """Undecided: it depends on the run's successors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterRun:
    """A register along one run of instructions.

    Attributes:
        fate: What became of it.
        pending: Parts not yet written where the run branches.
        successors: Where a BRANCH goes on.
    """

    fate: RegisterFate
    pending: int = 0
    successors: tuple[Addr, ...] = ()


_DEAD = RegisterRun(fate=RegisterFate.DEAD)
_LIVE = RegisterRun(fate=RegisterFate.LIVE)


def run_register(
    code: bytes,
    addr: Addr,
    register: str,
    pending: int = WHOLE_REGISTER,
    forks: Mapping[Addr, tuple[Addr, ...]] | None = None,
) -> RegisterRun:
    """Follow a register from ``addr`` to the next branch, or until its fate is known.

    Args:
        code: Text from ``addr`` on. If it ends first, the register counts as live.
        addr: Where to begin.
        register: Its 64-bit name.
        pending: Parts that hold the value in question.
        forks: Instructions that may be changed into a branch and back, and where they lead.

    >>> run_register(bytes.fromhex("31c0c3"), Addr(0), "rax").fate.name  # xor eax, eax; ret
    'DEAD'
    >>> run_register(bytes.fromhex("b001c3"), Addr(0), "rax").fate.name  # mov al, 1; ret
    'LIVE'
    """
    wanted = _REGISTERS[register]
    for insn in Decoder(64, code, ip=addr):
        if insn.is_invalid:
            return _LIVE
        if forks and (ways := forks.get(Addr(insn.ip))):
            return _branch(pending, *ways)
        written = 0
        for used in _INFO.info(insn).used_registers():
            if RegisterExt.full_register(used.register) != wanted:
                continue
            parts = _parts_of(used)
            if used.access in _READS and parts & pending:
                return _LIVE
            if used.access == OpAccess.WRITE:
                written |= parts
        pending &= ~written
        if not pending:
            return _DEAD
        if insn.flow_control != FlowControl.NEXT:
            return _end_of_run(insn, pending)
    return _LIVE


def _parts_of(used: UsedRegister) -> int:
    """Return the parts of a register that the name used for it covers."""
    if used.register in _HIGH_BYTES:
        return _HIGH_BYTE
    return _PARTS_BY_SIZE.get(RegisterExt.size(used.register), WHOLE_REGISTER)


def _end_of_run(insn: Instruction, pending: int) -> RegisterRun:
    """Judge a run by the branch that ends it.

    A call is followed, as a jump is: gcc keeps values in registers that the ABI calls lost
    across calls of local functions that leave them alone (-fipa-ra), so only what the
    function itself writes is dead. What returns unwritten is live.
    """
    match insn.flow_control:
        case FlowControl.CALL if insn.mnemonic == Mnemonic.CALL:
            return _branch(pending, insn.near_branch_target)
        case FlowControl.UNCONDITIONAL_BRANCH:
            return _branch(pending, insn.near_branch_target)
        case FlowControl.CONDITIONAL_BRANCH:
            return _branch(pending, insn.near_branch_target, insn.next_ip)
        case _:
            return _LIVE


def _branch(pending: int, *ways: int) -> RegisterRun:
    """Return a run that goes on elsewhere."""
    successors = tuple(Addr(way) for way in ways)
    return RegisterRun(fate=RegisterFate.BRANCH, pending=pending, successors=successors)
