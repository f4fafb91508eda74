# SPDX-License-Identifier: Apache-2.0
"""Give sites bigger counting blocks in the middle of a window, and look at what jumps reach.

Sites whose slots are full get a block whose tree holds what is known by then; the old one's
head is redirected to it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np

from optpoline.controller.counting_blocks import add_counting_block
from optpoline.controller.learning import TargetFilter, go_on_counting
from optpoline.controller.records import SiteRecord, by_arena
from optpoline.controller.summary import SiteState
from optpoline.controller.window_counts import latest_counts
from optpoline.errors import ArenaError, EncodeRangeError
from optpoline.learn.counting import cells_of, next_open_slots
from optpoline.model import Addr, Count, SiteKind, tree_targets
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block, redirect
from optpoline.promote.cost import CostModel
from optpoline.promote.tree import balance_tree

__all__ = ["grow_full"]

MAX_GROWTHS = 24
"""Bigger counting blocks between two promotions of a site: one with ever new
targets must not eat up the arena. A site of 128 targets needs five."""

MAX_COUNTED_TARGETS = CostModel().max_targets
"""Targets from which on a site's counting block grows no more."""


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
    for arena, group in by_arena(record for record in records if _is_counting(record)):
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
    counts = latest_counts(record)
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
    go_on_counting(record, block, time.monotonic())
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
