# SPDX-License-Identifier: Apache-2.0
"""Learning windows: give sites counting blocks, grow them in waves, read them.

A first window links baseline sites to counting blocks, which takes a stop; a
re-sampling window of a promoted site redirects its block's head, which takes
one store. Within a window, sites whose slots are full get a bigger block whose
tree holds what is known by then; that is a redirection too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.errors import ArenaError, EncodeRangeError
from optpoline.learn.counting import (
    FIRST_OPEN_SLOTS,
    SiteCounts,
    add,
    n_cells,
    next_open_slots,
    plan_counting,
    read_counts,
    subtract,
)
from optpoline.model import Addr, Count, Miss, SiteKind, TreeNode, tree_targets
from optpoline.patch.blocks import Block, add_block, point_back, redirect
from optpoline.promote.cost import CostModel
from optpoline.promote.tree import balance_tree

__all__ = [
    "MIN_FREE_CODE_SIZE",
    "TargetFilter",
    "add_counting_block",
    "begin_sample",
    "begin_window",
    "end_sample",
    "end_window",
    "first_block",
    "grow_full",
    "window_counts",
]

TargetFilter = Callable[[SiteRecord, Addr], bool]
"""Tells whether a site's block may branch to a target directly."""

SAMPLE_OPEN_SLOTS = 8
"""Slots for new targets in a re-sampling window of a promoted site."""

MIN_WINDOW_COUNT = 256
"""Counts of the last, longest block are used alone from here on: earlier blocks
of the window saw only the targets that came first."""

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
    n_known = sum(1 for _ in tree_targets(tree))
    plan = plan_counting(
        operand=record.site.thunk.operand,
        thunk_addr=record.thunk_addr,
        tree=tree,
        n_open=n_open,
        cells_addr=record.arena.add_counters(n_cells(n_known, n_open)),
    )
    return add_block(record.arena, plan, site_addr=record.site.addr)


def first_block(record: SiteRecord) -> Block:
    """Return the counting block of a site on its baseline; the same each time.

    Raises:
        ArenaError: if the arena is used up.
    """
    if record.learner is None:
        record.learner = add_counting_block(record, Miss(), FIRST_OPEN_SLOTS)
    else:
        point_back(record.learner)
    return record.learner


def _enter_counting(record: SiteRecord, block: Block, now_s: float) -> None:
    """Note that a site counts in ``block`` from now on."""
    record.counting = block
    record.counts_before = read_counts(block.plan, record.arena.load_u64)
    record.window_start_s = now_s


def begin_window(records: Iterable[SiteRecord], now_s: float) -> None:
    """Note that sites lead to their first counting blocks, by their text or a redirection."""
    for record in records:
        if record.home is not None and record.learner is not None:
            _enter_counting(record, record.learner, now_s)


def window_counts(record: SiteRecord) -> SiteCounts:
    """Return what the site's counting block has counted in this window."""
    if record.counting is None or record.counts_before is None:
        return SiteCounts(counts=(), n_unknown=0)
    now = read_counts(record.counting.plan, record.arena.load_u64)
    return subtract(now, record.counts_before)


def grow_full(records: Iterable[SiteRecord], may_guard: TargetFilter) -> int:
    """Give every site whose slots are full a bigger counting block.

    Returns:
        How many sites were given one.
    """
    grown = 0
    for record in records:
        if record.counting is None or record.state is SiteState.REFUSED:
            continue
        _check_jump(record, record.counting, may_guard)
        if record.counting is None or not _has_unknown(record, record.counting):
            continue
        counts = window_counts(record)
        n_open = next_open_slots(counts)
        if n_open == 0 or record.n_grown >= MAX_GROWTHS:
            continue
        known = tuple(c for c in counts.counts if may_guard(record, c.target))
        if len(known) != len(counts.counts) and record.unsafe_targets:
            continue
        if len(tree_list(record.counting)) >= MAX_COUNTED_TARGETS:
            continue
        block = _bigger_block(record, known, n_open)
        if block is None:
            continue
        entry = record.active if record.active is not None else record.home
        if entry is not None and entry is not block:
            redirect(entry, block.addr)
        if not counts_enough(counts):
            record.counts = counts
        _enter_counting(record, block, time.monotonic())
        record.n_grown += 1
        grown += 1
    return grown


def _check_jump(record: SiteRecord, block: Block, may_guard: TargetFilter) -> None:
    """Look at new targets of a jump at once: the site is refused if one reads the flags."""
    if record.site.kind is SiteKind.CALL:
        return
    for slot in block.plan.open_slots:
        target = record.arena.load_u64(slot.target_addr)
        if target:
            may_guard(record, Addr(target))


def _has_unknown(record: SiteRecord, block: Block) -> bool:
    """Tell cheaply whether a block has met targets that found no slot in this window.

    All but a few sites have not, and there may be thousands of them.
    """
    addr = block.plan.miss_count_addr
    before = record.counts_before
    return (
        addr is not None
        and before is not None
        and (record.arena.load_u64(addr) != before.n_unknown)
    )


def tree_list(block: Block) -> tuple[Addr, ...]:
    """Return the targets that a block has guards for."""
    return tuple(tree_targets(block.plan.tree))


def counts_enough(counts: SiteCounts) -> bool:
    """Tell whether a window alone says enough about shares."""
    return counts.total >= MIN_WINDOW_COUNT


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
    counts = window_counts(record)
    if record.counts is None or counts.total > 0:
        record.counts = counts
        record.window_s = max(1e-6, now_s - record.window_start_s)
        record.rate_hz = record.counts.total / record.window_s
    record.counting = None
    record.counts_before = None


def begin_sample(record: SiteRecord, spare: Block | None, now_s: float) -> Block | None:
    """Redirect a promoted site to a counting block; return the block used.

    Args:
        record: A promoted site.
        spare: The counting block of an earlier sample, if it is for the same tree.
        now_s: CLOCK_MONOTONIC, seconds.

    Target state: running; one aligned store.
    """
    if record.active is None or record.plan is None:
        return None
    block = spare
    if block is None:
        try:
            block = add_counting_block(record, record.plan.tree, SAMPLE_OPEN_SLOTS)
        except (ArenaError, EncodeRangeError):
            return None
    _enter_counting(record, block, now_s)
    redirect(record.active, block.addr)
    return block


def end_sample(record: SiteRecord, now_s: float) -> None:
    """Take the redirection back; add what was counted to ``record.sampled``."""
    if record.active is not None:
        point_back(record.active)
    counts = window_counts(record)
    record.sampled = counts if record.sampled is None else add(record.sampled, counts)
    if counts.total:
        record.rate_hz = counts.total / max(1e-6, now_s - record.window_start_s)
    record.counting = None
    record.counts_before = None
