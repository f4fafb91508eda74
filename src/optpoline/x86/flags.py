# SPDX-License-Identifier: Apache-2.0
"""Follow the arithmetic flags along straight-line code.

A block at a jump site destroys CF, PF, AF, ZF, SF and OF. That is unseen where
each of them is written before any is read. ``run_flags`` answers for one run
of instructions up to the next branch; the caller follows the branches, for it
knows the functions and thunks of the module.

Flags that an instruction leaves *undefined* count as written: a program that
reads them afterwards depends on nothing we change. Instructions that write
flags only for some operands (shifts by CL, repeated string compares) count as
writing nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from iced_x86 import Decoder, FlowControl, Instruction, Mnemonic, Register, RflagsBits

from optpoline.model import Addr

__all__ = ["ARITHMETIC_FLAGS", "FlagsFate", "FlagsRun", "run_flags"]

ARITHMETIC_FLAGS: int = (
    RflagsBits.CF | RflagsBits.PF | RflagsBits.AF | RflagsBits.ZF | RflagsBits.SF | RflagsBits.OF
)
"""The flags that a compare writes, as a set of the decoder's bits."""

_SHIFTS = frozenset(
    (
        Mnemonic.RCL,
        Mnemonic.RCR,
        Mnemonic.ROL,
        Mnemonic.ROR,
        Mnemonic.SAL,
        Mnemonic.SAR,
        Mnemonic.SHL,
        Mnemonic.SHLD,
        Mnemonic.SHR,
        Mnemonic.SHRD,
    )
)
"""They leave all flags alone when their count is zero, which CL may be."""

_END_OF_PATH = frozenset((Mnemonic.UD0, Mnemonic.UD1, Mnemonic.UD2, Mnemonic.HLT))
"""What compilers put where control must not come."""


class FlagsFate(Enum):
    """What becomes of the flags at the end of a run."""

    DEAD = "dead"
    LIVE = "live"
    BRANCH = "branch"
    """Undecided: it depends on the run's successors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagsRun:
    """The flags along one run of instructions.

    Attributes:
        fate: What became of them.
        pending: Flags not yet written where the run branches, as decoder bits.
        successors: Where a BRANCH goes on.
    """

    fate: FlagsFate
    pending: int = 0
    successors: tuple[Addr, ...] = ()


_DEAD = FlagsRun(fate=FlagsFate.DEAD)
_LIVE = FlagsRun(fate=FlagsFate.LIVE)


def run_flags(
    code: bytes,
    addr: Addr,
    pending: int = ARITHMETIC_FLAGS,
    forks: Mapping[Addr, tuple[Addr, ...]] | None = None,
) -> FlagsRun:
    """Follow flags from ``addr`` to the next branch, or until their fate is known.

    Args:
        code: Text from ``addr`` on. If it ends first, the flags count as live.
        addr: Where to begin.
        pending: Flags that hold the value in question, as decoder bits.
        forks: Instructions that may be changed into a branch and back, and where they lead.

    >>> run_flags(bytes.fromhex("31c0c3"), Addr(0)).fate.name  # xor eax, eax; ret
    'DEAD'
    >>> run_flags(bytes.fromhex("ffc01100"), Addr(0)).fate.name  # inc eax; adc [rax], eax
    'LIVE'
    """
    for raw in Decoder(64, code, ip=addr):
        if forks and (ways := forks.get(Addr(raw.ip))):
            return FlagsRun(fate=FlagsFate.BRANCH, pending=pending, successors=ways)
        if raw.is_invalid or raw.rflags_read & pending:
            return _LIVE
        flow = raw.flow_control
        if flow == FlowControl.NEXT:
            if raw.mnemonic in _END_OF_PATH:
                return _DEAD
            pending &= ~_written_flags(raw)
            if not pending:
                return _DEAD
        else:
            return _end_of_run(raw, pending)
    return _LIVE


def _end_of_run(raw: Instruction, pending: int) -> FlagsRun:
    """Judge a run by the branch that ends it."""
    match raw.flow_control:
        # The System V ABI keeps no arithmetic flag across a call or a return.
        case FlowControl.CALL | FlowControl.INDIRECT_CALL | FlowControl.RETURN:
            return _DEAD
        case FlowControl.UNCONDITIONAL_BRANCH:
            successors = (Addr(raw.near_branch_target),)
            return FlagsRun(fate=FlagsFate.BRANCH, pending=pending, successors=successors)
        case FlowControl.CONDITIONAL_BRANCH:
            successors_2 = (Addr(raw.near_branch_target), Addr(raw.next_ip))
            return FlagsRun(fate=FlagsFate.BRANCH, pending=pending, successors=successors_2)
        # jmp [rip+disp32] goes through one fixed slot: a tail call by way of the GOT.
        case FlowControl.INDIRECT_BRANCH if raw.is_ip_rel_memory_operand:
            return _DEAD
        case FlowControl.EXCEPTION if raw.mnemonic in _END_OF_PATH:
            return _DEAD
        case _:
            return _LIVE


def _written_flags(raw: Instruction) -> int:
    """Return the flags that an instruction writes whatever its operands are."""
    if raw.mnemonic in _SHIFTS and Register.CL in (raw.op1_register, raw.op2_register):
        return 0
    if raw.has_rep_prefix or raw.has_repne_prefix:
        return 0
    return raw.rflags_modified
