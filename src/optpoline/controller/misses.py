# SPDX-License-Identifier: Apache-2.0
"""Watching the miss counters of all promoted sites at once.

A promoted block counts its misses in one cell of the shared row, all threads with a
plain ``inc``: what is wanted is a rate, not a count. Polled 10 or 20 times a second for
thousands of sites, this must not be a loop in Python: numpy gathers the cells of an
arena, subtracts and compares them. A poll is the first thing done after a sleep: with its
caches cold a call of numpy takes some 30 us, and where nobody misses much there are three.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.model import CELL_SIZE, Addr, SiteKind, TreeNode
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block
from optpoline.promote.schedule import forgotten_ratio

__all__ = ["MissWatch"]


@dataclass(frozen=True, slots=True)
class _ArenaCells:
    """The miss cells of one arena: as indices of its words."""

    arena: Arena
    indices: NDArray[np.int64]

    def read(self) -> NDArray[np.uint64]:
        """Return what each cell holds."""
        return self.arena.take_u64(self.indices)


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
        self._missed = np.zeros(0, np.uint64)
        """Since the read before the last."""
        self._elapsed_s = 1.0
        """Between these two."""
        self._is_jump = np.zeros(0, np.bool_)
        self._judged_hz: dict[int, float] = {}
        """By number of the site, where misses were judged normal lately."""
        self._due_s = np.zeros(0)
        self._first_due_s = math.inf

    def use(self, records: Iterable[SiteRecord]) -> None:
        """Watch the promoted ones among some sites.

        Whatever is known of a block that was watched before is kept; one that is new
        starts with what its cell holds now. What was judged is kept with the tree, which may be
        another block's by now (``controller/settling.py``).
        """
        seen = dict(zip(self._blocks, self._seen.tolist(), strict=True))
        missed = dict(zip(self._blocks, self._missed.tolist(), strict=True))
        judged = {id(self._trees[number]): hz for number, hz in self._judged_hz.items()}
        groups: dict[Addr, list[tuple[SiteRecord, Block, Addr]]] = defaultdict(list)
        for record in records:
            block = record.active
            if block is None or record.state is not SiteState.PROMOTED:
                continue
            if block.plan.miss_count_addr is not None:
                groups[record.arena.addr].append((record, block, block.plan.miss_count_addr))
        self.records = [record for group in groups.values() for record, _, _ in group]
        self._blocks = [block.addr for group in groups.values() for _, block, _ in group]
        trees = [block.plan.tree for group in groups.values() for _, block, _ in group]
        self._cells = []
        for group in groups.values():
            arena = group[0][0].arena
            addrs = np.array([addr for _, _, addr in group], np.int64)
            self._cells.append(_ArenaCells(arena, (addrs - arena.addr) // CELL_SIZE))
        now = self._read_cells()
        counted = zip(self._blocks, now.tolist(), strict=True)
        self._seen = np.array([seen.get(addr, count) for addr, count in counted], np.uint64)
        self._missed = np.array([missed.get(addr, 0) for addr in self._blocks], np.uint64)
        self._is_jump = np.array([r.site.kind is not SiteKind.CALL for r in self.records], np.bool_)
        numbers = enumerate(map(id, trees))
        self._judged_hz = {number: judged[tree] for number, tree in numbers if tree in judged}
        # Only now: while the old ones are kept no new one has the identity of another.
        self._trees = trees
        self._due_s = np.array([record.next_sample_s for record in self.records])
        self._first_due_s = float(self._due_s.min(initial=math.inf))

    def _read_cells(self) -> NDArray[np.uint64]:
        """Return the miss count of each site."""
        if len(self._cells) == 1:
            return self._cells[0].read()
        return np.concatenate([np.zeros(0, np.uint64), *(cells.read() for cells in self._cells)])

    def find_due(
        self, now_s: float, elapsed_s: float, floor_hz: float, growth: float, *, by_clock: bool
    ) -> tuple[list[SiteRecord], list[SiteRecord]]:
        """Read all counters; return (sites that miss as never before, sites whose time it is).

        Args:
            now_s: CLOCK_MONOTONIC, seconds.
            elapsed_s: Since the last read.
            floor_hz: Misses a second that are always too few.
            growth: Factor over what was judged fit that is needed.
            by_clock: Whether the second are wanted.
        """
        now = self._read_cells()
        # u64 differences wrap as the counters do.
        self._missed = now - self._seen
        self._elapsed_s = elapsed_s
        self._seen = now
        missing: list[int] = []
        floor = floor_hz * elapsed_s
        # ``max`` and ``flatnonzero`` take several times as long: they begin in Python.
        is_calm = int(np.maximum.reduce(self._missed, initial=0)) <= floor
        # Few sites miss so much at a time: of those a loop in Python may be made.
        for number in () if is_calm else np.flatnonzero(self._missed > floor).tolist():
            limit_hz = growth * self._judged_hz.get(number, 0.0)
            is_held = now_s < self.records[number].hold_until_s
            if self._rate_hz(number) > limit_hz and not is_held:
                missing.append(number)
        kept_ratio = forgotten_ratio(elapsed_s)
        for number, judged_hz in tuple(self._judged_hz.items()):
            level_hz = min(judged_hz, self._rate_hz(number))
            level_hz = max(level_hz, kept_ratio * judged_hz)
            if growth * level_hz > floor_hz:
                self._judged_hz[number] = level_hz
            else:
                del self._judged_hz[number]  # it raises no limit
        due: list[int] = []
        if by_clock and now_s >= self._first_due_s:
            waiting = np.flatnonzero(now_s >= self._due_s)
            waiting = waiting[np.argsort(self._due_s[waiting], kind="stable")]
            due = [number for number in waiting.tolist() if number not in missing]
        return self._at(missing), self._at(due)

    def _rate_hz(self, number: int) -> float:
        """Return how often a site missed between the last two reads, a second."""
        return float(self._missed[number]) / self._elapsed_s

    def jump_misses_hz(self) -> float:
        """Return how often all promoted jump sites together missed at the last read, a second."""
        return float(self._missed[self._is_jump].sum()) / self._elapsed_s

    def _at(self, numbers: Iterable[int]) -> list[SiteRecord]:
        """Return the sites with these numbers that are still promoted."""
        found = [self.records[number] for number in numbers]
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
                judged_hz = self._judged_hz.get(number, 0.0)
                self._judged_hz[number] = max(judged_hz, self._rate_hz(number))
        self._first_due_s = float(self._due_s.min(initial=math.inf))
