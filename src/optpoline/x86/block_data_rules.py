# SPDX-License-Identifier: Apache-2.0
"""What a block's instructions may do that do not branch, and what each proves.

Any block may compare its operand with immediates, literals and counters, count, and take
a literal from its operand and add it again. Only a block that counts in rows may do more,
and only this::

    use its operand's register, and one that it has saved below the stack pointer
    point rseq_cs at a descriptor of its own right before that sequence, or at nothing
    write at a literal plus a checked number: in the row of the CPU that it is on, inside a
    sequence, or with a lock prefix; or in a trace

So the only memory that it can write, whatever the program has put into counters or into its
rseq area, are counters, ``rseq_cs``, and eight bytes that are dead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from iced_x86 import Code, Instruction, OpKind, Register, RegisterExt

from optpoline.model import CELL_SIZE, CounterRows
from optpoline.x86.assembler import REGISTER_NUMBERS
from optpoline.x86.block_sections import Section
from optpoline.x86.block_state import (
    ENTRY,
    UNKNOWN,
    Constant,
    Entry,
    Number,
    Origin,
    Pointer,
    State,
    Value,
)
from optpoline.x86.block_verdict import BlockRule, BlockScene
from optpoline.x86.counting_code import CPU_SEGMENT
from optpoline.x86.restartable import CPU_ID_OFF, RSEQ_CS_OFF

__all__ = ["DataRules", "is_cell"]

_WORD_MASK = (1 << 64) - 1
_REGISTER_NAMES = {number: name for name, number in REGISTER_NUMBERS.items()}
_SAVED_OFF = -8 & _WORD_MASK
_ENTRY_SIZE = 4
"""Bytes of a trace's entry."""


@dataclass(slots=True)
class DataRules:
    """Follows the instructions of one block that do not branch.

    Attributes:
        start: Where the block finds the operand in its register.
        scene: What is around it.
        operand: Register that its thunk branches to, None until one is seen.
        armable: Section by the address it starts at.
        fault: Notes a rule broken at an address.
    """

    start: int
    scene: BlockScene
    operand: str | None
    armable: Mapping[int, Section]
    fault: Callable[[BlockRule, int], None]

    def step(self, insn: Instruction, state: State) -> State | None:
        """Return the state behind an instruction; None if no block has it."""
        behind = self._step_plain(insn, state)
        if behind is None and self.scene.rows is not None:
            behind = self._step_counting(insn, state, self.scene.rows)
        return behind

    # --- any block

    def _step_plain(self, insn: Instruction, state: State) -> State | None:
        """Follow an instruction that any block may have; None if it is no such one."""
        if insn.has_lock_prefix or insn.has_segment_prefix:
            return None
        behind = state.without_flags()
        match insn.code:
            case Code.CMP_RAX_IMM32 | Code.CMP_RM64_IMM32 if insn.op0_kind == OpKind.REGISTER:
                entry = self._judge_operand(insn, 0, state)
                return self._compared(behind, entry, insn.immediate32to64 & _WORD_MASK)
            case Code.CMP_RM32_IMM32 if insn.op0_kind == OpKind.REGISTER:
                return self._compared_low(insn, state, behind)
            case Code.CMP_R64_RM64 if _is_rip_relative(insn):
                entry = self._judge_operand(insn, 0, state)
                return self._compared_with_cell(insn, behind, entry)
            case Code.CMP_RM64_IMM8 if _is_rip_relative(insn):
                self._judge_counter(insn)
                return replace(behind, has_flags=True)
            case Code.INC_RM64 if _is_rip_relative(insn):
                self._judge_counter(insn)
                return behind
            case Code.MOV_RM64_R64 if _is_rip_relative(insn):
                self._judge_operand(insn, 1, state)
                self._judge_counter(insn)
                return state  # flags are as they were
            case Code.SUB_R64_RM64 if _is_rip_relative(insn) and insn.ip == self.start:
                self._judge_operand(insn, 0, state)
                self._judge_literal(insn)
                based = Entry(insn.ip_rel_memory_address)
                return behind.with_value(_number(insn, 0), based)
            case Code.ADD_R64_RM64 if _is_rip_relative(insn) and not self._is_number(insn, state):
                self._judge_operand(insn, 0, state)
                if state.value_of(_number(insn, 0)) != Entry(insn.ip_rel_memory_address):
                    self.fault(BlockRule.REBASE, insn.ip)
                return behind.with_value(_number(insn, 0), ENTRY)
            case _:
                return None

    def _is_number(self, insn: Instruction, state: State) -> bool:
        """Tell whether an instruction's register holds a number that may become a pointer."""
        return isinstance(state.value_of(_number(insn, 0)), Number)

    def _compared(self, behind: State, entry: Entry, value: int) -> State:
        """Return the state behind a compare of the whole operand with a value."""
        base_addr = entry.base_addr
        if base_addr is not None and is_cell(base_addr, self.scene.literals):
            value = value + self.scene.read_literal(base_addr) & _WORD_MASK
        return replace(behind, compared=value, has_flags=True)

    def _compared_low(self, insn: Instruction, state: State, behind: State) -> State:
        """Return the state behind a compare of half a register with an immediate."""
        register = _number(insn, 0)
        value = state.value_of(register)
        if isinstance(value, Number) and value.limit <= 1 << 32 and not value.shift:
            return replace(behind, has_flags=True, bound=(register, insn.immediate32))
        self._judge_operand(insn, 0, state)
        return replace(behind, has_flags=True)  # the low half proves nothing

    def _compared_with_cell(self, insn: Instruction, behind: State, entry: Entry) -> State:
        """Return the state behind a compare with memory; counters prove nothing."""
        cell = insn.ip_rel_memory_address
        if is_cell(cell, self.scene.literals):
            return self._compared(behind, entry, self.scene.read_literal(cell))
        if not is_cell(cell, self.scene.counters):
            self.fault(BlockRule.LITERAL, insn.ip)
        return replace(behind, has_flags=True)

    # --- blocks that count in rows

    def _step_counting(self, insn: Instruction, state: State, rows: CounterRows) -> State | None:
        """Follow an instruction that only a block with rows may have; None if it is none."""
        if insn.has_segment_prefix:
            return self._step_thread(insn, state, rows)
        if insn.has_lock_prefix:
            return self._step_locked(insn, state, rows)
        if _is_through_register(insn):
            return self._step_memory(insn, state, rows)
        return self._step_register(insn, state)

    def _step_thread(self, insn: Instruction, state: State, rows: CounterRows) -> State | None:
        """Follow an instruction on the thread's rseq area."""
        if not _is_thread_memory(insn) or rows.rseq is None:
            return None
        area = rows.rseq.offset
        off = insn.memory_displacement
        match insn.code:
            case Code.MOV_R32_RM32 if off == area + CPU_ID_OFF & _WORD_MASK:
                number = Number(Origin.CPU_ID, state.armed, 1 << 32)
                return state.without_flags().with_value(_number(insn, 0), number)
            case Code.MOV_RM64_R64 if off == area + RSEQ_CS_OFF & _WORD_MASK:
                return self._armed(insn, state)
            case Code.MOV_RM64_IMM32 if off == area + RSEQ_CS_OFF & _WORD_MASK:
                if insn.immediate32to64:
                    self.fault(BlockRule.SECTION, insn.ip)
                return replace(state.without_flags(), armed=None)
            case _:
                return None

    def _armed(self, insn: Instruction, state: State) -> State:
        """Return the state behind a store to rseq_cs: right before that very sequence."""
        section = self.armable.get(insn.next_ip)
        stored = state.value_of(_number(insn, 1))
        if section is None or stored != Constant(section.descriptor) or state.armed is not None:
            self.fault(BlockRule.SECTION, insn.ip)
            return state.without_flags()
        return replace(state.without_flags(), armed=section.descriptor)

    def _step_locked(self, insn: Instruction, state: State, rows: CounterRows) -> State | None:
        """Follow an instruction with a lock prefix."""
        behind = state.without_flags()
        match insn.code:
            case Code.INC_RM64 if _is_rip_relative(insn):
                self._judge_counter(insn)
                return behind
            case Code.BTS_RM64_IMM8 if _is_rip_relative(insn):
                self._judge_counter(insn)
                return replace(behind, has_flags=True)
            case Code.XADD_RM64_R64 if _is_rip_relative(insn):
                self._judge_counter(insn)
                ticket = Number(Origin.TICKET, None, 1 << 64)
                return behind.with_value(_number(insn, 1), ticket)
            case Code.INC_RM64 if _is_through_register(insn):
                self._judge_row(insn, state, rows, (Origin.SEGMENT, Origin.CPU_ID))
                return behind
            case _:
                return None

    def _step_memory(self, insn: Instruction, state: State, rows: CounterRows) -> State | None:
        """Follow an instruction on memory through a register, without a lock prefix."""
        behind = state.without_flags()
        match insn.code:
            case Code.MOV_RM64_R64 if _is_below_stack(insn):
                if not self.scene.is_below_stack_free or not self._is_savable(insn, state):
                    self.fault(BlockRule.STACK, insn.ip)
                return replace(behind, saved=_number(insn, 1))
            case Code.MOV_R64_RM64 if _is_below_stack(insn):
                if state.saved != _number(insn, 0):
                    self.fault(BlockRule.RESTORE, insn.ip)
                return behind.with_value(_number(insn, 0), ENTRY)
            case Code.CMP_R64_RM64:
                self._judge_operand(insn, 0, state)
                self._judge_row(insn, state, rows, (Origin.CPU_ID,))
                return replace(behind, has_flags=True)
            case Code.CMP_RM64_IMM8:
                self._judge_row(insn, state, rows, (Origin.CPU_ID,))
                return replace(behind, has_flags=True)
            case Code.MOV_RM64_R64:
                self._judge_operand(insn, 1, state)
                self._judge_own_row(insn, state, rows)
                return behind
            case Code.INC_RM64:
                self._judge_own_row(insn, state, rows)
                if all(one.end != insn.next_ip for one in self.armable.values()):
                    self.fault(BlockRule.SECTION, insn.ip)
                return behind
            case Code.MOV_RM32_IMM32:
                self._judge_trace(insn, state)
                return behind
            case _:
                return None

    def _is_savable(self, insn: Instruction, state: State) -> bool:
        """Tell whether a register may be saved: as it was on entry, and none is saved yet."""
        return state.saved is None and state.value_of(_number(insn, 1)) == ENTRY

    def _step_register(self, insn: Instruction, state: State) -> State | None:
        """Follow an instruction that writes the operand's register or one that was saved."""
        value = self._written(insn, state)
        if value is None:
            return None
        register = _number(insn, 0)
        if register != state.saved and _REGISTER_NAMES[register] != self.operand:
            self.fault(BlockRule.REGISTER_WRITE, insn.ip)
        behind = state.without_flags().with_value(register, value)
        return replace(behind, has_flags=insn.code == Code.LSL_R32_R32M16)

    def _written(self, insn: Instruction, state: State) -> Value | None:
        """Return what an instruction leaves in its register; None if no block has it."""
        if insn.op0_kind != OpKind.REGISTER:
            return None
        value = state.value_of(_number(insn, 0))
        match insn.code:
            case Code.LEA_R64_M if insn.memory_base == Register.RIP:
                return Constant(insn.ip_rel_memory_address)
            case Code.MOV_R64_RM64 if _is_rip_relative(insn):
                self._judge_literal(insn)
                if not is_cell(insn.ip_rel_memory_address, self.scene.literals):
                    return UNKNOWN
                return Constant(self.scene.read_literal(insn.ip_rel_memory_address))
            case Code.MOV_R32_IMM32:
                return Constant(insn.immediate32)
            case Code.LSL_R32_R32M16 if insn.op1_register == insn.op0_register:
                if value != Constant(CPU_SEGMENT):
                    self.fault(BlockRule.COUNTER, insn.ip)
                return Number(Origin.SEGMENT, None, 1 << 32)
            case Code.AND_RM32_IMM32 if isinstance(value, Number) and not value.shift:
                return replace(value, limit=min(value.limit, insn.immediate32 + 1))
            case Code.SHL_RM64_IMM8 if isinstance(value, Number) and not value.shift:
                is_whole = insn.immediate8 < 64 and value.limit - 1 << insn.immediate8 <= _WORD_MASK
                return replace(value, shift=insn.immediate8) if is_whole else UNKNOWN
            case Code.ADD_R64_RM64 if isinstance(value, Number) and _is_rip_relative(insn):
                self._judge_literal(insn)
                if not is_cell(insn.ip_rel_memory_address, self.scene.literals):
                    return UNKNOWN
                return Pointer(value, self.scene.read_literal(insn.ip_rel_memory_address))
            case Code.ADD_RM64_IMM32 if isinstance(value, Pointer):
                added = insn.immediate32to64
                return replace(value, offsets=frozenset(off + added for off in value.offsets))
            case _:
                return None

    # --- memory

    def _judge_row(
        self, insn: Instruction, state: State, rows: CounterRows, origins: tuple[Origin, ...]
    ) -> None:
        """Check that an operand is a cell in a CPU's row."""
        pointer = _pointer(insn, state)
        low, high = self.scene.counters
        are_rows_counters = low <= rows.shared_addr and rows.shared_addr + rows.size <= high
        if (
            pointer is None
            or not are_rows_counters
            or pointer.number.origin not in origins
            or pointer.number.limit > rows.n_cpus
            or pointer.number.shift != rows.row_shift
            or pointer.base != rows.cell_of_cpu(rows.shared_addr, 0)
            or not all(is_cell(off, (0, rows.row_size)) for off in pointer.offsets)
        ):
            self.fault(BlockRule.COUNTER, insn.ip)

    def _judge_own_row(self, insn: Instruction, state: State, rows: CounterRows) -> None:
        """Check that an operand is a cell in the row of the CPU that the thread is on."""
        self._judge_row(insn, state, rows, (Origin.CPU_ID,))
        pointer = _pointer(insn, state)
        section = None if pointer is None else pointer.number.section
        if section is None or not any(
            one.descriptor == section == state.armed and one.start <= insn.ip < one.end
            for one in self.armable.values()
        ):
            self.fault(BlockRule.SECTION, insn.ip)

    def _judge_trace(self, insn: Instruction, state: State) -> None:
        """Check that an operand is an entry of a trace among the counters."""
        pointer = _pointer(insn, state)
        low, high = self.scene.counters
        if (
            pointer is None
            or pointer.number.origin is not Origin.TICKET
            or 1 << pointer.number.shift != _ENTRY_SIZE
            or pointer.base % _ENTRY_SIZE
            or pointer.offsets != {0}
            or not low <= pointer.base <= high - pointer.number.limit * _ENTRY_SIZE
        ):
            self.fault(BlockRule.COUNTER, insn.ip)

    def _judge_operand(self, insn: Instruction, position: int, state: State) -> Entry:
        """Check that an instruction means the register that the thunk branches to, unchanged."""
        register = _number(insn, position)
        if self.operand is None:
            self.operand = _REGISTER_NAMES[register]
        value = state.value_of(register)
        if _REGISTER_NAMES[register] != self.operand or not isinstance(value, Entry):
            self.fault(BlockRule.OPERAND, insn.ip)
        return value if isinstance(value, Entry) else ENTRY

    def _judge_literal(self, insn: Instruction) -> None:
        """Check that an instruction reads a literal."""
        if not is_cell(insn.ip_rel_memory_address, self.scene.literals):
            self.fault(BlockRule.LITERAL, insn.ip)

    def _judge_counter(self, insn: Instruction) -> None:
        """Check that an instruction uses a counter cell."""
        if not is_cell(insn.ip_rel_memory_address, self.scene.counters):
            self.fault(BlockRule.COUNTER, insn.ip)


def is_cell(addr: int, part: tuple[int, int]) -> bool:
    """Tell whether an address is an aligned cell of a part of the arena."""
    return part[0] <= addr <= part[1] - CELL_SIZE and addr % CELL_SIZE == 0


def _number(insn: Instruction, position: int) -> int:
    """Return the number of the general register that is an instruction's operand."""
    return RegisterExt.number(insn.op_register(position))


def _pointer(insn: Instruction, state: State) -> Pointer | None:
    """Return where an operand in memory may be; None if that is not known."""
    value = state.value_of(RegisterExt.number(insn.memory_base))
    if not isinstance(value, Pointer):
        return None
    disp = insn.memory_displacement
    disp -= (disp >> 63) << 64
    return replace(value, offsets=frozenset(off + disp for off in value.offsets))


def _is_rip_relative(insn: Instruction) -> bool:
    """Tell whether an instruction's memory operand is at a fixed distance from it."""
    kinds = (insn.op0_kind, insn.op1_kind)
    return OpKind.MEMORY in kinds and insn.memory_base == Register.RIP


def _is_through_register(insn: Instruction) -> bool:
    """Tell whether an instruction's memory operand is at a fixed distance from a register."""
    kinds = (insn.op0_kind, insn.op1_kind)
    return (
        OpKind.MEMORY in kinds
        and RegisterExt.is_gpr64(insn.memory_base)
        and insn.memory_index == Register.NONE
    )


def _is_below_stack(insn: Instruction) -> bool:
    """Tell whether an instruction's memory operand is what lies below the stack pointer."""
    return insn.memory_base == Register.RSP and insn.memory_displacement == _SAVED_OFF


def _is_thread_memory(insn: Instruction) -> bool:
    """Tell whether an instruction's memory operand is at a fixed distance from %fs."""
    return (
        insn.segment_prefix == Register.FS
        and not insn.has_lock_prefix
        and insn.memory_base == insn.memory_index == Register.NONE
        and insn.memory_displ_size == CELL_SIZE
    )
