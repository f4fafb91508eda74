# SPDX-License-Identifier: Apache-2.0
"""Turn a block plan into x86-64 bytes.

One encoder serves every kind of block; kinds differ only in what the plan asks
to count::

    head    [sub reg, base]
            cmp reg, target1 ; je target1        guards: hottest first
            cmp reg, target2 ; je target2 ; jb or ja other half
            ...                                  weighted binary tree
    miss    [add reg, base]
            [open slots: compare, claim, count]
            [inc miss_count]
            jmp thunk ; int3                     the site's own thunk

Invariants:
  * Nothing is pushed, no return address is made (design rule 4). Only the
    arithmetic flags change, and the operand where the plan says that it is dead
    at every target; the thunk gets it as it was.
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
from typing import Protocol, assert_never

from optpoline.model import Addr, BlockPlan, Guard, Miss, OpenSlot, Split, TreeNode
from optpoline.x86.assembler import (
    INT3,
    JMP32_SIZE,
    Assembler,
    Condition,
    Label,
    encode_jmp32,
)

__all__ = [
    "BLOCK_ALIGNMENT",
    "HEAD_SIZE",
    "LINE_SIZE",
    "MIN_REBASED_TARGETS",
    "POISON",
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

LINE_SIZE = 64
"""Bytes of a cache line and of what is fetched and predicted at once."""

HEAD_SIZE = 8
"""Bytes that ``encode_redirect`` replaces; one aligned store of this size is
atomic for instruction fetch (AMD APM vol. 2, 7.6.1; Intel: practice only)."""

POISON = INT3
"""What unused and retired code memory is filled with."""


MIN_REBASED_TARGETS = 4
"""Guards from which on a base pays. Lua, 4 scripts x 5 processes each: 98.9 % of the
retpolines' cost recovered with a base, 94.5 % with literals."""

_LOW_HALF = (1 << 32) - 1


class LiteralPool(Protocol):
    """Where literals live: read-only memory within reach of the block."""

    def addr_of(self, value: int) -> Addr:
        """Return the address of a u64 cell that holds ``value``."""


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


def encode_block(plan: BlockPlan, addr: Addr, literals: LiteralPool) -> bytes:
    """Return the bytes of a block that starts at ``addr``.

    Args:
        plan: What it is to do.
        addr: Where it will be, a multiple of ``HEAD_SIZE``.
        literals: Literals for targets that fit no immediate.

    Raises:
        EncodeRangeError: if a target, the thunk, a literal or a counter is out
            of reach of ``addr``.
    """
    return _BlockEncoder(plan, addr, literals).encode()


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
        self._asm = Assembler(addr)
        self._counters = dict(plan.hit_count_addrs)
        self._hits: list[tuple[Label, Addr]] = []
        self._miss = self._asm.label()

    def encode(self) -> bytes:
        """Write the tree, then the one miss path, then the counted hits."""
        base = self._plan.base
        if base is not None:
            self._asm.sub_mem(self._plan.operand, self._literals.addr_of(base))
        self._node(self._plan.tree)
        self._asm.bind(self._miss)
        if base is not None:
            self._asm.add_mem(self._plan.operand, self._literals.addr_of(base))
        for slot in self._plan.open_slots:
            self._open_slot(slot)
        if self._plan.miss_count_addr is not None:
            self._asm.inc_mem(self._plan.miss_count_addr)
        self._asm.jump(self._plan.thunk_addr)
        for label, target in self._hits:
            self._asm.bind(label)
            self._asm.inc_mem(self._counters[target])
            self._asm.jump(target)
        return self._asm.finish()

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
            self._asm.bind(label)
            self._node(taken)

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
        if target in self._counters:
            label = self._asm.label()
            self._hits.append((label, target))
            self._asm.branch_label(Condition.EQUAL, label)
        else:
            self._asm.branch(Condition.EQUAL, target)

    def _open_slot(self, slot: OpenSlot) -> None:
        """Count the operand in a slot if it is there or the slot is free.

        Two threads may claim one slot at once: the later store stays, and the
        other's one count is attributed wrongly. Nothing but a count depends on it.
        """
        taken = self._asm.label()
        following = self._asm.label()
        self._asm.cmp_mem(self._plan.operand, slot.target_addr)
        self._asm.branch_label(Condition.EQUAL, taken)
        self._asm.cmp_mem_zero(slot.target_addr)
        self._asm.branch_label(Condition.NOT_EQUAL, following)
        self._asm.mov_to_mem(slot.target_addr, self._plan.operand)
        self._asm.bind(taken)
        self._asm.inc_mem(slot.count_addr)
        self._asm.jump(self._plan.thunk_addr)
        self._asm.bind(following)


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
