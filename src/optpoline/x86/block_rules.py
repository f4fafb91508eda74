# SPDX-License-Identifier: Apache-2.0
"""Judge the bytes of a block: whether they can do anything but go where they should.

Nothing is taken from the encoder but its shape of a head. The bytes are decoded and
followed, branch by branch, with what each way proves about the operand::

    cmp reg, K ; je X       the operand is K where the branch is taken: X must be K
    anything else           may stay inside the block, or end at the site's own thunk

Where a site's target is in memory, a block must begin with the very load that the site's
bytes say, and is followed from behind it; the register is taken to be the operand on entry.

So a block without a fault goes where the operand points or to the thunk, whatever it
is given: no promise of the controller is needed for that but the literals, which are
read as well. Branches inside a block only lead forward, which makes one pass enough.

A block that counts in rows may do more (``block_data_rules``). Of it is proved besides
that the memory it writes is counters, ``rseq_cs``, and what is dead; that ``rseq_cs`` is 0 and
every register what it was, wherever it is left; and the same where the kernel leads a
thread from any instruction of a restartable sequence to its abort handler.

Non-goals: whether a block is fast, or counts what it should.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from functools import cached_property

from iced_x86 import (
    Code,
    ConditionCode,
    Decoder,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    OpAccess,
    OpKind,
)

from optpoline.errors import EncodeRangeError
from optpoline.model import Addr
from optpoline.x86.assembler import JMP32_SIZE, LINE_SIZE, REGISTER_NUMBERS
from optpoline.x86.block_data_rules import DataRules
from optpoline.x86.block_sections import Section, is_mark, read_sections
from optpoline.x86.block_state import ENTRY, Constant, Entry, Number, State, Value, join
from optpoline.x86.block_verdict import BlockFault, BlockRule, BlockScene, BlockVerdict
from optpoline.x86.blocks import BLOCK_ALIGNMENT
from optpoline.x86.memory_operands import encode_load

__all__ = ["judge_block"]

_WRITES = (OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE)


def judge_block(code: bytes, addr: Addr, scene: BlockScene) -> BlockVerdict:
    """Follow a block from its head, as encoded, and return what is wrong with it.

    Args:
        code: Its bytes, a redirection of the head undone, descriptors included.
        addr: Where it is.
        scene: What is around it.
    """
    return _Judge(code, addr, scene).judge()


class _Judge:
    """One block being judged."""

    def __init__(self, code: bytes, addr: Addr, scene: BlockScene) -> None:
        """Decode it."""
        text_size = len(code) if scene.text_size is None else scene.text_size
        self._insns = list(Decoder(64, code[:text_size], ip=addr))
        self._addr = addr
        self._end = addr + text_size
        self._scene = scene
        self._faults: list[BlockFault] = []
        self._stale: list[Addr] = []
        self._starts = {insn.ip for insn in self._insns}
        load_size = 0 if scene.load is None else scene.load.size
        self._start = addr + load_size
        """Where the operand is in its register."""
        self._loaded = code[:load_size]
        self._ways: dict[int, State] = {self._start: State()}
        self._sections = self._read_sections(code[text_size:], text_size <= len(code))
        self._data = DataRules(
            start=self._start,
            scene=scene,
            operand=scene.operand,
            armable={section.start: section for section in self._sections},
            fault=self._fault,
        )

    def _read_sections(self, tail: bytes, is_whole: bool) -> tuple[Section, ...]:
        """Return the restartable sequences that it has."""
        rseq = None if self._scene.rows is None else self._scene.rows.rseq
        signature = None if rseq is None else rseq.signature
        sections, faults = read_sections(tail, self._end, self._insns, signature)
        for at in faults if is_whole else (self._addr,):
            self._fault(BlockRule.DESCRIPTOR, at)
        return sections

    def judge(self) -> BlockVerdict:
        """Look at each instruction once, in address order."""
        self._judge_head()
        self._judge_load()
        for number, insn in enumerate(self._insns):
            if insn.next_ip <= self._start:
                continue
            state = self._ways.get(insn.ip)
            if insn.code == Code.INT3:
                self._judge_int3(number, is_reached=state is not None)
            elif state is None:
                self._judge_stray(number)
            else:
                self._judge_section(insn, state)
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
        if not self._insns:
            self._fault(BlockRule.FALL_OUT, self._addr)
        is_jump = bool(self._insns) and self._insns[0].code == Code.JMP_REL32_64
        inside = {self._addr + off for off in range(1, JMP32_SIZE + 1)} & self._starts
        if is_jump:
            inside.discard(self._addr + JMP32_SIZE)  # its int3, as the redirection has it
        if inside or self._addr % BLOCK_ALIGNMENT:
            self._fault(BlockRule.HEAD, self._addr)

    def _judge_load(self) -> None:
        """Check that a target in memory is loaded as the site says."""
        load = self._scene.load
        if load is None:
            return
        try:
            is_same = encode_load(load, self._addr) == self._loaded
        except EncodeRangeError:
            is_same = False
        if not is_same or self._start not in self._starts:
            self._fault(BlockRule.LOAD, self._addr)

    def _judge_int3(self, number: int, *, is_reached: bool) -> None:
        """Check that an int3 stands behind a jump, or fills a line there; nothing comes to it."""
        before = self._insns[number - 1] if number else None
        if is_reached:
            self._fault(BlockRule.FALL_OUT, self._insns[number].ip)
        elif before is not None and before.code == Code.INT3:
            self._judge_padding(number)
        elif before is None or before.flow_control != FlowControl.UNCONDITIONAL_BRANCH:
            self._fault(BlockRule.STRAY, self._insns[number].ip)

    def _judge_padding(self, number: int) -> None:
        """Check that code starts a line behind the last int3 of some."""
        following = self._insns[number + 1] if number + 1 < len(self._insns) else None
        if following is not None and following.code == Code.INT3:
            return  # the last one is judged
        if following is None or following.ip % LINE_SIZE:
            self._fault(BlockRule.STRAY, self._insns[number].ip)

    def _judge_behind_jump(self, number: int) -> None:
        """Check that an int3 follows a jump."""
        following = self._insns[number + 1] if number + 1 < len(self._insns) else None
        if following is None or following.code != Code.INT3:
            self._fault(BlockRule.SPECULATION, self._insns[number].ip)

    def _judge_stray(self, number: int) -> None:
        """Name code that nothing leads to by the worst it is; a signature's place is there."""
        insn = self._insns[number]
        before = self._insns[number - 1] if number else None
        is_behind_jump = before is not None and before.code == Code.INT3
        if is_behind_jump and is_mark(insn) and insn.next_ip in self._abort_addrs:
            return
        rule = self._forbidden_rule(insn)
        is_odd = rule is BlockRule.UNKNOWN_INSN or insn.flow_control == FlowControl.NEXT
        self._fault(BlockRule.STRAY if is_odd else rule, insn.ip)

    @cached_property
    def _abort_addrs(self) -> frozenset[int]:
        """Where abort handlers begin."""
        return frozenset(section.abort for section in self._sections)

    def _judge_section(self, insn: Instruction, state: State) -> None:
        """Follow the kernel from an instruction of a restartable sequence to the handler."""
        number = bisect_right(self._sections, insn.ip, key=lambda section: section.start)
        section = self._sections[number - 1] if number else None
        if section is not None and insn.ip < section.end:
            if state.armed != section.descriptor:
                self._fault(BlockRule.SECTION, insn.ip)
            self._lead(insn.ip, section.abort, state.aborted())

    # --- ways

    def _lead(self, src: int, dst: int, state: State) -> None:
        """Note that control may come to ``dst`` in a state."""
        if dst >= self._end:
            self._fault(BlockRule.FALL_OUT, src)
            return
        other = self._ways.get(dst, state)
        if self._base_of(other) != self._base_of(state):
            self._fault(BlockRule.REBASE, dst)
        self._ways[dst] = join(state, other)

    def _base_of(self, state: State) -> int | None:
        """Return the literal that was taken from the operand; None if it holds anything else."""
        value = self._operand_value(state)
        return value.base_addr if isinstance(value, Entry) else None

    def _operand_value(self, state: State) -> Value:
        """Return what the operand's register holds."""
        operand = self._data.operand
        return ENTRY if operand is None else state.value_of(REGISTER_NUMBERS[operand])

    def _step(self, insn: Instruction, state: State) -> State | None:
        """Follow one instruction; return the state behind it, None if nothing comes there."""
        if self._has_odd_prefix(insn):
            self._fault(BlockRule.UNKNOWN_INSN, insn.ip)
            return None
        match insn.flow_control:
            case FlowControl.UNCONDITIONAL_BRANCH if _is_near(insn):
                self._jump(insn, state)
                return None
            case FlowControl.CONDITIONAL_BRANCH if _is_near(insn):
                self._branch(insn, state)
                return _not_taken(insn, state)
            case FlowControl.NEXT:
                return self._step_data(insn, state)
            case _:
                self._fault(self._forbidden_rule(insn), insn.ip)
                return None

    def _jump(self, insn: Instruction, state: State) -> None:
        """Follow a jump."""
        dst = insn.near_branch_target
        if self._is_inside(dst):
            self._lead_inside(insn, state)
        elif dst != state.known:
            self._leave_to_thunk(insn, state)
        else:
            self._leave(insn, state)

    def _branch(self, insn: Instruction, state: State) -> None:
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
            self._leave(insn, replace(state, known=known))

    def _is_inside(self, dst: int) -> bool:
        """Tell whether a branch stays in the block."""
        return self._addr <= dst < self._end

    def _lead_inside(self, insn: Instruction, state: State) -> None:
        """Follow a branch that stays in the block."""
        dst = insn.near_branch_target
        if dst <= insn.ip or dst not in self._starts:
            self._fault(BlockRule.EXIT, insn.ip)
        else:
            self._lead(insn.ip, dst, state)

    def _leave_to_thunk(self, insn: Instruction, state: State) -> None:
        """Check a jump that proves nothing about the operand."""
        dst = insn.near_branch_target
        if dst not in self._scene.miss_addrs:
            self._fault(BlockRule.EXIT, insn.ip)
        elif self._base_of(state) is not None:
            self._fault(BlockRule.REBASE, insn.ip)
        else:
            self._leave(insn, state)

    def _leave(self, insn: Instruction, state: State) -> None:
        """Check that a branch out of the block leads to code of the program, all put back."""
        dst = insn.near_branch_target
        operand = None if self._data.operand is None else REGISTER_NUMBERS[self._data.operand]
        for register, value in state.values.items():
            is_entry = value == Constant(state.known) if state.known is not None else False
            if register != operand or not (is_entry or isinstance(value, Entry)):
                self._fault(BlockRule.RESTORE, insn.ip)
        if state.armed is not None:
            self._fault(BlockRule.RESTORE, insn.ip)
        if self._scene.is_arena(dst):
            if dst not in self._scene.miss_addrs:
                self._fault(BlockRule.ARENA, insn.ip)
        elif not self._scene.is_code(dst):
            self._stale.append(Addr(dst))

    # --- instructions that do not branch

    def _step_data(self, insn: Instruction, state: State) -> State:
        """Follow an instruction that does not branch."""
        behind = self._data.step(insn, state)
        if behind is None:
            self._fault(self._forbidden_rule(insn), insn.ip)
            return state.without_flags()
        return behind

    def _has_odd_prefix(self, insn: Instruction) -> bool:
        """Tell whether an instruction has a prefix that those of the block have not."""
        is_counting = self._scene.rows is not None and insn.flow_control == FlowControl.NEXT
        return (
            insn.has_rep_prefix
            or insn.has_repne_prefix
            or (not is_counting and (insn.has_segment_prefix or insn.has_lock_prefix))
        )

    def _forbidden_rule(self, insn: Instruction) -> BlockRule:
        """Name what is wrong with an instruction that no block has."""
        match insn.flow_control:
            case FlowControl.CALL:
                return BlockRule.CALL
            case FlowControl.INDIRECT_BRANCH | FlowControl.INDIRECT_CALL | FlowControl.RETURN:
                return BlockRule.INDIRECT_BRANCH
        if insn.is_stack_instruction:
            return BlockRule.STACK
        used = InstructionInfoFactory().info(insn).used_registers()
        if any(one.access in _WRITES for one in used):
            return BlockRule.REGISTER_WRITE
        return BlockRule.UNKNOWN_INSN


def _is_near(insn: Instruction) -> bool:
    """Tell whether a branch is of a form that blocks have: by flags or always, not far."""
    is_jump = insn.code in (Code.JMP_REL32_64, Code.JMP_REL8_64)
    return is_jump or (
        insn.condition_code != ConditionCode.NONE and insn.op0_kind == OpKind.NEAR_BRANCH64
    )


def _not_taken(insn: Instruction, state: State) -> State:
    """Return the state behind a conditional branch: a number may be proved to be below a limit."""
    if insn.condition_code != ConditionCode.AE or state.bound is None:
        return state
    register, limit = state.bound
    value = state.value_of(register)
    if not isinstance(value, Number):
        return state
    return state.with_value(register, replace(value, limit=min(value.limit, limit)))
