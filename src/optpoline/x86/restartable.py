# SPDX-License-Identifier: Apache-2.0
"""Restartable sequences: operations on the counter row of the CPU a thread runs on.

A builder after librseq's operations. An operation on a CPU's own row is a few lines::

    section = RestartableSection(asm, rows, literals, scratch="rax")
    section.begin()                       rseq_cs = descriptor
    section.load_row()                    start: rax = row of this CPU, or abort
    section.compare_equal(0, "rdx", got)  if row[0] == rdx: goto got
    section.add(16)                       rax += 16
    section.store(0, "rdx")               row[0] = rdx
    section.commit_increment(8)           row[1]++
    section.end()                         end: rseq_cs = 0
    ...                                   leave the block
    section.abort()                       abort: rseq_cs = 0

The kernel moves a thread to ``abort`` that was preempted, moved to another CPU or had a signal
delivered between ``start`` and ``end``; nothing here starts again, so what is written behind
``abort`` must do the work in another way. Each sequence has a descriptor (struct rseq_cs of
include/uapi/linux/rseq.h) among the block's records. What the kernel demands of it, else the
program dies of SIGSEGV (kernel/rseq.c, rseq_get_rseq_cs): version 0, both ends and the abort
handler in user space, the handler not inside, the registered signature before it; no flags.

Invariants:
  * Only the last instruction before ``end`` changes what others rely on.
  * ``rseq_cs`` holds the descriptor only while the thread is in the block: it is cleared at
    the end, not left to the kernel. So a descriptor lives as long as its block has to.
  * The CPU number is read inside the sequence, from ``cpu_id`` alone: had it changed, the
    thread would be in the handler. ``cpu_id_start`` is not needed, and holds no CPU number in
    programs whose allocator keeps a pointer there. Threads that are not registered have a
    number below 0 in ``cpu_id``, which as an unsigned one is beyond every row, as is
    whatever the program writes there itself (design rule 5).
"""

from __future__ import annotations

from typing import Protocol

from optpoline.model import Addr, CounterRows
from optpoline.x86.assembler import Condition, Label
from optpoline.x86.counter_insns import CounterAssembler

__all__ = ["CPU_ID_OFF", "RSEQ_CS_OFF", "LiteralPool", "RestartableSection"]

CPU_ID_OFF = 4
"""Offset of ``cpu_id`` in struct rseq (include/uapi/linux/rseq.h)."""

RSEQ_CS_OFF = 8
"""Offset of ``rseq_cs`` in struct rseq."""


class LiteralPool(Protocol):
    """Where literals live: read-only memory within reach of the block."""

    def addr_of(self, value: int) -> Addr:
        """Return the address of a u64 cell that holds ``value``."""


class RestartableSection:
    """One restartable sequence being written.

    Args:
        asm: Where to.
        rows: The rows, of a program whose threads register restartable sequences.
        literals: For the address of the first CPU's row.
        scratch: Register that holds the row, then what was added to it; not restored here.
    """

    def __init__(
        self, asm: CounterAssembler, rows: CounterRows, literals: LiteralPool, *, scratch: str
    ) -> None:
        """Make its descriptor.

        Raises:
            ValueError: if threads of the program are not registered.
        """
        if rows.rseq is None:
            raise ValueError("rows without registered threads have no restartable sequences")
        self._asm = asm
        self._rows = rows
        self._rseq = rows.rseq
        self._literals = literals
        self._scratch = scratch
        self._start, self._end, self._abort = asm.label(), asm.label(), asm.label()
        # version and flags, start_ip, post_commit_offset, abort_ip
        self._descriptor = asm.record(0, self._start, (self._start, self._end), self._abort)

    def begin(self) -> None:
        """Tell the kernel, and start."""
        self._asm.lea(self._scratch, self._descriptor)
        self._asm.mov_to_thread(self._rseq.offset + RSEQ_CS_OFF, self._scratch)
        self._asm.bind(self._start)

    def load_row(self) -> None:
        """Load the address of this CPU's row; abort if it has none."""
        asm, rows = self._asm, self._rows
        asm.mov_low32_from_thread(self._scratch, self._rseq.offset + CPU_ID_OFF)
        asm.cmp_low32(self._scratch, rows.n_cpus)
        asm.branch_label(Condition.ABOVE_EQUAL, self._abort)
        asm.shl(self._scratch, rows.row_shift)
        asm.add_mem(self._scratch, self._literals.addr_of(rows.cell_of_cpu(rows.shared_addr, 0)))

    def compare_equal(self, off: int, register: str, label: Label) -> None:
        """Branch if the u64 at an offset equals a register."""
        self._asm.cmp_at(self._scratch, off, register)
        self._asm.branch_label(Condition.EQUAL, label)

    def compare_not_zero(self, off: int, label: Label) -> None:
        """Branch if the u64 at an offset is not 0."""
        self._asm.cmp_at_zero(self._scratch, off)
        self._asm.branch_label(Condition.NOT_EQUAL, label)

    def add(self, value: int) -> None:
        """Add to the address in the scratch register."""
        self._asm.add_imm32(self._scratch, value)

    def store(self, off: int, register: str) -> None:
        """Store a register at an offset; must do no harm if the sequence ends there."""
        self._asm.mov_to(self._scratch, off, register)

    def commit_increment(self, off: int) -> None:
        """Add one to the u64 at an offset, and be done."""
        self._asm.inc_at(self._scratch, off)
        self._asm.bind(self._end)

    def end(self) -> None:
        """Tell the kernel that it is over; behind a commit."""
        self._asm.mov_zero_to_thread(self._rseq.offset + RSEQ_CS_OFF)

    def abort(self) -> None:
        """Begin the abort handler; behind a jump.

        Who comes from ``load_row`` has the descriptor registered still, who comes from the
        kernel has not: it is cleared for both.
        """
        self._asm.signature(self._rseq.signature)
        self._asm.bind(self._abort)
        self.end()
