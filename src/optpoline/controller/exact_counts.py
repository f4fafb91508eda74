# SPDX-License-Identifier: Apache-2.0
"""Take what sites have counted out of their blocks, exactly, while the program counts on.

Every branch that a site has counted since it was first linked is in exactly one of three
places::

    a cell of one of its counting blocks   ``SiteRecord.tables``: also of blocks that nothing
                                           leads to any more, threads may still be inside
    ``SiteRecord.undrained``               taken out to empty slots for a new window, or because
                                           the block's memory is given back
    what ``drain`` has returned

A window under way loses nothing by it: what is taken out of its blocks beyond what they held
when it began is kept for it (``SiteRecord.drained``), the rest is taken off their baselines.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from optpoline.controller.address_space import target_space
from optpoline.controller.cell_batch import CellTable
from optpoline.controller.children import Children
from optpoline.controller.drain import Drainer
from optpoline.controller.exclusion import Way
from optpoline.controller.executor import Executor, OperationEvent
from optpoline.controller.records import SiteRecord
from optpoline.controller.target import Target
from optpoline.learn.counting import NO_COUNTS, SiteCounts, add, read_counts, subtract
from optpoline.model import Addr
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block

__all__ = ["ExactCounts", "describe_operation", "settle_drained"]

_UNNOTICED_WAYS = (Way.SECTION, Way.LOCKED)
"""Ways that keep nobody from anything."""

_ROW_0 = "the shared row"


class ExactCounts:
    """The counts of one session's sites.

    Args:
        target: The target.
        children: Its forked children, which count in the same cells.
        on_event: Called for each run of operations, once all accounts are settled.
    """

    def __init__(
        self,
        target: Target,
        children: Children,
        on_event: Callable[[OperationEvent], None] | None = None,
    ) -> None:
        """Nothing is touched before a drain."""
        self._on_event = on_event
        self._events: list[OperationEvent] = []
        self.executor = Executor(
            memories=lambda: target.arenas,
            spaces=lambda: (target_space(target), *children.find()),
            unreadable=lambda: children.unreadable,
            on_event=self._events.append,
        )
        self._drainer = Drainer(self.executor)

    def close(self) -> None:
        """Release what this process holds."""
        self._drainer.close()

    def drain(self, records: Sequence[SiteRecord]) -> dict[Addr, SiteCounts]:
        """Return what sites have counted since they were last drained, those that have.

        Target state: running; stopped for an instant where there is no other way.

        Raises:
            ProcessGone: if it has to be stopped, and is gone.
        """
        blocks = [(record, block) for record in records for block in record.tables.values()]
        try:
            self._take(blocks, tuple(Way))
        finally:
            self._tell()
        taken: dict[Addr, SiteCounts] = {}
        for record in records:
            if record.undrained.total:
                taken[record.site.addr] = record.undrained
                record.undrained = NO_COUNTS
        return taken

    def empty(self, records: Sequence[SiteRecord]) -> bool:
        """Empty the first counting blocks of sites; tell whether nothing was left in them.

        Nobody is stopped for it. Slots of the CPUs' rows are free again; those of row 0 stay
        claimed.
        """
        blocks = [(record, record.learner) for record in records if record.learner is not None]
        try:
            return self._take(blocks, _UNNOTICED_WAYS)
        finally:
            self._tell()

    def keep(self, record: SiteRecord, block_addr: Addr) -> None:
        """Keep what a block holds whose memory is about to be given back.

        A grace period has passed: nobody counts there any more.
        """
        block = record.tables.pop(block_addr, None)
        if block is not None:
            left = read_counts(block.plan, block.arena.columns)
            record.undrained = add(record.undrained, left)

    def _take(self, blocks: Sequence[tuple[SiteRecord, Block]], ways: Sequence[Way]) -> bool:
        """Move all that some blocks hold to ``undrained``; tell whether nothing was left."""
        groups: dict[Addr, list[tuple[SiteRecord, Block]]] = defaultdict(list)
        arenas: dict[Addr, Arena] = {}
        for record, block in blocks:
            groups[block.arena.addr].append((record, block))
            arenas[block.arena.addr] = block.arena
        is_all = True
        for addr, group in groups.items():
            tables = [CellTable.of_plan(block.plan) for _, block in group]
            drained = self._drainer.drain(arenas[addr], tables, ways=ways)
            for (record, block), columns in zip(group, drained.columns, strict=True):
                if not columns.any():
                    continue
                taken = read_counts(block.plan, partial(_given, columns))
                if taken.total:
                    settle_drained(record, block, taken)
            is_all = is_all and not drained.left
        return is_all

    def _tell(self) -> None:
        """Hand on what happened; who is told may drain again."""
        events = self._events[:]
        self._events.clear()
        if self._on_event is not None:
            for event in events:
                self._on_event(event)


def _given(columns: NDArray[np.uint64], _addr: Addr, _n_cells: int) -> NDArray[np.uint64]:
    """Return columns that were taken already."""
    return columns


def settle_drained(record: SiteRecord, block: Block, taken: SiteCounts) -> None:
    """Account for counts that were taken out of one of a site's blocks."""
    record.undrained = add(record.undrained, taken)
    if block is record.counting and record.counts_before is not None:
        record.drained = add(record.drained, subtract(taken, record.counts_before))
        record.counts_before = subtract(record.counts_before, taken)
        return
    for number, (earlier, before) in enumerate(record.earlier):
        if earlier is block:
            kept = subtract(taken, before)
            record.drained_earlier = add(record.drained_earlier, kept)
            record.earlier[number] = (earlier, subtract(before, taken))


def describe_operation(event: OperationEvent) -> str:
    """Return what one run of operations did, for people."""
    where = _ROW_0 if event.cpu is None else f"the row of CPU {event.cpu}"
    if event.operations or event.result is not None:
        what = f"{len(event.operations)} operations on {where}"
    else:
        counts = "count" if event.n_drained == 1 else "counts"
        what = f"took {event.n_drained} {counts} from {where}"
    how = "not done" if event.way is None else event.way.value
    parts = [f"{what} in {event.duration_ns / 1e6:.2f} ms", how]
    parts += [] if event.result is None else [event.result.status.name.lower().replace("_", " ")]
    parts += [] if event.why_not is None else [f"not otherwise: {event.why_not}"]
    parts += [] if event.error is None else [event.error]
    parts += [] if event.is_exclusive else ["perhaps not alone"]
    return ", ".join(parts)
