# SPDX-License-Identifier: Apache-2.0
"""The restartable sequences of a block, from the descriptors behind its instructions.

What the kernel demands of a descriptor, else the program dies (kernel/rseq.c,
rseq_get_rseq_cs), and what this project demands besides: all of it in the block, sequences
apart from each other, an abort handler behind its sequence and behind an undefined
instruction that holds the signature.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from iced_x86 import Code, Instruction, Register

from optpoline.x86.assembler import INT3, RECORD_ALIGNMENT

__all__ = ["Section", "read_sections"]

_DESCRIPTOR = struct.Struct("<IIQQQ")
"""struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip."""

_SIGNATURE_SIZE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One restartable sequence.

    Attributes:
        descriptor: Address of its descriptor.
        start: Its first instruction.
        end: What is behind its last.
        abort: Where the kernel leads who was disturbed.
    """

    descriptor: int
    start: int
    end: int
    abort: int


def read_sections(
    tail: bytes, addr: int, insns: Sequence[Instruction], signature: int | None
) -> tuple[tuple[Section, ...], tuple[int, ...]]:
    """Return the sequences of a block in address order, and where descriptors are wrong.

    Args:
        tail: What is behind the instructions.
        addr: Where that is.
        insns: The instructions.
        signature: What threads registered; None if they did not.
    """
    if not tail:
        return (), ()
    n_padding = -addr % RECORD_ALIGNMENT
    records = tail[n_padding:]
    is_padded = tail[:n_padding] == bytes((INT3,)) * n_padding
    if signature is None or not is_padded or not records or len(records) % _DESCRIPTOR.size:
        return (), (addr,)
    sections: list[Section] = []
    faults: list[int] = []
    starts = {insn.ip: insn for insn in insns}
    before = {insn.next_ip: insn for insn in insns}
    for number, (version, flags, start, size, abort) in enumerate(_DESCRIPTOR.iter_unpack(records)):
        at = addr + n_padding + number * _DESCRIPTOR.size
        section = Section(descriptor=at, start=start, end=start + size, abort=abort)
        if version == flags == 0 and _is_sound(section, starts, before, signature):
            sections.append(section)
        else:
            faults.append(at)
    sections.sort(key=lambda section: section.start)
    faults += [b.descriptor for a, b in pairwise(sections) if b.start < a.end]
    return tuple(sections), tuple(faults)


def _is_sound(
    section: Section,
    starts: Mapping[int, Instruction],
    before: Mapping[int, Instruction],
    signature: int,
) -> bool:
    """Tell whether a sequence ends with its commit, and aborts to behind its signature."""
    if not section.start < section.end < section.abort or not starts.keys() >= {
        section.start,
        section.end,
        section.abort,
    }:
        return False
    commit, mark = before[section.end], before[section.abort]
    is_commit = commit.code == Code.INC_RM64 and commit.memory_base not in (
        Register.NONE,
        Register.RIP,
    )
    marked = mark.memory_displacement - mark.next_ip & (1 << 8 * _SIGNATURE_SIZE) - 1
    return is_commit and is_mark(mark) and marked == signature


def is_mark(insn: Instruction) -> bool:
    """Tell whether an instruction is the one that holds a signature."""
    return insn.code == Code.UD1_R32_RM32 and insn.memory_base == Register.RIP
