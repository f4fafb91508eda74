# SPDX-License-Identifier: Apache-2.0
"""Counting blocks: which cells a site's block counts in, and what they say.

A counting block is a branch tree that also counts each hit, followed by open
slots that unknown targets claim. Targets already known are branched to
directly even while they are counted, so a second look at a promoted site is
nearly as fast as its promoted block; only what is new takes the thunk.

Cells of one block are adjacent u64 in counter memory::

    +0                 misses that found no slot
    +8 * (1 + i)       hits of known target i
    then, per slot     the claimed target (0 while free), its hits

Counters are shared by all threads and not atomic: two CPUs that count at the
same moment lose one of the counts. Shares are what matters here, and both
CPUs lose alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optpoline.model import Addr, BlockPlan, Count, OpenSlot, TreeNode, tree_targets

__all__ = [
    "FIRST_OPEN_SLOTS",
    "SiteCounts",
    "add",
    "blend",
    "n_cells",
    "next_open_slots",
    "plan_counting",
    "read_counts",
    "subtract",
]

_CELL_SIZE = 8

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


def n_cells(n_known: int, n_open: int) -> int:
    """Return how many counter cells a counting block takes.

    >>> n_cells(2, 4)
    11
    """
    return 1 + n_known + 2 * n_open


def plan_counting(
    *, operand: str, thunk_addr: Addr, tree: TreeNode, n_open: int, cells_addr: Addr
) -> BlockPlan:
    """Return the plan of a block that counts all targets of ``tree`` and new ones.

    Args:
        operand: Register that holds the target.
        thunk_addr: The site's own thunk.
        tree: Known targets, ``Miss()`` for none.
        n_open: Slots for unknown targets.
        cells_addr: ``n_cells`` zeroed counter cells.
    """
    known = tuple(tree_targets(tree))
    slots_addr = cells_addr + _CELL_SIZE * (1 + len(known))
    return BlockPlan(
        operand=operand,
        tree=tree,
        thunk_addr=thunk_addr,
        hit_count_addrs=tuple(
            (target, Addr(cells_addr + _CELL_SIZE * (1 + i))) for i, target in enumerate(known)
        ),
        miss_count_addr=cells_addr,
        open_slots=tuple(
            OpenSlot(
                target_addr=Addr(slots_addr + 2 * _CELL_SIZE * i),
                count_addr=Addr(slots_addr + 2 * _CELL_SIZE * i + _CELL_SIZE),
            )
            for i in range(n_open)
        ),
    )


def read_counts(plan: BlockPlan, load: Callable[[Addr], int]) -> SiteCounts:
    """Return what a counting block has counted so far.

    Args:
        plan: The block's plan.
        load: Reads one u64 of counter memory.
    """
    hits = {target: load(addr) for target, addr in plan.hit_count_addrs}
    for slot in plan.open_slots:
        target = load(slot.target_addr)
        if target:
            hits[Addr(target)] = hits.get(Addr(target), 0) + load(slot.count_addr)
    counts = [Count(target=target, hit_count=n) for target, n in hits.items() if n]
    counts.sort(key=lambda count: (-count.hit_count, count.target))
    unknown = load(plan.miss_count_addr) if plan.miss_count_addr is not None else 0
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
    return _weighted(((one, 1.0), (other, 1.0)))


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
