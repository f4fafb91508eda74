# SPDX-License-Identifier: Apache-2.0
"""Watching the miss counters of all promoted sites at once.

A promoted block counts its misses in one cell of the shared row, all threads with a
plain ``inc``: what is wanted is a rate, not a count. Polled 20 times a second for
thousands of sites, this must not be a loop in Python: the cells of an arena are
copied in one piece, and numpy gathers, subtracts and compares them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.model import CELL_SIZE, Addr, TreeNode
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block

__all__ = ["MissWatch"]

FORGOTTEN_PER_READ = 0.9
"""What is left of a site's judged miss rate after a read without as many: a level of
misses that was found to be no reason for a change is taken for normal for a second."""


@dataclass(frozen=True, slots=True)
class _ArenaCells:
    """The miss cells of one arena: a span of row 0, and where in it they are."""

    arena: Arena
    first_addr: Addr
    size: int
    indices: NDArray[np.int64]

    def read(self) -> NDArray[np.uint64]:
        """Return what each cell holds."""
        span = np.frombuffer(self.arena.read(self.first_addr, self.size), np.uint64)
        return np.asarray(span[self.indices], np.uint64)


class MissWatch:
    """The promoted sites and how often each misses.

    Attributes:
        records: The sites watched; what ``read`` and ``find_due`` number.
    """

    def __init__(self) -> None:
        """Watch nothing."""
        self.records: list[SiteRecord] = []
        self._cells: list[_ArenaCells] = []
        self._blocks: list[Addr] = []
        self._trees: list[TreeNode] = []
        self._seen = np.zeros(0, np.uint64)
        self._rate_hz = np.zeros(0)
        self._judged_hz = np.zeros(0)
        self._due_s = np.zeros(0)
        self._hold_s = np.zeros(0)

    def use(self, records: Iterable[SiteRecord]) -> None:
        """Watch the promoted ones among some sites.

        Whatever is known of a block that was watched before is kept; one that is new
        starts with what its cell holds now. What was judged is kept with the tree, which may be
        another block's by now (``controller/settling.py``).
        """
        seen = dict(zip(self._blocks, self._seen.tolist(), strict=True))
        judged = {
            id(tree): rate_hz
            for tree, rate_hz in zip(self._trees, self._judged_hz.tolist(), strict=True)
        }
        groups: dict[Addr, list[tuple[SiteRecord, Block, Addr]]] = defaultdict(list)
        for record in records:
            block = record.active
            if block is None or record.state is not SiteState.PROMOTED:
                continue
            if block.plan.miss_count_addr is not None:
                groups[record.arena.addr].append((record, block, block.plan.miss_count_addr))
        self.records = [record for group in groups.values() for record, _, _ in group]
        self._blocks = [block.addr for group in groups.values() for _, block, _ in group]
        self._trees = [block.plan.tree for group in groups.values() for _, block, _ in group]
        self._cells = []
        for group in groups.values():
            addrs = np.array([addr for _, _, addr in group], np.int64)
            first, last = int(addrs.min()), int(addrs.max())
            indices = (addrs - first) // CELL_SIZE
            size = last - first + CELL_SIZE
            self._cells.append(_ArenaCells(group[0][0].arena, Addr(first), size, indices))
        now = self._read_cells()
        counted = zip(self._blocks, now.tolist(), strict=True)
        self._seen = np.array([seen.get(addr, count) for addr, count in counted], np.uint64)
        self._judged_hz = np.array([judged.get(id(tree), 0.0) for tree in self._trees])
        self._rate_hz = np.array([record.miss_rate_hz for record in self.records])
        self._due_s = np.array([record.next_sample_s for record in self.records])
        self._hold_s = np.array([record.hold_until_s for record in self.records])

    def _read_cells(self) -> NDArray[np.uint64]:
        """Return the miss count of each site."""
        if not self._cells:
            return np.zeros(0, np.uint64)
        return np.concatenate([cells.read() for cells in self._cells])

    def find_due(
        self, now_s: float, elapsed_s: float, floor_hz: float, growth: float
    ) -> tuple[list[SiteRecord], list[SiteRecord]]:
        """Read all counters; return (sites that miss as never before, sites whose time it is).

        Args:
            now_s: CLOCK_MONOTONIC, seconds.
            elapsed_s: Since the last read.
            floor_hz: Misses a second that are always too few.
            growth: Factor over what was judged fit that is needed.
        """
        now = self._read_cells()
        # u64 differences wrap as the counters do.
        before, self._rate_hz = self._rate_hz, (now - self._seen) / elapsed_s
        self._seen = now
        limit_hz = np.maximum(floor_hz, growth * self._judged_hz)
        is_missing = (self._rate_hz > limit_hz) & (now_s >= self._hold_s)
        self._judged_hz = np.maximum(
            np.minimum(self._judged_hz, self._rate_hz), FORGOTTEN_PER_READ * self._judged_hz
        )
        for number in np.flatnonzero((before > 0) | (self._rate_hz > 0)).tolist():
            self.records[number].miss_rate_hz = float(self._rate_hz[number])
        is_due = (now_s >= self._due_s) & ~is_missing
        due = np.flatnonzero(is_due)
        due = due[np.argsort(self._due_s[due], kind="stable")]
        return self._at(np.flatnonzero(is_missing)), self._at(due)

    def _at(self, numbers: NDArray[np.intp]) -> list[SiteRecord]:
        """Return the sites with these numbers that are still promoted."""
        found = [self.records[number] for number in numbers.tolist()]
        return [record for record in found if record.state is SiteState.PROMOTED]

    def judged(self, records: Iterable[SiteRecord]) -> None:
        """Take over when sites that were looked at closely are due next.

        The rate at which they miss now was judged as well.
        """
        numbers = {id(record): number for number, record in enumerate(self.records)}
        for record in records:
            number = numbers.get(id(record))
            if number is not None:
                self._due_s[number] = record.next_sample_s
                self._hold_s[number] = record.hold_until_s
                self._judged_hz[number] = max(self._judged_hz[number], self._rate_hz[number])
