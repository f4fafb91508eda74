# SPDX-License-Identifier: Apache-2.0
"""Learning windows: give sites counting blocks, grow them in waves, read them.

A first window links baseline sites to counting blocks, which takes a stop; a
re-sampling window of a promoted site redirects its block's head, which takes
one store. Within a window, sites whose slots are full get a bigger block whose
tree holds what is known by then; that is a redirection too. The blocks before it still
count what threads inside them do, so all blocks of a window are read at its end: what
``window_counts`` says is exact. Shares are another matter: the first blocks of a window
name only the targets that came first (``telling_counts``).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.errors import ArenaError, EncodeRangeError
from optpoline.learn.counting import (
    FIRST_OPEN_SLOTS,
    NO_COUNTS,
    SiteCounts,
    add,
    cells_of,
    n_cells,
    next_open_slots,
    plan_counting,
    read_counts,
    spread_unknown,
    subtract,
)
from optpoline.model import Addr, Count, Miss, SiteKind, TreeNode, tree_targets
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block, add_block, point_back, redirect
from optpoline.promote.cost import CostModel
from optpoline.promote.tree import balance_tree

__all__ = [
    "MIN_FREE_CODE_SIZE",
    "Empty",
    "TargetFilter",
    "add_counting_block",
    "begin_sample",
    "begin_window",
    "end_sample",
    "end_window",
    "end_windows",
    "first_block",
    "grow_full",
    "is_last_block_telling",
    "is_telling_soon",
    "telling_counts",
    "window_counts",
]

Empty = Callable[[Sequence[SiteRecord]], bool]
"""Takes all counts out of the first counting blocks of sites, and tells whether none was left."""

TargetFilter = Callable[[SiteRecord, Addr], bool]
"""Tells whether a site's block may branch to a target directly."""

SAMPLE_OPEN_SLOTS = 8
"""Slots for new targets in a re-sampling window of a promoted site."""

MIN_WINDOW_COUNT = 256
"""Counts of the last, longest block are used alone for shares from here on: earlier blocks
of the window named only the targets that came first. With fewer, the shares of what those
did not name are taken from it."""

MIN_FREE_CODE_SIZE = 16 << 10
"""Code that counting blocks leave free: room for a last promoted block, and no
counter cells given out for a block that cannot be written. The biggest block
(128 guards and 64 slots) is 8 KiB."""

MAX_GROWTHS = 24
"""Bigger counting blocks between two promotions of a site: one with ever new
targets must not eat up the arena. A site of 128 targets needs five."""

MAX_COUNTED_TARGETS = CostModel().max_targets
"""Targets from which on a site's counting block grows no more."""


def add_counting_block(record: SiteRecord, tree: TreeNode, n_open: int) -> Block:
    """Write a counting block for a site; nothing leads to it yet.

    Raises:
        ArenaError: if the arena is used up.
        EncodeRangeError: if a target is out of reach.
    """
    if record.arena.free_code_size < MIN_FREE_CODE_SIZE:
        raise ArenaError(f"the arena at {record.arena.addr:#x} is used up")
    record.make_thunk()
    n_known = sum(1 for _ in tree_targets(tree))
    plan = plan_counting(
        operand=record.site.thunk.operand,
        thunk_addr=record.thunk_addr,
        tree=tree,
        n_open=n_open,
        cells_addr=record.arena.add_counters(n_cells(n_known, n_open)),
        rows=record.arena.rows,
        # A jump leaves the red zone of the function that it is in as it is.
        is_below_stack_free=record.site.kind is SiteKind.CALL,
        thunk_targets=frozenset(tree_targets(tree)) & record.far_targets,
        load=record.site.load,
    )
    block = add_block(record.arena, plan, site_addr=record.site.addr)
    record.tables[block.addr] = block
    return block


def first_block(record: SiteRecord, max_slots: int = 0) -> Block:
    """Return the counting block of a site on its baseline; the same each time.

    Args:
        record: The site.
        max_slots: The policy's (``WatchSchedule``).

    Raises:
        ArenaError: if the arena is used up.
    """
    if record.learner is None:
        record.learner = add_counting_block(record, Miss(), max_slots or FIRST_OPEN_SLOTS)
    else:
        point_back(record.learner)
    return record.learner


def _begin_counting(record: SiteRecord, block: Block, before: SiteCounts, now_s: float) -> None:
    """Note that a window of a site begins in ``block``, with what that has counted so far."""
    record.counting = block
    record.counts_before = before
    record.drained = record.drained_earlier = NO_COUNTS
    record.earlier.clear()
    record.window_start_s = record.counting_start_s = now_s
    record.watched_targets = 0


def _go_on_counting(record: SiteRecord, block: Block, now_s: float) -> None:
    """Note that a site counts in a new block in the middle of a window."""
    if record.counting is not None and record.counts_before is not None:
        record.earlier.append((record.counting, record.counts_before))
        record.drained_earlier = add(record.drained_earlier, record.drained)
    record.counting = block
    record.counts_before = record.drained = NO_COUNTS
    record.counting_start_s = now_s
    record.watched_targets = 0


def _end_counting(record: SiteRecord) -> None:
    """Note that a site's window is over."""
    record.counting = None
    record.counts_before = None
    record.drained = record.drained_earlier = NO_COUNTS
    record.earlier.clear()


def begin_window(records: Iterable[SiteRecord], now_s: float, empty: Empty | None = None) -> None:
    """Note that sites lead to their first counting blocks, by their text or a redirection.

    Args:
        records: The sites.
        now_s: CLOCK_MONOTONIC, seconds.
        empty: Empties blocks that have counted before, as far as it can, so that their slots
            are free again; what they hold all the same is remembered.
    """
    linked = [r for r in records if r.home is not None and r.learner is not None]
    for arena, group in _by_arena(linked):
        learners = [record.learner for record in group if record.learner is not None]
        is_fresh = _sum_blocks(arena, learners) == 0
        if empty is not None and not is_fresh.all():
            used = [record for record, fresh in zip(group, is_fresh, strict=True) if not fresh]
            if empty(used):
                is_fresh[:] = True
        for record, block, fresh in zip(group, learners, is_fresh.tolist(), strict=True):
            before = NO_COUNTS if fresh else read_counts(block.plan, arena.columns)
            _begin_counting(record, block, before, now_s)


def _by_arena(records: Iterable[SiteRecord]) -> Iterator[tuple[Arena, list[SiteRecord]]]:
    """Yield the arenas of some sites, each with its sites."""
    groups: dict[Addr, list[SiteRecord]] = defaultdict(list)
    for record in records:
        groups[record.arena.addr].append(record)
    for group in groups.values():
        yield group[0].arena, group


def _sum_blocks(arena: Arena, blocks: Sequence[Block]) -> NDArray[np.uint64]:
    """Return the sum of all cells of each block; 0 if it was never entered."""
    cells = np.array([cells_of(block.plan) for block in blocks], np.int64).reshape(-1, 2)
    return arena.sum_ranges(cells[:, 0], cells[:, 1])


def window_counts(record: SiteRecord) -> SiteCounts:
    """Return all that the site's counting blocks have counted in this window: exact."""
    return _add_earlier(record, _latest_counts(record))


def _latest_counts(record: SiteRecord) -> SiteCounts:
    """Return what the last of the site's counting blocks has counted in this window."""
    if record.counting is None or record.counts_before is None:
        return NO_COUNTS
    now = read_counts(record.counting.plan, record.arena.columns)
    if record.counts_before.total:
        now = subtract(now, record.counts_before)
    return add(now, record.drained) if record.drained.total else now


def _add_earlier(record: SiteRecord, latest: SiteCounts) -> SiteCounts:
    """Return what the last block and those before it have counted in this window."""
    total = latest
    for earlier in _earlier_counts(record):
        total = add(total, earlier)
    return total


def _earlier_counts(record: SiteRecord) -> list[SiteCounts]:
    """Return what the blocks before the last have counted in this window, the latest first."""
    if not record.earlier:
        return []
    counts = [
        subtract(read_counts(block.plan, record.arena.columns), before)
        for block, before in reversed(record.earlier)
    ]
    return [*counts, record.drained_earlier]


def telling_counts(record: SiteRecord, now_s: float) -> tuple[SiteCounts, float]:
    """Return the counts of this window that tell the targets' shares best, and their time.

    Those of the last block alone, which names more targets than the ones before it; or of
    all, if it has counted too little. Then what an earlier one did not name is of the
    targets that later ones found, as far as they did: left unknown, it would look as if
    the known ones had smaller shares than they have.

    Args:
        record: The site.
        now_s: CLOCK_MONOTONIC, seconds.
    """
    return _choose_telling(record, _latest_counts(record), now_s)


def _choose_telling(
    record: SiteRecord, latest: SiteCounts, now_s: float
) -> tuple[SiteCounts, float]:
    """Choose between the counts of the last block and of all."""
    if latest.total >= MIN_WINDOW_COUNT:
        return latest, max(1e-6, now_s - record.counting_start_s)
    total = latest
    for earlier in _earlier_counts(record):
        total = spread_unknown(earlier, total)
    return total, max(1e-6, now_s - record.window_start_s)


def is_last_block_telling(record: SiteRecord) -> bool:
    """Tell whether ``telling_counts`` need not infer what earlier blocks did not name."""
    return not record.earlier or _latest_counts(record).total >= MIN_WINDOW_COUNT


def is_telling_soon(record: SiteRecord, now_s: float, more_s: float) -> bool:
    """Tell whether a last block that has counted too little will have enough in a while.

    Args:
        record: The site.
        now_s: CLOCK_MONOTONIC, seconds.
        more_s: The while.
    """
    if record.counting is None or not record.earlier:
        return False
    latest = _latest_counts(record)
    n_missing = MIN_WINDOW_COUNT - latest.total
    rate_hz = _add_earlier(record, latest).total / max(1e-6, now_s - record.window_start_s)
    return 0 < n_missing <= rate_hz * more_s


def grow_full(records: Iterable[SiteRecord], may_guard: TargetFilter, max_slots: int = 0) -> int:
    """Give every site whose slots are full a bigger counting block.

    Args:
        records: Sites that count, or not.
        may_guard: Tells which targets a block may branch to; is shown new ones of jumps.
        max_slots: The policy's (``WatchSchedule``): if it is not 0 no site is given any.

    Returns:
        How many sites were given one.
    """
    grown = 0
    for arena, group in _by_arena(record for record in records if _is_counting(record)):
        _check_jumps(arena, group, may_guard)
        if max_slots:
            continue
        for record in _find_full(arena, [record for record in group if _is_counting(record)]):
            grown += _grow(record, may_guard)
    return grown


def _is_counting(record: SiteRecord) -> bool:
    """Tell whether a site counts at present."""
    return record.counting is not None and record.state is not SiteState.REFUSED


def _find_full(arena: Arena, records: Sequence[SiteRecord]) -> list[SiteRecord]:
    """Return the sites that have met targets without a slot since they count where they do.

    All but a few have not, and there may be thousands of them: one look at all.
    """
    looked_at = [
        (record, record.counting.plan.miss_count_addr or 0, record.counts_before.n_unknown)
        for record in records
        if record.counting is not None and record.counts_before is not None
    ]
    missed = [addr for _, addr, _ in looked_at]
    before = [n_unknown for _, _, n_unknown in looked_at]
    now = arena.sum_cells(np.array(missed, np.int64))
    changed = np.flatnonzero(now != np.array(before, np.uint64))
    return [looked_at[number][0] for number in changed.tolist()]


def _grow(record: SiteRecord, may_guard: TargetFilter) -> bool:
    """Give a site a bigger counting block if it needs one and may have it."""
    counts = _latest_counts(record)
    n_open = next_open_slots(counts)
    if n_open == 0 or record.n_grown >= MAX_GROWTHS or record.counting is None:
        return False
    if len(tree_list(record.counting)) >= MAX_COUNTED_TARGETS:
        return False
    # A target that is too far for a branch gets a place as well: counted there it does not
    # keep taking the long way through the slots.
    known = [
        c for c in counts.counts if may_guard(record, c.target) or c.target in record.far_targets
    ]
    if record.unsafe_targets:
        return False
    block = _bigger_block(record, known[:MAX_COUNTED_TARGETS], n_open)
    if block is None:
        return False
    entry = record.active if record.active is not None else record.home
    if entry is not None and entry is not block:
        redirect(entry, block.addr)
    _go_on_counting(record, block, time.monotonic())
    record.n_grown += 1
    return True


def _check_jumps(arena: Arena, records: Sequence[SiteRecord], may_guard: TargetFilter) -> None:
    """Look at new targets of jumps at once: a site is refused if one reads the flags."""
    jumps = [
        (record, _target_cells(record.counting))
        for record in records
        if record.counting is not None and record.site.kind is not SiteKind.CALL
    ]
    if not jumps:
        return
    sums = arena.sum_cells(np.array([addr for _, cells in jumps for addr in cells], np.int64))
    sizes = [len(cells) for _, cells in jumps]
    firsts = np.cumsum([0, *sizes[:-1]])
    # Sums of targets change whenever one of them does: u64, and targets have 47 bits.
    for (record, cells), now in zip(jumps, np.add.reduceat(sums, firsts).tolist(), strict=True):
        if now == record.watched_targets:
            continue
        record.watched_targets = now
        for addr in cells:
            for target in {*arena.columns(addr, 1).ravel().tolist()} - {0}:
                may_guard(record, Addr(target))


def _target_cells(block: Block) -> list[Addr]:
    """Return the cells that hold targets: of the last without a slot, and of the slots."""
    first, _ = cells_of(block.plan)
    return [first, *(slot.target_addr for slot in block.plan.open_slots)]


def tree_list(block: Block) -> tuple[Addr, ...]:
    """Return the targets that a block has guards for."""
    return tuple(tree_targets(block.plan.tree))


def _bigger_block(record: SiteRecord, known: Sequence[Count], n_open: int) -> Block | None:
    """Write a counting block with guards for ``known``; None if there is no room."""
    try:
        return add_counting_block(record, balance_tree(known), n_open)
    except (ArenaError, EncodeRangeError):
        return None


def end_window(record: SiteRecord, now_s: float) -> None:
    """Keep what the window counted in ``record.counts``; the block stays linked."""
    if record.counting is None:
        return
    latest = _latest_counts(record)
    counted = record.counted = _add_earlier(record, latest)
    if record.counts is None or counted.total > 0:
        record.counts, record.window_s = _choose_telling(record, latest, now_s)
        record.rate_hz = counted.total / max(1e-6, now_s - record.window_start_s)
    _end_counting(record)


def end_windows(records: Iterable[SiteRecord], now_s: float) -> None:
    """Do ``end_window`` for many sites: those that counted nothing cost next to nothing."""
    for arena, group in _by_arena(record for record in records if record.counting is not None):
        blocks = [record.counting for record in group if record.counting is not None]
        is_unused = _sum_blocks(arena, blocks) == 0
        for record, unused in zip(group, is_unused.tolist(), strict=True):
            if not unused or record.earlier or record.drained.total:
                end_window(record, now_s)
                continue
            record.counted = NO_COUNTS
            if record.counts is None:
                record.counts = NO_COUNTS
                record.window_s = max(1e-6, now_s - record.window_start_s)
                record.rate_hz = 0.0
            _end_counting(record)


def begin_sample(
    record: SiteRecord, spare: Block | None, now_s: float, max_slots: int = 0
) -> Block | None:
    """Redirect a promoted site to a counting block; return the block used.

    Args:
        record: A promoted site.
        spare: The counting block of an earlier sample, if it is for the same tree.
        now_s: CLOCK_MONOTONIC, seconds.
        max_slots: The policy's (``WatchSchedule``).

    Target state: running; one aligned store.
    """
    if record.active is None or record.plan is None:
        return None
    block = spare
    if block is None:
        try:
            block = add_counting_block(record, record.plan.tree, max_slots or SAMPLE_OPEN_SLOTS)
        except (ArenaError, EncodeRangeError):
            return None
    before = NO_COUNTS if spare is None else read_counts(block.plan, record.arena.columns)
    _begin_counting(record, block, before, now_s)
    redirect(record.active, block.addr)
    return block


def end_sample(record: SiteRecord, now_s: float) -> None:
    """Take the redirection back; add what was counted to ``record.sampled``."""
    if record.active is not None:
        point_back(record.active)
    latest = _latest_counts(record)
    counted = record.counted = _add_earlier(record, latest)
    counts, _ = _choose_telling(record, latest, now_s)
    record.sampled = counts if record.sampled is None else add(record.sampled, counts)
    if counted.total:
        record.rate_hz = counted.total / max(1e-6, now_s - record.window_start_s)
    _end_counting(record)
