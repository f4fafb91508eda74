# SPDX-License-Identifier: Apache-2.0
"""Turn a block plan into x86-64 bytes.

One encoder serves every kind of block; kinds differ only in what the plan asks
to count. A promoted block::

    head    [mov memory, reg]
            [sub reg, base]
            cmp reg, target1 ; je target1        guards: hottest first
            cmp reg, target2 ; je target2 ; jb or ja other half
            ...                                  weighted binary tree; halves that fit
                                                 a line lie in one, behind int3
    miss    [add reg, base]
            [inc miss_count]
            jmp thunk ; int3                     the site's own thunk, behind its load

A learning block has the same tree, but a guard leads to a *hit* behind it that counts
before it branches on, and the miss counts too (``counting_code``)::

    head    the tree
    miss    [add reg, base] ; find or claim a slot, count ; jmp thunk ; int3
    hits    count ; jmp target ; int3
            ...
    records descriptors of restartable sequences, 32-aligned, never executed

Invariants:
  * Nothing is pushed, no return address is made (design rule 4). Only the
    arithmetic flags change, and the operand where the plan says that it is dead
    at every target; the thunk gets it as it was. Learning blocks give back what they
    use: the operand, a scratch register, the thread's ``rseq_cs`` (as 0).
  * A target in memory is read once on each way, by the first instruction, into a register
    that is dead. All blocks of a site begin with that load, and so does its thunk, which
    heads are redirected to; who misses enters it behind the load.
  * No indirect branch, ``int3`` after each unconditional jump (rule 3).
  * A target is compared whole: with an immediate where it fits one, as it does
    relative to a base, else with a literal. A split only chooses a way, so the
    low half of the operand does where all keys below it agree on the high half:
    an operand from elsewhere comes to some guard, which refuses it.
  * A compare operand that decides where a branch goes is an immediate or a
    literal in read-only memory; counter cells decide only what is counted
    (rule 5).
  * The first instruction is longer than ``JMP32_SIZE`` bytes, or is a jump with
    its ``int3``, so that one aligned 8-byte store can turn the head into
    ``jmp rel32 ; int3`` and back without moving the other instruction
    boundaries in those 8 bytes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import assert_never

from optpoline.model import Addr, BlockPlan, Guard, Miss, Split, TreeNode
from optpoline.x86.assembler import (
    INT3,
    JMP32_SIZE,
    LINE_SIZE,
    BlockCode,
    Condition,
    Label,
    Relocation,
    encode_jmp32,
)
from optpoline.x86.counter_insns import CounterAssembler
from optpoline.x86.counting_code import CountingCode
from optpoline.x86.restartable import LiteralPool

__all__ = [
    "BLOCK_ALIGNMENT",
    "HEAD_SIZE",
    "LINE_SIZE",
    "MIN_REBASED_TARGETS",
    "POISON",
    "BlockCode",
    "LiteralPool",
    "choose_base",
    "encode_block",
    "encode_redirect",
    "fits_immediate",
    "place_block",
]

BLOCK_ALIGNMENT = 16
"""Bytes. Measured in the feasibility study: packed and 16-byte aligned blocks
recovered 99 % and 92 % where page-spread ones recovered 90 % and 85 %."""
HEAD_SIZE = 8
"""Bytes that ``encode_redirect`` replaces; one aligned store of this size is
atomic for instruction fetch (AMD APM vol. 2, 7.6.1; Intel: practice only)."""

POISON = INT3
"""What unused and retired code memory is filled with."""


MIN_REBASED_TARGETS = 4
"""Guards from which on a base pays. Lua, 4 scripts x 5 processes each: 98.9 % of the
retpolines' cost recovered with a base, 94.5 % with literals."""

_LOW_HALF = (1 << 32) - 1


def fits_immediate(value: int) -> bool:
    """Tell whether ``cmp reg, imm32`` can hold an address.

    >>> fits_immediate(0x401000), fits_immediate(0x555555554000)
    (True, False)
    """
    return 0 <= value < 1 << 31


def choose_base(targets: Collection[Addr]) -> Addr | None:
    """Return what to subtract so that every target fits an immediate, if that is of use.

    None for few targets: the subtraction is on every way through the block, and saves a
    load from memory at each compare (``MIN_REBASED_TARGETS``).

    >>> choose_base([Addr(0x555555554000 + 16 * i) for i in range(8)]) == 0x555555554000
    True
    """
    if len(targets) < MIN_REBASED_TARGETS or fits_immediate(max(targets)):
        return None
    base = min(targets)
    return base if fits_immediate(max(targets) - base) else None


def encode_block(
    plan: BlockPlan,
    addr: Addr,
    literals: LiteralPool,
    relocations: list[Relocation] | None = None,
) -> BlockCode:
    """Return the bytes of a block that starts at ``addr``.

    Where in a line a block begins decides on the padding between its halves, if it crosses
    lines, and before its records, if it has any.

    Args:
        plan: What it is to do.
        addr: Where it will be, a multiple of ``HEAD_SIZE``.
        literals: Literals for targets that fit no immediate, and for counter rows.
        relocations: Gets those of the block, in no order.

    Raises:
        EncodeRangeError: if a target, the thunk, a literal or a counter is out
            of reach of ``addr``.
    """
    return _BlockEncoder(plan, addr, literals).encode(relocations)


def place_block(addr: int, size: int) -> Addr:
    """Return the first good place for a block of ``size`` bytes from ``addr`` on.

    A block that fits a line lies in one; a bigger one starts with a line (0.5
    points of Lua's overhead more than 16-byte alignment alone).

    >>> hex(place_block(0x1010, 26)), hex(place_block(0x1030, 26)), hex(place_block(0x1010, 100))
    ('0x1010', '0x1040', '0x1040')
    """
    addr = -(-addr // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
    if size > LINE_SIZE - addr % LINE_SIZE and addr % LINE_SIZE:
        addr = -(-addr // LINE_SIZE) * LINE_SIZE
    return Addr(addr)


def encode_redirect(head: bytes, addr: Addr, dst_addr: Addr) -> int:
    """Return the u64 that makes the block at ``addr`` jump to ``dst_addr`` at once.

    The byte behind the jump becomes ``int3`` (design rule 3); it is inside the
    first instruction of every head, or its ``int3`` already. The bytes after
    that keep their value: a thread interrupted between two instructions of the
    old head finds the rest of it unchanged.

    Args:
        head: The first ``HEAD_SIZE`` bytes of the block as encoded.
        addr: Its address, a multiple of ``HEAD_SIZE``.
        dst_addr: Where to go.

    Raises:
        EncodeRangeError: if ``dst_addr`` is out of reach.
    """
    # jmp rel32 ; int3
    code = encode_jmp32(addr, dst_addr) + bytes((INT3,)) + head[JMP32_SIZE + 1 : HEAD_SIZE]
    return int.from_bytes(code, "little")


class _BlockEncoder:
    """One block being written."""

    def __init__(self, plan: BlockPlan, addr: Addr, literals: LiteralPool) -> None:
        """Prepare labels and counters."""
        self._plan = plan
        self._literals = literals
        self._asm = CounterAssembler(addr)
        self._counting = (
            None if plan.rows is None else CountingCode(self._asm, plan, plan.rows, literals)
        )
        self._hits: list[tuple[Label, Addr]] = []
        self._miss = self._asm.label()

    def encode(self, relocations: list[Relocation] | None) -> BlockCode:
        """Write the tree, then the one miss path, then the counted hits."""
        if self._plan.load is not None:
            self._asm.load(self._plan.load)
        base = self._plan.base
        if base is not None:
            self._asm.sub_mem(self._plan.operand, self._literals.addr_of(base))
        self._node(self._plan.tree)
        self._asm.bind(self._miss)
        if base is not None:
            self._asm.add_mem(self._plan.operand, self._literals.addr_of(base))
        if self._counting is None:
            self._plain_miss()
        elif self._plan.miss_count_addr is not None:
            self._counting.miss(self._plan.miss_count_addr)
        for label, target in self._hits:
            self._asm.bind(label)
            if self._counting is not None:
                self._counting.hit(target)
        return self._asm.finish_block(relocations)

    def _plain_miss(self) -> None:
        """Write the miss of a promoted block."""
        if self._plan.miss_count_addr is not None:
            self._asm.inc_mem(self._plan.miss_count_addr)
        self._asm.jump(self._plan.miss_addr)

    def _node(self, node: TreeNode) -> None:
        """Write a subtree; control falls into it."""
        match node:
            case Guard(target, below, otherwise, falls_below):
                self._compare(target)
                self._hit(target)
                if below is None:
                    self._node(otherwise)
                elif falls_below:
                    self._two_ways(Condition.ABOVE, otherwise, below)
                else:
                    self._two_ways(Condition.BELOW, below, otherwise)
            case Split(_, below, above, falls_below):
                self._compare_low(node)
                if falls_below:
                    self._two_ways(Condition.ABOVE_EQUAL, above, below)
                else:
                    self._two_ways(Condition.BELOW, below, above)
            case Miss():
                # Dropped by the assembler where the miss path follows at once.
                self._asm.jump_label(self._miss)
            case _:
                assert_never(node)

    def _two_ways(self, condition: Condition, taken: TreeNode, fallen: TreeNode) -> None:
        """Write what follows a compare: branch one way, fall into the other."""
        label = self._miss if isinstance(taken, Miss) else self._asm.label()
        self._asm.branch_label(condition, label)
        self._node(fallen)
        if label is not self._miss:
            end = self._asm.label()
            self._asm.keep_in_line(end)
            self._asm.bind(label)
            self._node(taken)
            self._asm.bind(end)

    def _compare(self, key: Addr) -> None:
        """Compare the operand with a key."""
        if self._plan.base is not None:
            self._asm.cmp_imm32(self._plan.operand, key - self._plan.base)
        elif fits_immediate(key):
            self._asm.cmp_imm32(self._plan.operand, key)
        else:
            self._asm.cmp_mem(self._plan.operand, self._literals.addr_of(key))

    def _compare_low(self, node: Split) -> None:
        """Compare the operand with a split's key, by low halves where that will do."""
        keys = _keys(node)
        is_short = self._plan.base is not None or fits_immediate(max(keys))
        if is_short or len({key >> 32 for key in keys}) > 1:
            self._compare(node.key)
        else:
            self._asm.cmp_low32(self._plan.operand, node.key & _LOW_HALF)

    def _hit(self, target: Addr) -> None:
        """Branch to a target if the last compare was equal."""
        if self._counting is not None and self._counting.is_noted(target):
            label = self._asm.label()
            self._hits.append((label, target))
            self._asm.branch_label(Condition.EQUAL, label)
        else:
            self._asm.branch(Condition.EQUAL, target)


def _keys(tree: TreeNode) -> set[Addr]:
    """Return the keys that a tree compares with."""
    keys: set[Addr] = set()
    todo = [tree]
    while todo:
        match todo.pop():
            case Guard(target, below, otherwise, _):
                keys.add(target)
                todo += [otherwise] if below is None else [below, otherwise]
            case Split(key, below, above, _):
                keys.add(key)
                todo += [below, above]
            case Miss():
                pass
    return keys
