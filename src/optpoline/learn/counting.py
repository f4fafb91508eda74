# SPDX-License-Identifier: Apache-2.0
"""Counting blocks: which cells a site's block counts in, and what they say.

A counting block is a branch tree that also counts each hit, followed by open
slots that unknown targets claim. Targets already known are branched to
directly even while they are counted, so a second look at a promoted site is
nearly as fast as its promoted block; only what is new takes the thunk.

Cells of one block are adjacent u64 in each counter row (``model.CounterRows``)::

    +0                 the last target that found no slot
    +8                 misses that found no slot
    +8 * (2 + i)       hits of known target i
    then, per slot     the claimed target (0 while free), its hits

Each CPU counts in its own row and claims its own slots, so one target may have a slot in
every row; a count is the sum of a column, a target's the sum of its slots. Nothing is
lost and nothing is counted twice: a thread that is disturbed while it counts starts again,
or counts in the shared row with a locked instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optpoline.model import (
    CELL_SIZE,
    SLOT_CLAIMED,
    Addr,
    BlockPlan,
    Count,
    CounterRows,
    OpenSlot,
    OperandLoad,
    TreeNode,
    tree_targets,
)

__all__ = [
    "FIRST_OPEN_SLOTS",
    "NO_COUNTS",
    "ReadColumns",
    "SiteCounts",
    "add",
    "blend",
    "cells_of",
    "n_cells",
    "next_open_slots",
    "plan_counting",
    "read_counts",
    "spread_unknown",
    "subtract",
]

FIRST_OPEN_SLOTS = 2
"""Slots of a site nobody has looked at. Most sites have one or two targets, and
2,000 sites learn at once: four slots slowed a program with as many equally hot
sites by 1.41 while it learned. A site that needs more has them a wave later."""

MAX_OPEN_SLOTS = 64
"""Slots added at once; tried one after the other, so a bound on the slow path."""

UNKNOWN_SHARE_TO_GROW = 0.005
"""A site whose unknown share is above this gets more slots: the half percent
missed costs 0.1 cycles a branch, which is where the cost model stops caring."""

MIN_COUNT_TO_GROW = 64
"""Branches seen before a site's slots are grown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteCounts:
    """What one block counted.

    Attributes:
        counts: Targets that were seen, hottest first.
        n_unknown: Branches that found no slot.
    """

    counts: tuple[Count, ...]
    n_unknown: int

    @property
    def total(self) -> int:
        """All branches counted."""
        return self.n_unknown + sum(count.hit_count for count in self.counts)

    def shares(self) -> dict[Addr, float]:
        """Return each target's share of all branches, 0..1."""
        total = self.total
        return {c.target: c.hit_count / total for c in self.counts} if total else {}


NO_COUNTS = SiteCounts(counts=(), n_unknown=0)
"""What a block has counted that was never entered."""

ReadColumns = Callable[[Addr, int], NDArray[np.uint64]]
"""Returns adjacent cells of all rows: address in row 0, how many; u64[1 + n_cpus][n]."""

_COUNT_MASK = SLOT_CLAIMED - 1


def n_cells(n_known: int, n_open: int) -> int:
    """Return how many counter cells a counting block takes.

    >>> n_cells(2, 4)
    12
    """
    return 2 + n_known + 2 * n_open


def plan_counting(
    *,
    operand: str,
    thunk_addr: Addr,
    tree: TreeNode,
    n_open: int,
    cells_addr: Addr,
    rows: CounterRows,
    is_below_stack_free: bool = False,
    thunk_targets: frozenset[Addr] = frozenset(),
    load: OperandLoad | None = None,
) -> BlockPlan:
    """Return the plan of a block that counts all targets of ``tree`` and new ones.

    Args:
        operand: Register that holds the target.
        thunk_addr: The site's own thunk.
        tree: Known targets, ``Miss()`` for none.
        n_open: Slots for unknown targets.
        cells_addr: ``n_cells`` zeroed counter cells.
        rows: What they are part of.
        is_below_stack_free: Whether memory below the stack pointer is dead at the site.
        thunk_targets: Targets of the tree that are counted but led to the thunk.
        load: What loads the target, where it is in memory.
    """
    known = tuple(tree_targets(tree))
    hits_addr = cells_addr + 2 * CELL_SIZE
    slots_addr = hits_addr + CELL_SIZE * len(known)
    return BlockPlan(
        operand=operand,
        tree=tree,
        thunk_addr=thunk_addr,
        hit_count_addrs=tuple(
            (target, Addr(hits_addr + CELL_SIZE * i)) for i, target in enumerate(known)
        ),
        miss_count_addr=Addr(cells_addr + CELL_SIZE),
        open_slots=tuple(
            OpenSlot(
                target_addr=Addr(slots_addr + 2 * CELL_SIZE * i),
                count_addr=Addr(slots_addr + 2 * CELL_SIZE * i + CELL_SIZE),
            )
            for i in range(n_open)
        ),
        rows=rows,
        is_below_stack_free=is_below_stack_free,
        thunk_targets=thunk_targets,
        load=load,
    )


def cells_of(plan: BlockPlan) -> tuple[Addr, int]:
    """Return the first cell of a counting block, and how many it has."""
    if plan.miss_count_addr is None:
        raise ValueError("a block that counts no misses is no counting block")
    first = Addr(plan.miss_count_addr - CELL_SIZE)
    return first, n_cells(len(plan.hit_count_addrs), len(plan.open_slots))


def read_counts(plan: BlockPlan, read_columns: ReadColumns) -> SiteCounts:
    """Return what a counting block has counted so far.

    Args:
        plan: The block's plan.
        read_columns: Reads counter memory.
    """
    columns = read_columns(*cells_of(plan))
    rows: list[list[int]] = columns[columns.any(axis=1)].tolist()
    targets = [target for target, _ in plan.hit_count_addrs]
    first_slot = 2 + len(targets)
    hits: dict[Addr, int] = {}
    unknown = 0
    for row in rows:  # of a few CPUs, most often
        unknown += row[1]
        for target, count in zip(targets, row[2:first_slot], strict=True):
            hits[target] = hits.get(target, 0) + count
        # A target is stored before it is counted the first time.
        for slot, count in zip(row[first_slot::2], row[first_slot + 1 :: 2], strict=True):
            if slot:
                hits[Addr(slot)] = hits.get(Addr(slot), 0) + (count & _COUNT_MASK)
    counts = [Count(target=target, hit_count=n) for target, n in hits.items() if n]
    counts.sort(key=lambda count: (-count.hit_count, count.target))
    return SiteCounts(counts=tuple(counts), n_unknown=unknown)


def subtract(later: SiteCounts, earlier: SiteCounts) -> SiteCounts:
    """Return what was counted between two looks at the same block."""
    before = {count.target: count.hit_count for count in earlier.counts}
    counts = [
        Count(target=c.target, hit_count=c.hit_count - before.get(c.target, 0))
        for c in later.counts
    ]
    counts = [count for count in counts if count.hit_count > 0]
    counts.sort(key=lambda count: (-count.hit_count, count.target))
    return SiteCounts(counts=tuple(counts), n_unknown=max(0, later.n_unknown - earlier.n_unknown))


def next_open_slots(counts: SiteCounts) -> int:
    """Return how many more slots a site needs, 0 if it has enough.

    Three times the targets known so far: a site with 80 targets is known after
    four rounds (2, 6, 24, 64 slots).
    """
    total = counts.total
    if total < MIN_COUNT_TO_GROW or counts.n_unknown <= UNKNOWN_SHARE_TO_GROW * total:
        return 0
    return min(MAX_OPEN_SLOTS, max(FIRST_OPEN_SLOTS, 3 * len(counts.counts)))


def add(one: SiteCounts, other: SiteCounts) -> SiteCounts:
    """Return what two windows counted together."""
    hits = {count.target: count.hit_count for count in one.counts}
    for count in other.counts:
        hits[count.target] = hits.get(count.target, 0) + count.hit_count
    total = [Count(target=target, hit_count=n) for target, n in hits.items()]
    total.sort(key=lambda count: (-count.hit_count, count.target))
    return SiteCounts(counts=tuple(total), n_unknown=one.n_unknown + other.n_unknown)


def spread_unknown(first: SiteCounts, later: SiteCounts) -> SiteCounts:
    """Return what two blocks counted together, one after the other, by target.

    The first named only the targets that came first. Its unknown branches went to those
    that it did not name: in the proportions in which the later one has counted them, what
    is still unknown there included. Where that has counted none, they stay unknown.

    >>> def counted(n_unknown, **hits):
    ...     counts = tuple(Count(target=ord(t), hit_count=n) for t, n in hits.items())
    ...     return SiteCounts(counts=counts, n_unknown=n_unknown)
    >>> total = spread_unknown(counted(90, a=10), counted(1, a=3, b=6, c=2))
    >>> [(chr(c.target), c.hit_count) for c in total.counts], total.n_unknown
    ([('b', 66), ('c', 22), ('a', 13)], 11)
    """
    named = {count.target for count in first.counts}
    missed = [count for count in later.counts if count.target not in named]
    n_later = later.n_unknown + sum(count.hit_count for count in missed)
    if not n_later:
        return add(first, later)
    spread = tuple(
        Count(target=c.target, hit_count=first.n_unknown * c.hit_count // n_later) for c in missed
    )
    n_left = first.n_unknown * later.n_unknown // n_later
    # Rounded down so far: the rest, one a target at most, is of the hottest.
    n_lost = first.n_unknown - n_left - sum(count.hit_count for count in spread)
    if spread:
        hottest = Count(target=spread[0].target, hit_count=spread[0].hit_count + n_lost)
        spread = (hottest, *spread[1:])
    found = SiteCounts(counts=(*first.counts, *spread), n_unknown=n_left)
    return add(found, later)


PROFILE_TOTAL = 1_000_000
"""Branches that a profile stands for: shares to one in a million."""

FORGOTTEN_SHARE = 1e-4
"""Share below which a profile drops a target; a guard for it would save 0.002 cycles."""


def blend(profile: SiteCounts | None, window: SiteCounts, ratio: float) -> SiteCounts:
    """Return a profile that has taken in a window: an exponential average of shares.

    Args:
        profile: The profile so far, or None if this is the first window.
        window: What was counted, at least one branch.
        ratio: Weight of the window, 0..1.
    """
    if profile is None or not profile.total:
        profile, ratio = window, 1.0
    blended = _weighted(
        (
            (profile, (1.0 - ratio) * PROFILE_TOTAL / max(1, profile.total)),
            (window, ratio * PROFILE_TOTAL / max(1, window.total)),
        )
    )
    floor = FORGOTTEN_SHARE * PROFILE_TOTAL
    kept = tuple(count for count in blended.counts if count.hit_count >= floor)
    lost = blended.total - blended.n_unknown - sum(count.hit_count for count in kept)
    return SiteCounts(counts=kept, n_unknown=blended.n_unknown + lost)


def _weighted(parts: Sequence[tuple[SiteCounts, float]]) -> SiteCounts:
    """Return the weighted sum of counts, rounded, hottest first."""
    hits: dict[Addr, float] = {}
    unknown = 0.0
    for counts, weight in parts:
        unknown += weight * counts.n_unknown
        for count in counts.counts:
            hits[count.target] = hits.get(count.target, 0.0) + weight * count.hit_count
    total = [Count(target=target, hit_count=round(n)) for target, n in hits.items() if n >= 0.5]
    total.sort(key=lambda count: (-count.hit_count, count.target))
    return SiteCounts(counts=tuple(total), n_unknown=round(unknown))
