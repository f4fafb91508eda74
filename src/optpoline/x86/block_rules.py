# SPDX-License-Identifier: Apache-2.0
"""Judge the bytes of a block: whether they can do anything but go where they should.

Nothing is taken from the encoder but its shape of a head. The bytes are decoded and
followed, branch by branch, with what each way proves about the operand::

    cmp reg, K ; je X       the operand is K where the branch is taken: X must be K
    anything else           may stay inside the block, or end at the site's own thunk

So a block without a fault goes where the operand points or to the thunk, whatever it
is given: no promise of the controller is needed for that but the literals, which are
read as well. Branches inside a block only lead forward, which makes one pass enough.

Non-goals: whether a block is fast, or counts what it should.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from iced_x86 import (
    Code,
    ConditionCode,
    Decoder,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    OpAccess,
    OpKind,
    Register,
    RegisterExt,
)

from optpoline.model import Addr
from optpoline.x86.assembler import JMP32_SIZE, REGISTER_NUMBERS
from optpoline.x86.block_verdict import BlockFault, BlockRule, BlockScene, BlockVerdict
from optpoline.x86.blocks import BLOCK_ALIGNMENT

__all__ = ["judge_block"]

_CELL_SIZE = 8
_WORD_MASK = (1 << 64) - 1
_REGISTER_NAMES = {number: name for name, number in REGISTER_NUMBERS.items()}
_WRITES = (OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE)


def judge_block(code: bytes, addr: Addr, scene: BlockScene) -> BlockVerdict:
    """Follow a block from its head, as encoded, and return what is wrong with it.

    Args:
        code: Its bytes, a redirection of the head undone.
        addr: Where it is.
        scene: What is around it.
    """
    return _Judge(code, addr, scene).judge()


@dataclass(frozen=True, slots=True)
class _State:
    """What is known before an instruction, on every way to it.

    Attributes:
        base_addr: Literal that was subtracted from the operand, or None.
        known: What the operand was on entry, or None.
        compared: What a zero flag would prove the operand to have been on entry, or None.
        has_flags: Whether a compare has set the flags.
    """

    base_addr: int | None = None
    known: int | None = None
    compared: int | None = None
    has_flags: bool = False


class _Judge:
    """One block being judged."""

    def __init__(self, code: bytes, addr: Addr, scene: BlockScene) -> None:
        """Decode it."""
        self._insns = list(Decoder(64, code, ip=addr))
        self._addr = addr
        self._end = addr + len(code)
        self._scene = scene
        self._operand = scene.operand
        self._faults: list[BlockFault] = []
        self._stale: list[Addr] = []
        self._starts = {insn.ip for insn in self._insns}
        self._ways: dict[int, _State] = {addr: _State()}
        self._info = InstructionInfoFactory()

    def judge(self) -> BlockVerdict:
        """Look at each instruction once, in address order."""
        self._judge_head()
        for number, insn in enumerate(self._insns):
            state = self._ways.get(insn.ip)
            if insn.code == Code.INT3:
                self._judge_int3(number, is_reached=state is not None)
            elif state is None:
                self._judge_stray(insn)
            else:
                following = self._step(insn, state)
                if following is not None:
                    self._lead(insn.ip, insn.next_ip, following)
                elif insn.flow_control == FlowControl.UNCONDITIONAL_BRANCH:
                    self._judge_behind_jump(number)
        faults = sorted(set(self._faults), key=lambda fault: (fault.addr, fault.rule.value))
        return BlockVerdict(faults=tuple(faults), stale=tuple(dict.fromkeys(self._stale)))

    def _fault(self, rule: BlockRule, addr: int) -> None:
        """Note a rule broken."""
        self._faults.append(BlockFault(rule=rule, addr=Addr(addr)))

    def _judge_head(self) -> None:
        """Check that a redirection moves no boundary inside the head."""
        is_jump = bool(self._insns) and self._insns[0].code == Code.JMP_REL32_64
        inside = {self._addr + off for off in range(1, JMP32_SIZE + 1)} & self._starts
        if is_jump:
            inside.discard(self._addr + JMP32_SIZE)  # its int3, as the redirection has it
        if inside or self._addr % BLOCK_ALIGNMENT:
            self._fault(BlockRule.HEAD, self._addr)

    def _judge_int3(self, number: int, *, is_reached: bool) -> None:
        """Check that an int3 stands behind a jump, where nothing comes to."""
        before = self._insns[number - 1] if number else None
        if is_reached:
            self._fault(BlockRule.FALL_OUT, self._insns[number].ip)
        elif before is None or before.flow_control != FlowControl.UNCONDITIONAL_BRANCH:
            self._fault(BlockRule.STRAY, self._insns[number].ip)

    def _judge_behind_jump(self, number: int) -> None:
        """Check that an int3 follows a jump."""
        following = self._insns[number + 1] if number + 1 < len(self._insns) else None
        if following is None or following.code != Code.INT3:
            self._fault(BlockRule.SPECULATION, self._insns[number].ip)

    def _judge_stray(self, insn: Instruction) -> None:
        """Name code that nothing leads to by the worst it is."""
        rule = self._forbidden_rule(insn)
        is_odd = rule is BlockRule.UNKNOWN_INSN or insn.flow_control == FlowControl.NEXT
        self._fault(BlockRule.STRAY if is_odd else rule, insn.ip)

    # --- ways

    def _lead(self, src: int, dst: int, state: _State) -> None:
        """Note that control may come to ``dst`` in a state."""
        if dst >= self._end:
            self._fault(BlockRule.FALL_OUT, src)
            return
        other = self._ways.get(dst, state)
        if other.base_addr != state.base_addr:
            self._fault(BlockRule.REBASE, dst)
        self._ways[dst] = _State(
            base_addr=state.base_addr,
            known=state.known if state.known == other.known else None,
            compared=state.compared if state.compared == other.compared else None,
            has_flags=state.has_flags and other.has_flags,
        )

    def _step(self, insn: Instruction, state: _State) -> _State | None:
        """Follow one instruction; return the state behind it, None if nothing comes there."""
        if _has_odd_prefix(insn):
            self._fault(BlockRule.UNKNOWN_INSN, insn.ip)
            return None
        match insn.flow_control:
            case FlowControl.UNCONDITIONAL_BRANCH if _is_near(insn):
                self._jump(insn, state)
                return None
            case FlowControl.CONDITIONAL_BRANCH if _is_near(insn):
                self._branch(insn, state)
                return state
            case FlowControl.NEXT:
                return self._step_data(insn, state)
            case _:
                self._fault(self._forbidden_rule(insn), insn.ip)
                return None

    def _jump(self, insn: Instruction, state: _State) -> None:
        """Follow a jump."""
        dst = insn.near_branch_target
        if self._is_inside(dst):
            self._lead_inside(insn, state)
        elif dst != state.known:
            self._leave_to_thunk(insn, state)
        else:
            self._leave(insn)

    def _branch(self, insn: Instruction, state: _State) -> None:
        """Follow a conditional branch the way where it is taken."""
        if not state.has_flags:
            self._fault(BlockRule.FLAGS, insn.ip)
        is_equal = insn.condition_code == ConditionCode.E
        known = state.compared if is_equal and state.compared is not None else state.known
        if self._is_inside(insn.near_branch_target):
            self._lead_inside(insn, replace(state, known=known))
        elif known is None or insn.near_branch_target != known:
            self._fault(BlockRule.EXIT, insn.ip)
        else:
            self._leave(insn)

    def _is_inside(self, dst: int) -> bool:
        """Tell whether a branch stays in the block."""
        return self._addr <= dst < self._end

    def _lead_inside(self, insn: Instruction, state: _State) -> None:
        """Follow a branch that stays in the block."""
        dst = insn.near_branch_target
        if dst <= insn.ip or dst not in self._starts:
            self._fault(BlockRule.EXIT, insn.ip)
        else:
            self._lead(insn.ip, dst, state)

    def _leave_to_thunk(self, insn: Instruction, state: _State) -> None:
        """Check a jump that proves nothing about the operand."""
        dst = insn.near_branch_target
        if dst not in self._scene.thunk_addrs:
            self._fault(BlockRule.EXIT, insn.ip)
        elif state.base_addr is not None:
            self._fault(BlockRule.REBASE, insn.ip)
        else:
            self._leave(insn)

    def _leave(self, insn: Instruction) -> None:
        """Check that a branch out of the block leads to code of the program."""
        dst = insn.near_branch_target
        if self._scene.is_arena(dst):
            self._fault(BlockRule.ARENA, insn.ip)
        elif not self._scene.is_code(dst):
            self._stale.append(Addr(dst))

    # --- instructions that do not branch

    def _step_data(self, insn: Instruction, state: _State) -> _State | None:
        """Follow an instruction that does not branch."""
        behind = replace(state, compared=None, has_flags=False)
        match insn.code:
            case Code.CMP_RAX_IMM32 | Code.CMP_RM64_IMM32 if insn.op0_kind == OpKind.REGISTER:
                self._judge_operand(insn, 0)
                value = insn.immediate32to64 & _WORD_MASK
                return self._compared(insn, behind, value)
            case Code.CMP_RM32_IMM32 if insn.op0_kind == OpKind.REGISTER:
                self._judge_operand(insn, 0)
                return replace(behind, has_flags=True)  # the low half proves nothing
            case Code.CMP_R64_RM64 if _is_rip_relative(insn):
                self._judge_operand(insn, 0)
                return self._compared_with_cell(insn, behind)
            case Code.CMP_RM64_IMM8 if _is_rip_relative(insn):
                self._judge_counter(insn)
                return replace(behind, has_flags=True)
            case Code.INC_RM64 if _is_rip_relative(insn):
                self._judge_counter(insn)
                return behind
            case Code.MOV_RM64_R64 if _is_rip_relative(insn):
                self._judge_operand(insn, 1)
                self._judge_counter(insn)
                return state  # flags are as they were
            case Code.SUB_R64_RM64 if _is_rip_relative(insn) and insn.ip == self._addr:
                self._judge_operand(insn, 0)
                self._judge_literal(insn)
                return replace(behind, base_addr=insn.ip_rel_memory_address)
            case Code.ADD_R64_RM64 if _is_rip_relative(insn):
                self._judge_operand(insn, 0)
                if insn.ip_rel_memory_address != state.base_addr:
                    self._fault(BlockRule.REBASE, insn.ip)
                return replace(behind, base_addr=None)
            case _:
                self._fault(self._forbidden_rule(insn), insn.ip)
                return behind

    def _compared(self, insn: Instruction, behind: _State, value: int) -> _State:
        """Return the state behind a compare of the whole operand with a value."""
        if behind.base_addr is not None and _is_cell(behind.base_addr, self._scene.literals):
            value = value + self._scene.read_literal(behind.base_addr) & _WORD_MASK
        return replace(behind, compared=value, has_flags=True)

    def _compared_with_cell(self, insn: Instruction, behind: _State) -> _State:
        """Return the state behind a compare with memory; counters prove nothing."""
        cell = insn.ip_rel_memory_address
        if _is_cell(cell, self._scene.literals):
            return self._compared(insn, behind, self._scene.read_literal(cell))
        if not _is_cell(cell, self._scene.counters):
            self._fault(BlockRule.LITERAL, insn.ip)
        return replace(behind, has_flags=True)

    def _judge_operand(self, insn: Instruction, number: int) -> None:
        """Check that every instruction means the register that the thunk branches to."""
        name = _REGISTER_NAMES[RegisterExt.number(insn.op_register(number))]
        if self._operand is None:
            self._operand = name
        if name != self._operand:
            self._fault(BlockRule.OPERAND, insn.ip)

    def _judge_literal(self, insn: Instruction) -> None:
        """Check that an instruction reads a literal."""
        if not _is_cell(insn.ip_rel_memory_address, self._scene.literals):
            self._fault(BlockRule.LITERAL, insn.ip)

    def _judge_counter(self, insn: Instruction) -> None:
        """Check that an instruction uses a counter cell."""
        if not _is_cell(insn.ip_rel_memory_address, self._scene.counters):
            self._fault(BlockRule.COUNTER, insn.ip)

    def _forbidden_rule(self, insn: Instruction) -> BlockRule:
        """Name what is wrong with an instruction that no block has."""
        match insn.flow_control:
            case FlowControl.CALL:
                return BlockRule.CALL
            case FlowControl.INDIRECT_BRANCH | FlowControl.INDIRECT_CALL | FlowControl.RETURN:
                return BlockRule.INDIRECT_BRANCH
        if insn.is_stack_instruction:
            return BlockRule.STACK
        used = self._info.info(insn).used_registers()
        if any(one.access in _WRITES for one in used):
            return BlockRule.REGISTER_WRITE
        return BlockRule.UNKNOWN_INSN


def _is_cell(addr: int, part: tuple[int, int]) -> bool:
    """Tell whether an address is an aligned cell of a part of the arena."""
    return part[0] <= addr <= part[1] - _CELL_SIZE and addr % _CELL_SIZE == 0


def _is_near(insn: Instruction) -> bool:
    """Tell whether a branch is of a form that blocks have: by flags or always, not far."""
    is_jump = insn.code in (Code.JMP_REL32_64, Code.JMP_REL8_64)
    return is_jump or (
        insn.condition_code != ConditionCode.NONE and insn.op0_kind == OpKind.NEAR_BRANCH64
    )


def _is_rip_relative(insn: Instruction) -> bool:
    """Tell whether an instruction's memory operand is at a fixed distance from it."""
    kinds = (insn.op0_kind, insn.op1_kind)
    return OpKind.MEMORY in kinds and insn.memory_base == Register.RIP


def _has_odd_prefix(insn: Instruction) -> bool:
    """Tell whether an instruction has a prefix, which those of blocks have not."""
    return (
        insn.segment_prefix != Register.NONE
        or insn.has_lock_prefix
        or insn.has_rep_prefix
        or insn.has_repne_prefix
    )
