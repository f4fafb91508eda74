# SPDX-License-Identifier: Apache-2.0
"""What a learning block does beside branching: count hits, claim slots, write a trace.

A *hit* needs no scratch register: the operand is known to equal the target, so its register
is free until it is loaded with the target again. It counts in the row of its CPU: in a
restartable sequence where threads are registered for that, else with a locked increment in
the row that the segment limit of the vDSO's CPU-node segment names. Where no CPU has a row,
all count in row 0, locked.

An *unknown target* looks for the slot that has it, or claims a free one: at call sites in the
row of its CPU, in one restartable sequence for all slots, with a scratch register saved below
the stack pointer (dead there, and signal handlers keep off it). Everywhere else, in row 0, no
register being free: bit 63 of a slot's count is set by the one thread that claims it.

Who is disturbed in a sequence counts in row 0 with one locked instruction. So every branch is
counted once, whatever happens to the thread, and a debugger that steps always gets through;
row 0 tells how often that was.

Nothing is pushed, no branch is indirect, ``int3`` follows every jump; counters decide only what
is counted. Addresses that are written to are a literal plus a checked number, times a constant.
"""

from __future__ import annotations

from optpoline.model import CELL_SIZE, Addr, BlockPlan, CounterRows, OpenSlot, TraceRing
from optpoline.x86.assembler import Condition, RowOffset
from optpoline.x86.counter_insns import CounterAssembler
from optpoline.x86.restartable import LiteralPool, RestartableSection

__all__ = ["CountingCode"]

CPU_SEGMENT = 0x7B
"""Selector of the segment whose limit holds the CPU number: ``__CPUNODE_SEG``
(arch/x86/include/asm/segment.h)."""

CPU_SEGMENT_MASK = 0xFFF
"""Where in the limit: ``VDSO_CPUNODE_MASK``; the node is above."""

_CLAIMED_BIT = 63
"""Of ``model.SLOT_CLAIMED``."""

_TRACE_ENTRY_SHIFT = 2
"""Binary logarithm of the bytes of a trace's entry."""

_SAVED_OFF = -8
"""Where the scratch register is saved, from the stack pointer."""


class CountingCode:
    """Writes the counting parts of one block.

    Args:
        asm: Where to.
        plan: The block's plan.
        rows: The plan's rows.
        literals: Literals for rows, traces and targets out of reach.
    """

    def __init__(
        self, asm: CounterAssembler, plan: BlockPlan, rows: CounterRows, literals: LiteralPool
    ) -> None:
        """Look up what is counted where."""
        self._asm = asm
        self._plan = plan
        self._rows = rows
        self._literals = literals
        self._counters = dict(plan.hit_count_addrs)
        self._traced = {} if plan.trace is None else dict(plan.trace.ids)

    def is_noted(self, target: Addr) -> bool:
        """Tell whether hits of a target are counted or traced."""
        return target in self._counters or target in self._traced

    # --- hits

    def hit(self, target: Addr) -> None:
        """Note that the operand is a target, then go where it leads."""
        if self._plan.trace is not None and target in self._traced:
            self._trace(self._plan.trace, target)
        elif not self._rows.n_cpus:
            self._asm.lock_inc_mem(self._counters[target])
            self._leave(target)
        elif self._rows.rseq is not None:
            self._count_restartable(target)
        else:
            self._count_by_segment(target)

    def _leave(self, target: Addr) -> None:
        """Give the operand back, and go where it points, or to the thunk that does."""
        if target in self._plan.thunk_targets:
            self._asm.mov_from_literal(self._plan.operand, self._literals.addr_of(target))
            self._asm.jump(self._plan.miss_addr)
        else:
            self._asm.lea(self._plan.operand, target)
            self._asm.jump(target)

    def _count_restartable(self, target: Addr) -> None:
        """Count a hit in the row of this CPU."""
        cell = self._counters[target]
        section = RestartableSection(
            self._asm, self._rows, self._literals, scratch=self._plan.operand
        )
        section.begin()
        section.load_row()
        section.commit_increment(self._offset(cell))
        section.end()
        self._leave(target)
        section.abort()
        self._asm.lock_inc_mem(cell)
        self._leave(target)

    def _count_by_segment(self, target: Addr) -> None:
        """Count a hit in the row of the CPU that the thread was on a moment ago."""
        asm, rows, operand = self._asm, self._rows, self._plan.operand
        cell = self._counters[target]
        shared = asm.label()
        asm.mov_low32(operand, CPU_SEGMENT)
        asm.lsl_low32(operand)
        asm.branch_label(Condition.NOT_EQUAL, shared)
        asm.and_low32(operand, CPU_SEGMENT_MASK)
        asm.cmp_low32(operand, rows.n_cpus)
        asm.branch_label(Condition.ABOVE_EQUAL, shared)
        asm.shl(operand, rows.row_shift)
        asm.add_mem(operand, self._literals.addr_of(rows.cell_of_cpu(rows.shared_addr, 0)))
        asm.lock_inc_at(operand, self._offset(cell))
        self._leave(target)
        asm.bind(shared)
        asm.lock_inc_mem(cell)
        self._leave(target)

    def _trace(self, ring: TraceRing, target: Addr) -> None:
        """Write a hit to the trace."""
        asm, operand = self._asm, self._plan.operand
        asm.mov_low32(operand, 1)
        asm.lock_xadd_mem(ring.head_addr, operand)
        asm.and_low32(operand, ring.n_entries - 1)
        asm.shl(operand, _TRACE_ENTRY_SHIFT)
        asm.add_mem(operand, self._literals.addr_of(ring.entries_addr))
        asm.mov_imm32_to(operand, 0, self._traced[target])
        self._leave(target)

    # --- unknown targets

    def miss(self, overflow_addr: Addr) -> None:
        """Count a target that the tree does not know, then go to the thunk.

        Args:
            overflow_addr: Count of those that find no slot; the cell before it gets the last.
        """
        slots = self._plan.open_slots
        last_addr = Addr(overflow_addr - CELL_SIZE)
        overflow = OpenSlot(target_addr=last_addr, count_addr=overflow_addr)
        has_sequences = self._rows.rseq is not None and self._rows.n_cpus > 0
        if has_sequences and self._plan.is_below_stack_free:
            self._claim_restartable(slots, overflow)
        for slot in slots:
            self._claim_shared(slot)
        self._asm.mov_to_mem(overflow.target_addr, self._plan.operand)
        self._count_shared(overflow)

    def _claim_restartable(self, slots: tuple[OpenSlot, ...], overflow: OpenSlot) -> None:
        """Find or claim a slot of this CPU's row; go on behind if that is aborted."""
        asm, operand = self._asm, self._plan.operand
        scratch = "rax" if operand != "rax" else "rcx"
        section = RestartableSection(asm, self._rows, self._literals, scratch=scratch)
        commit = asm.label()
        asm.mov_to("rsp", _SAVED_OFF, scratch)
        section.begin()
        section.load_row()
        for slot in slots:
            found, following = asm.label(), asm.label()
            off = self._offset(slot.target_addr)
            section.compare_equal(off, operand, found)
            section.compare_not_zero(off, following)
            asm.bind(found)
            section.add(off)
            asm.jump_label(commit)
            asm.bind(following)
        section.add(self._offset(overflow.target_addr))
        asm.bind(commit)
        # Who ends between the two leaves a slot that is claimed and has no counts.
        section.store(0, operand)
        section.commit_increment(CELL_SIZE)
        section.end()
        asm.mov_from(scratch, "rsp", _SAVED_OFF)
        asm.jump(self._plan.miss_addr)
        section.abort()
        asm.mov_from(scratch, "rsp", _SAVED_OFF)

    def _claim_shared(self, slot: OpenSlot) -> None:
        """Count the operand in a slot of row 0 if it is there or the slot is free.

        Of two threads that find it free, one sets the bit; the other goes on to the next
        slot, as does who comes before the target is stored.
        """
        asm, operand = self._asm, self._plan.operand
        found, following = asm.label(), asm.label()
        asm.cmp_mem(operand, slot.target_addr)
        asm.branch_label(Condition.EQUAL, found)
        asm.cmp_mem_zero(slot.target_addr)
        asm.branch_label(Condition.NOT_EQUAL, following)
        asm.lock_bts_mem(slot.count_addr, _CLAIMED_BIT)
        asm.branch_label(Condition.BELOW, following)
        asm.mov_to_mem(slot.target_addr, operand)
        asm.bind(found)
        self._count_shared(slot)
        asm.bind(following)

    def _count_shared(self, slot: OpenSlot) -> None:
        """Count in row 0, and go to the thunk."""
        self._asm.lock_inc_mem(slot.count_addr)
        self._asm.jump(self._plan.miss_addr)

    def _offset(self, cell: Addr) -> RowOffset:
        """Return where in its row a cell is."""
        return RowOffset(cell - self._rows.shared_addr)
