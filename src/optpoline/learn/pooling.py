# SPDX-License-Identifier: Apache-2.0
"""What the sites of one table of dynamic calls are known to call, together.

A pool holds one *part* for each site that has counted anything: its branches a second, by
target. Rates add up whatever the lengths of the windows were, and a new part of a site takes
the place of its old one, so nothing is counted twice. Sums are kept as parts come and
go: a pool of thousands of sites costs what changes in it.

Who has counted enough is decided on by its own counts alone, as if there were no table; who
has not, by the table's. Sums for all, and guards for the table's other targets behind a
site's own, were tried as well (``optpoline simulate``; docs/architecture.md has the figures):
where sites of a table differ, a sum is the wrong order for each; and a guard behind others
hides by slow hits what a miss would tell at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from optpoline.learn.counting import NO_COUNTS, SiteCounts
from optpoline.model import Addr, Count

__all__ = ["ENOUGH_COUNT", "MAX_POOL_TARGETS", "SharedCounts", "TablePool"]

ENOUGH_COUNT = 256
"""Branches from which on a site knows its shares itself, to one part in sixteen (1/sqrt(n)):
what a window must have counted to be acted on alone, too (``AdaptivePolicy.min_count``)."""

MAX_POOL_TARGETS = 16
"""Hottest targets that are told apart; the rest is told as one number. A tree of so many guards
takes some 300 bytes. Where sites have 64 targets, 8, 16 and 32 made no difference (simulated: 8.4,
8.4 and 8.3 cycles a branch, 13.7 without a table), and 64 a worse one (8.9): a site that
misses learns its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedCounts:
    """What a site of a table is decided on by.

    Attributes:
        window: Its own counts, or the table's.
        window_s: In how many seconds the whole table makes as many branches: a block is worth
            it at each site if it would be at a single one that made them all. Who called
            through the others may call through this one next, and a block that nobody enters
            costs its bytes alone.
        is_by_table: Whether they are the table's.
    """

    window: SiteCounts
    window_s: float
    is_by_table: bool


@dataclass(frozen=True, slots=True)
class _Part:
    """What one site adds: branches a second by target, and to targets that are not known."""

    hits: dict[Addr, int]
    n_unknown: int


class TablePool:
    """The sum of what the sites of one table counted."""

    def __init__(self) -> None:
        """Know nothing."""
        self._parts: dict[int, _Part] = {}
        self._hits: dict[Addr, int] = {}
        self._n_unknown = 0
        self._counts: SiteCounts | None = NO_COUNTS

    def note(self, site: int, counts: SiteCounts, rate_hz: float) -> None:
        """Take in what is known of a site, in place of what was.

        Args:
            site: Names it.
            counts: Its shares; nothing counted says nothing new.
            rate_hz: Its branches a second.
        """
        total = counts.total
        if not total:
            return
        scale = rate_hz / total
        hits = {c.target: n for c in counts.counts if (n := round(scale * c.hit_count))}
        self.forget(site)
        part = self._parts[site] = _Part(hits, round(scale * counts.n_unknown))
        self._add(part, 1)

    def forget(self, site: int) -> None:
        """Drop what a site added."""
        part = self._parts.pop(site, None)
        if part is not None:
            self._add(part, -1)

    def _add(self, part: _Part, sign: int) -> None:
        """Add a part to the sums, or take it off."""
        self._counts = None
        self._n_unknown += sign * part.n_unknown
        for target, n in part.hits.items():
            left = self._hits.get(target, 0) + sign * n
            if left:
                self._hits[target] = left
            else:
                del self._hits[target]

    @property
    def counts(self) -> SiteCounts:
        """Branches a second of all sites together, the hottest targets first."""
        if self._counts is None:
            ranked = sorted(self._hits.items(), key=lambda item: (-item[1], item[0]))
            kept = tuple(Count(target=t, hit_count=n) for t, n in ranked[:MAX_POOL_TARGETS])
            rest = sum(n for _, n in ranked[MAX_POOL_TARGETS:])
            self._counts = SiteCounts(counts=kept, n_unknown=self._n_unknown + rest)
        return self._counts

    def share(self, own: SiteCounts) -> SharedCounts:
        """Return by what a site is decided on that has counted so much itself."""
        pool = self.counts
        is_by_table = own.total < ENOUGH_COUNT
        window = pool if is_by_table else own
        window_s = window.total / pool.total if pool.total else 0.0
        return SharedCounts(window=window, window_s=window_s, is_by_table=is_by_table)
