# SPDX-License-Identifier: Apache-2.0
"""What a site has counted in its present learning window.

The blocks before the last still count what threads inside them do, so all blocks of a window
are read: what ``window_counts`` says is exact. Shares are another matter: the first blocks of
a window name only the targets that came first (``telling_counts``).
"""

from __future__ import annotations

from optpoline.controller.records import SiteRecord
from optpoline.learn.counting import (
    NO_COUNTS,
    SiteCounts,
    add,
    read_counts,
    spread_unknown,
    subtract,
)

__all__ = [
    "add_earlier",
    "choose_telling",
    "is_last_block_telling",
    "is_telling_soon",
    "latest_counts",
    "telling_counts",
    "window_counts",
]

MIN_WINDOW_COUNT = 256
"""Counts of the last, longest block are used alone for shares from here on: earlier blocks
of the window named only the targets that came first. With fewer, the shares of what those
did not name are taken from it."""


def window_counts(record: SiteRecord) -> SiteCounts:
    """Return all that the site's counting blocks have counted in this window: exact."""
    return add_earlier(record, latest_counts(record))


def latest_counts(record: SiteRecord) -> SiteCounts:
    """Return what the last of the site's counting blocks has counted in this window."""
    if record.counting is None or record.counts_before is None:
        return NO_COUNTS
    now = read_counts(record.counting.plan, record.arena.columns)
    if record.counts_before.total:
        now = subtract(now, record.counts_before)
    return add(now, record.drained) if record.drained.total else now


def add_earlier(record: SiteRecord, latest: SiteCounts) -> SiteCounts:
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
    return choose_telling(record, latest_counts(record), now_s)


def choose_telling(
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
    return not record.earlier or latest_counts(record).total >= MIN_WINDOW_COUNT


def is_telling_soon(record: SiteRecord, now_s: float, more_s: float) -> bool:
    """Tell whether a last block that has counted too little will have enough in a while.

    Args:
        record: The site.
        now_s: CLOCK_MONOTONIC, seconds.
        more_s: The while.
    """
    if record.counting is None or not record.earlier:
        return False
    latest = latest_counts(record)
    n_missing = MIN_WINDOW_COUNT - latest.total
    rate_hz = add_earlier(record, latest).total / max(1e-6, now_s - record.window_start_s)
    return 0 < n_missing <= rate_hz * more_s
