# SPDX-License-Identifier: Apache-2.0
"""Every kind of block, in every part of the address space, for any register.

A *layout* says where things lie; a *kind* makes a plan from a layout and an
operand. Golden bytes and the emulator use the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

from optpoline.learn.counting import plan_counting
from optpoline.model import (
    Addr,
    BlockPlan,
    CounterRows,
    Guard,
    Miss,
    RseqAbi,
    Split,
    TraceRing,
    TreeNode,
    tree_targets,
)
from optpoline.x86.blocks import encode_block, fits_immediate

__all__ = [
    "COUNTERS_SIZE",
    "KINDS",
    "LAYOUTS",
    "N_CPUS",
    "OPERANDS",
    "RSEQ",
    "Image",
    "Layout",
    "LiteralTable",
    "Way",
    "encode_image",
    "rows_of",
]

N_CPUS = 4
_ROW_SHIFT = 12
_N_TRACED = 1024
"""Entries of a trace: a page of them, behind the rows."""

COUNTERS_SIZE = (1 + N_CPUS << _ROW_SHIFT) + 4 * _N_TRACED
"""Bytes of the counter part: rows of a page each, then a trace."""

RSEQ = RseqAbi(offset=-0x160, signature=0x53053053)

OPERANDS = (
    *("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
"""All registers that can hold a branch target; rsp cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where an arena and the targets of its blocks lie.

    Attributes:
        name: For test ids and golden files.
        block_addr: The block.
        literal_addr: Literals, one page.
        counter_addr: Counter cells, ``COUNTERS_SIZE`` bytes.
        targets: Sixteen targets in address order.
        thunk_addr: The site's own thunk.
        other_addr: Where a redirected head goes.
    """

    name: str
    block_addr: Addr
    literal_addr: Addr
    counter_addr: Addr
    targets: tuple[Addr, ...]
    thunk_addr: Addr
    other_addr: Addr


def _layout(name: str, block_addr: int, targets: tuple[int, ...], thunk_addr: int) -> Layout:
    """Return a layout with literals and counters behind the block."""
    return Layout(
        name=name,
        block_addr=Addr(block_addr),
        literal_addr=Addr(block_addr + 0x10000),
        counter_addr=Addr(block_addr + 0x20000),
        targets=tuple(Addr(target) for target in targets),
        thunk_addr=Addr(thunk_addr),
        other_addr=Addr(thunk_addr + 0x5550),
    )


LAYOUTS = (
    # A program at a fixed address: targets are immediates.
    _layout("fixed", 0x2000_0000, tuple(0x40_1000 + 0x130 * i for i in range(16)), 0x41_9000),
    # A position-independent program: targets are literals.
    _layout(
        "pie",
        0x5555_1000_0000,
        tuple(0x5555_5555_5000 + 0x1F0 * i for i in range(16)),
        0x5555_5556_6000,
    ),
    # Around 2 GiB, where an immediate would turn negative; neighbours one byte apart.
    _layout("edge", 0x7000_0000, tuple(0x7FFF_FFF8 + i for i in range(16)), 0x6FFF_0000),
    # Far ends of the reach of a direct branch.
    _layout(
        "far",
        0x7F00_8000_0000,
        (*(0x7F00_0010_0000 + i for i in range(8)), *(0x7F00_FFEF_0000 + i for i in range(8))),
        0x7F00_0100_0000,
    ),
    # On both sides of 4 GiB: neighbours that differ in their high half.
    _layout("border", 0xC000_0000, tuple(0xFFFF_FFF8 + i for i in range(16)), 0x1_2000_0000),
    # The same far up, where low halves wrap in the middle.
    _layout(
        "wrap",
        0x7F12_1000_0000,
        tuple(0x7F11_FFFF_FF80 + 0x10 * i for i in range(16)),
        0x7F12_3000_0000,
    ),
)


@dataclass(slots=True)
class LiteralTable:
    """Literals as an arena has them: shared, adjacent.

    Attributes:
        start: Address of the first.
        values: Value to address.
    """

    start: Addr
    values: dict[int, Addr] = field(default_factory=dict)

    def addr_of(self, value: int) -> Addr:
        """Return the address of a literal."""
        return self.values.setdefault(value, Addr(self.start + 8 * len(self.values)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A block's bytes and the literals they need.

    Attributes:
        plan: What it was encoded from.
        layout: Where.
        code: All its bytes.
        text: Those that are instructions.
        literals: What it reads.
    """

    plan: BlockPlan
    layout: Layout
    code: bytes
    text: bytes
    literals: LiteralTable


def encode_image(plan: BlockPlan, layout: Layout, literals: LiteralTable | None = None) -> Image:
    """Encode a plan at its layout's block address; there may be literals already."""
    literals = LiteralTable(layout.literal_addr) if literals is None else literals
    block = encode_block(plan, layout.block_addr, literals)
    text = block.code[: block.text_size]
    return Image(plan=plan, layout=layout, code=block.code, text=text, literals=literals)


def chain(targets: tuple[Addr, ...]) -> TreeNode:
    """Return guards in a row."""
    tree: TreeNode = Miss()
    for target in reversed(targets):
        tree = Guard(target, None, tree)
    return tree


def balanced(targets: tuple[Addr, ...]) -> TreeNode:
    """Return a balanced tree of guards."""
    if not targets:
        return Miss()
    middle = len(targets) // 2
    below, above = balanced(targets[:middle]), balanced(targets[middle + 1 :])
    return Guard(targets[middle], below, above)


def leafy(targets: tuple[Addr, ...]) -> TreeNode:
    """Return a tree of splits with one guard in each leaf."""
    if len(targets) == 1:
        return Guard(targets[0], None, Miss())
    middle = len(targets) // 2
    return Split(targets[middle], leafy(targets[:middle]), leafy(targets[middle:]))


def turned(tree: TreeNode, *, every: int = 1, depth: int = 0) -> TreeNode:
    """Return a tree with the other way falling through at each ``every``-th level."""
    is_turned = depth % every == 0
    match tree:
        case Guard(target, below, otherwise, falls_below):
            left = None if below is None else turned(below, every=every, depth=depth + 1)
            rest = turned(otherwise, every=every, depth=depth + 1)
            return Guard(target, left, rest, falls_below ^ is_turned)
        case Split(key, below, above, falls_below):
            left = turned(below, every=every, depth=depth + 1)
            rest = turned(above, every=every, depth=depth + 1)
            return Split(key, left, rest, falls_below ^ is_turned)
        case Miss():
            return tree


def _plain(tree: TreeNode, layout: Layout, operand: str, *, misses: bool = False) -> BlockPlan:
    """Return a promoted block's plan."""
    return BlockPlan(
        operand=operand,
        tree=tree,
        thunk_addr=layout.thunk_addr,
        miss_count_addr=layout.counter_addr if misses else None,
    )


class Way(Enum):
    """How a learning block comes to the row it counts in."""

    CALL = "restartable sequences, for unknown targets too"
    JUMP = "restartable sequences for hits"
    SEGMENT = "segment limit, locked"


def rows_of(layout: Layout, way: Way) -> CounterRows:
    """Return the counter rows of a layout."""
    return CounterRows(
        shared_addr=layout.counter_addr,
        row_shift=_ROW_SHIFT,
        n_cpus=N_CPUS,
        rseq=None if way is Way.SEGMENT else RSEQ,
    )


def _counting(
    tree: TreeNode, layout: Layout, operand: str, n_open: int, way: Way = Way.CALL
) -> BlockPlan:
    """Return a learning block's plan."""
    return plan_counting(
        operand=operand,
        thunk_addr=layout.thunk_addr,
        tree=tree,
        n_open=n_open,
        cells_addr=layout.counter_addr,
        rows=rows_of(layout, way),
        is_below_stack_free=way is Way.CALL,
    )


def _led_to_thunk(layout: Layout, operand: str, way: Way) -> BlockPlan:
    """Return a plan with targets that are led to the thunk, one of them out of reach."""
    far = Addr(layout.block_addr ^ 1 << 45)
    return plan_counting(
        operand=operand,
        thunk_addr=layout.thunk_addr,
        tree=chain((*layout.targets[:3], far)),
        n_open=1,
        cells_addr=layout.counter_addr,
        rows=rows_of(layout, way),
        is_below_stack_free=way is Way.CALL,
        thunk_targets=frozenset({far, layout.targets[1]}),
    )


def _traced(plan: BlockPlan, layout: Layout) -> BlockPlan:
    """Return a plan that traces every hit but those of its first target."""
    targets = tuple(tree_targets(plan.tree))
    ring = TraceRing(
        head_addr=Addr(layout.counter_addr + 0x800),
        entries_addr=Addr(layout.counter_addr + (1 + N_CPUS << _ROW_SHIFT)),
        n_entries=_N_TRACED,
        ids=tuple((target, 0x8000_0000 + i) for i, target in enumerate(targets[1:])),
    )
    return replace(plan, trace=ring)


def _mixed(layout: Layout) -> TreeNode:
    """Return a tree with each kind of node, with misses on both sides."""
    t = layout.targets
    low = Guard(t[3], Miss(), Guard(t[4], None, Miss()))
    high = Split(t[9], Guard(t[8], Miss(), Miss()), Split(t[12], Miss(), leafy(t[12:15])))
    return Guard(t[15], None, Guard(t[6], low, high))


def _partly_counted(layout: Layout, operand: str) -> BlockPlan:
    """Return a plan that counts every second target only."""
    tree = balanced(layout.targets)
    counted = tuple(tree_targets(tree))[::2]
    return BlockPlan(
        operand=operand,
        tree=tree,
        thunk_addr=layout.thunk_addr,
        hit_count_addrs=tuple(
            (target, Addr(layout.counter_addr + 8 * (2 + i))) for i, target in enumerate(counted)
        ),
        miss_count_addr=Addr(layout.counter_addr + 8),
        rows=rows_of(layout, Way.JUMP),
    )


def _based(plan: BlockPlan) -> BlockPlan:
    """Return a plan that compares relative to its first target, where that fits immediates."""
    targets = tuple(tree_targets(plan.tree))
    base = min(targets)
    return replace(plan, base=base if fits_immediate(max(targets) - base) else None)


KINDS: dict[str, Callable[[Layout, str], BlockPlan]] = {
    "empty": lambda a, r: _plain(Miss(), a, r),
    "empty-counted": lambda a, r: _plain(Miss(), a, r, misses=True),
    "one": lambda a, r: _plain(chain(a.targets[:1]), a, r),
    "one-counted": lambda a, r: _plain(chain(a.targets[:1]), a, r, misses=True),
    "chain": lambda a, r: _plain(chain(a.targets[5:9]), a, r, misses=True),
    "long-chain": lambda a, r: _plain(chain(a.targets), a, r, misses=True),
    "tree": lambda a, r: _plain(balanced(a.targets), a, r, misses=True),
    "leafy": lambda a, r: _plain(leafy(a.targets), a, r, misses=True),
    "split-misses": lambda a, r: _plain(Split(a.targets[4], Miss(), Miss()), a, r),
    "mixed": lambda a, r: _plain(_mixed(a), a, r, misses=True),
    "based-tree": lambda a, r: _based(_plain(balanced(a.targets), a, r, misses=True)),
    "based-leafy": lambda a, r: _based(_plain(leafy(a.targets), a, r)),
    "based-mixed": lambda a, r: _based(_plain(_mixed(a), a, r, misses=True)),
    "based-counted": lambda a, r: _based(_counting(balanced(a.targets), a, r, 3)),
    "tree-turned": lambda a, r: _plain(turned(balanced(a.targets)), a, r, misses=True),
    "leafy-turned": lambda a, r: _plain(turned(leafy(a.targets)), a, r, misses=True),
    "leafy-mixed": lambda a, r: _plain(turned(leafy(a.targets), every=2), a, r),
    "mixed-turned": lambda a, r: _plain(turned(_mixed(a)), a, r, misses=True),
    "learn-first": lambda a, r: _counting(Miss(), a, r, 4),
    "learn-first-jump": lambda a, r: _counting(Miss(), a, r, 4, Way.JUMP),
    "learn-first-segment": lambda a, r: _counting(Miss(), a, r, 4, Way.SEGMENT),
    "learn-known": lambda a, r: _counting(chain(a.targets[:2]), a, r, 0),
    "learn-known-segment": lambda a, r: _counting(chain(a.targets[:2]), a, r, 0, Way.SEGMENT),
    "learn-more": lambda a, r: _counting(balanced(a.targets[:6]), a, r, 8),
    "learn-more-jump": lambda a, r: _counting(balanced(a.targets[:6]), a, r, 8, Way.JUMP),
    "learn-mixed": lambda a, r: _counting(_mixed(a), a, r, 2),
    "learn-turned": lambda a, r: _counting(turned(_mixed(a)), a, r, 2),
    "learn-far": lambda a, r: _led_to_thunk(a, r, Way.CALL),
    "learn-far-segment": lambda a, r: _led_to_thunk(a, r, Way.SEGMENT),
    "part-counted": _partly_counted,
    "traced": lambda a, r: _traced(_counting(balanced(a.targets[:4]), a, r, 1), a),
    "traced-far": lambda a, r: _traced(_led_to_thunk(a, r, Way.JUMP), a),
    "traced-segment": lambda a, r: _traced(
        _counting(balanced(a.targets[:4]), a, r, 1, Way.SEGMENT), a
    ),
}
