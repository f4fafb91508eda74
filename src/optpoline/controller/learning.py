# SPDX-License-Identifier: Apache-2.0
"""Learning windows of a site: begin them, go on in another block, end them.

A first window links baseline sites to counting blocks, which takes a stop; a
re-sampling window of a promoted site redirects its block's head, which takes
one store. Within a window sites get bigger blocks (``controller/growing.py``); what all of
them have counted is read at its end (``controller/window_counts.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from optpoline.controller.counting_blocks import add_counting_block
from optpoline.controller.records import SiteRecord, by_arena
from optpoline.controller.window_counts import add_earlier, choose_telling, latest_counts
from optpoline.errors import ArenaError, EncodeRangeError
from optpoline.learn.counting import NO_COUNTS, SiteCounts, add, cells_of, read_counts
from optpoline.model import Addr
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block, point_back, redirect

__all__ = [
    "Empty",
    "TargetFilter",
    "begin_sample",
    "begin_window",
    "end_sample",
    "end_window",
    "end_windows",
    "go_on_counting",
]

Empty = Callable[[Sequence[SiteRecord]], bool]
"""Takes all counts out of the first counting blocks of sites, and tells whether none was left."""

TargetFilter = Callable[[SiteRecord, Addr], bool]
"""Tells whether a site's block may branch to a target directly."""

SAMPLE_OPEN_SLOTS = 8
"""Slots for new targets in a re-sampling window of a promoted site."""


def _begin_counting(record: SiteRecord, block: Block, before: SiteCounts, now_s: float) -> None:
    """Note that a window of a site begins in ``block``, with what that has counted so far."""
    record.counting = block
    record.counts_before = before
    record.drained = record.drained_earlier = NO_COUNTS
    record.earlier.clear()
    record.window_start_s = record.counting_start_s = now_s
    record.watched_targets = 0


def go_on_counting(record: SiteRecord, block: Block, now_s: float) -> None:
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


def begin_window(
    records: Iterable[SiteRecord],
    now_s: float,
    empty: Empty | None = None,
    new: Collection[Addr] = (),
) -> None:
    """Note that sites lead to their first counting blocks, by their text or a redirection.

    Args:
        records: The sites.
        now_s: CLOCK_MONOTONIC, seconds.
        empty: Empties blocks that have counted before, as far as it can, so that their slots
            are free again; what they hold all the same is remembered.
        new: Blocks that nothing led to before: all that they hold is of this window.
    """
    linked = [r for r in records if r.home is not None and r.learner is not None]
    for arena, group in by_arena(linked):
        used: list[tuple[SiteRecord, Block]] = []
        for record in group:
            if (block := record.learner) is None:
                continue
            if block.addr in new:
                _begin_counting(record, block, NO_COUNTS, now_s)
            else:
                used.append((record, block))
        if used:
            _begin_again(arena, used, now_s, empty)


def _begin_again(
    arena: Arena, used: Sequence[tuple[SiteRecord, Block]], now_s: float, empty: Empty | None
) -> None:
    """Begin windows of sites in blocks that may have counted before."""
    is_fresh = _sum_blocks(arena, [block for _, block in used]) == 0
    if empty is not None and not is_fresh.all():
        left = [record for (record, _), fresh in zip(used, is_fresh, strict=True) if not fresh]
        if empty(left):
            is_fresh[:] = True
    for (record, block), fresh in zip(used, is_fresh.tolist(), strict=True):
        before = NO_COUNTS if fresh else read_counts(block.plan, arena.columns)
        _begin_counting(record, block, before, now_s)


def _sum_blocks(arena: Arena, blocks: Sequence[Block]) -> NDArray[np.uint64]:
    """Return the sum of all cells of each block; 0 if it was never entered."""
    cells = np.array([cells_of(block.plan) for block in blocks], np.int64).reshape(-1, 2)
    return arena.sum_ranges(cells[:, 0], cells[:, 1])


def end_window(record: SiteRecord, now_s: float) -> None:
    """Keep what the window counted in ``record.counts``; the block stays linked."""
    if record.counting is None:
        return
    latest = latest_counts(record)
    counted = record.counted = add_earlier(record, latest)
    if record.counts is None or counted.total > 0:
        record.is_news = counted.total > 0
        record.counts, record.window_s = choose_telling(record, latest, now_s)
        record.rate_hz = counted.total / max(1e-6, now_s - record.window_start_s)
    _end_counting(record)


def end_windows(records: Iterable[SiteRecord], now_s: float) -> None:
    """Do ``end_window`` for many sites: those that counted nothing cost next to nothing."""
    for arena, group in by_arena(record for record in records if record.counting is not None):
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
    latest = latest_counts(record)
    counted = record.counted = add_earlier(record, latest)
    counts, _ = choose_telling(record, latest, now_s)
    record.sampled = counts if record.sampled is None else add(record.sampled, counts)
    if counted.total:
        record.rate_hz = counted.total / max(1e-6, now_s - record.window_start_s)
    _end_counting(record)
