# SPDX-License-Identifier: Apache-2.0
"""Record what a program's sites do, branch by branch, in bursts.

The sites have been learned, so their targets are known. Each gets a *tracing block*,
a counting block that writes hits to a ring instead of counting them. A burst leads
all sites there by one aligned store each, empties the ring by polling, and leads
them back the same way. Between bursts promoted sites run promoted, others on
their thunks. Nothing is stopped.

A burst begins when the last site leads to its tracing block, and ends with the last look
at the ring before the first leads back. Sites in different arenas have rings of their
own; their entries are put behind each other at each look, so their order among each other
is known to one look only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.controller.target import Target
from optpoline.controller.trace_ring import RingReader, allocate_ring
from optpoline.errors import ArenaError, EncodeRangeError, ProcessGone
from optpoline.learn.counting import SiteCounts, n_cells
from optpoline.model import CELL_SIZE, Addr, BlockPlan, Count, SiteKind, TraceRing
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block, add_block, point_back, redirect
from optpoline.promote.tree import balance_tree
from optpoline.simulate.trace import Burst, TracePair, TraceSite, TraceTarget
from optpoline.simulate.trace_file import TraceWriter

__all__ = ["RecordPlan", "RecordTotals", "record_trace"]

MAX_TRACED_TARGETS = 128
MAX_BURST_PAIRS = 1 << 21
"""Branches after which a burst ends early; 8 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordPlan:
    """What to record.

    Attributes:
        seconds: For how long.
        burst_s: Length of a burst.
        every_s: From one burst's begin to the next; what is not longer than a burst
            records all the time.
    """

    seconds: float = 10.0
    burst_s: float = 0.02
    every_s: float = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordTotals:
    """What was recorded.

    Attributes:
        n_sites: Sites that were traced.
        n_targets: Their targets.
        n_bursts: Bursts.
        n_branches: Branches written.
        n_dropped: Branches overwritten before they were read.
        n_unknown: Branches to targets that were not known.
        seconds: Length of all bursts.
        is_gone: Whether the program ended meanwhile.
        notes: Sentences worth telling.
    """

    n_sites: int
    n_targets: int
    n_bursts: int
    n_branches: int
    n_dropped: int
    n_unknown: int
    seconds: float
    is_gone: bool
    notes: tuple[str, ...]


def record_trace(
    records: Sequence[SiteRecord],
    writer: TraceWriter,
    plan: RecordPlan,
    *,
    target: Target,
    pause: Callable[[float], None],
    stop: threading.Event | None = None,
) -> RecordTotals:
    """Record a program's sites for a while; every site leads elsewhere again at the end.

    Args:
        records: Sites that were learned.
        writer: Where to; it is not finished here.
        plan: What to record.
        target: The process.
        pause: Sleeps so many seconds, or raises ``ProcessGone``.
        stop: Ends the recording when set.

    Target state: running.
    """
    tracer = _Tracer(records, target)
    try:
        tracer.write_tables(writer)
        return tracer.record(writer, plan, pause, stop)
    finally:
        tracer.close()


@dataclass(slots=True)
class _Traced:
    """One site that is traced."""

    record: SiteRecord
    block: Block
    targets: tuple[Addr, ...]

    @property
    def entry(self) -> Block | None:
        """The block whose head decides where the site's branches go."""
        return self.record.active if self.record.active is not None else self.record.home

    def lead_in(self) -> None:
        """Lead the site to its tracing block; one store."""
        if self.entry is not None and self.record.state is not SiteState.REFUSED:
            redirect(self.entry, self.block.addr)

    def lead_out(self) -> None:
        """Lead it to its promoted block, or its thunk; one store."""
        if self.record.state is SiteState.REFUSED:
            return
        if self.record.active is not None:
            point_back(self.record.active)
        elif self.record.home is not None:
            redirect(self.record.home, self.record.thunk_addr)


@dataclass(slots=True)
class _Sums:
    """What bursts held together."""

    n_bursts: int = 0
    n_branches: int = 0
    n_dropped: int = 0
    n_unknown: int = 0
    seconds: float = 0.0

    def add(self, burst: Burst) -> None:
        """Add one burst."""
        self.n_bursts += 1
        self.n_branches += len(burst.pairs)
        self.n_dropped += burst.n_dropped
        self.n_unknown += burst.n_unknown
        self.seconds += burst.seconds


class _Tracer:
    """The tracing blocks of all sites, and their rings."""

    def __init__(self, records: Sequence[SiteRecord], target: Target) -> None:
        """Write a tracing block for each site that has targets; nothing leads there yet."""
        self._target = target
        self._traced: list[_Traced] = []
        self._readers: list[RingReader] = []
        self._rings: dict[Addr, TraceRing] = {}
        self._n_targets = 0
        self._n_left_out = 0
        first_id = 1
        for record in sorted(records, key=lambda record: -(record.rate_hz or 0.0)):
            traced = self._trace(record, first_id)
            if traced is not None:
                first_id += len(traced.targets)
                self._traced.append(traced)

    def close(self) -> None:
        """Let go of the arenas' memory."""
        for reader in self._readers:
            reader.close()

    def _trace(self, record: SiteRecord, first_id: int) -> _Traced | None:
        """Write one site's tracing block; None if it has no targets or there is no room."""
        counts = record.known
        if record.home is None or counts is None or not counts.total:
            return None
        known = self._known(record, counts)
        if record.state is SiteState.REFUSED or not known:
            return None
        targets = tuple(count.target for count in known)
        try:
            ring = self._ring_of(record.arena)
            plan = BlockPlan(
                operand=record.site.thunk.operand,
                tree=balance_tree(known),
                thunk_addr=record.thunk_addr,
                miss_count_addr=Addr(record.arena.add_counters(n_cells(0, 0)) + CELL_SIZE),
                rows=record.arena.rows,
                is_below_stack_free=record.site.kind is SiteKind.CALL,
                thunk_targets=frozenset(targets) & record.far_targets,
                trace=replace(
                    ring, ids=tuple((target, first_id + i) for i, target in enumerate(targets))
                ),
                load=record.site.load,
            )
            block = add_block(record.arena, plan, site_addr=record.site.addr)
        except (ArenaError, EncodeRangeError):
            self._n_left_out += 1
            return None
        return _Traced(record=record, block=block, targets=targets)

    def _known(self, record: SiteRecord, counts: SiteCounts) -> list[Count]:
        """Return the targets of a site that can be traced; those out of reach can."""
        found = [
            count
            for count in counts.counts
            if self._target.may_guard(record, count.target) or count.target in record.far_targets
        ]
        return found[:MAX_TRACED_TARGETS]

    def _ring_of(self, arena: Arena) -> TraceRing:
        """Return the ring of an arena, made now if there is none."""
        if arena.addr not in self._rings:
            ring = allocate_ring(arena)
            self._rings[arena.addr] = ring
            self._readers.append(RingReader(arena, ring))
        return self._rings[arena.addr]

    @property
    def _notes(self) -> tuple[str, ...]:
        """Sentences worth telling."""
        if not self._n_left_out:
            return ()
        return (f"{self._n_left_out} sites are not in the trace: no room for their blocks",)

    def write_tables(self, writer: TraceWriter) -> None:
        """Write what the ids mean."""
        numbers: dict[Addr, int] = {}
        pairs = [
            TracePair(site, numbers.setdefault(target, len(numbers)))
            for site, traced in enumerate(self._traced)
            for target in traced.targets
        ]
        sites = [self._describe(traced.record) for traced in self._traced]
        targets = [
            TraceTarget(address=addr, symbol=self._target.symbol_at(addr)) for addr in numbers
        ]
        self._n_targets = len(targets)
        writer.add_tables(sites, targets, pairs, self._notes)

    def _describe(self, record: SiteRecord) -> TraceSite:
        """Return a site as the trace names it."""
        site = record.site
        image = self._target.image_at(site.addr)
        return TraceSite(
            module=site.module,
            address=site.addr,
            offset=site.addr - (0 if image is None else image.module.load_bias),
            function=self._target.symbol_at(site.addr),
            kind=site.kind.value,
            rate_hz=record.rate_hz,
            table=site.table,
            max_guards=site.max_guards,
            is_plain=site.is_plain,
        )

    def record(
        self,
        writer: TraceWriter,
        plan: RecordPlan,
        pause: Callable[[float], None],
        stop: threading.Event | None,
    ) -> RecordTotals:
        """Record bursts until time is over, told to stop, or the program is gone."""
        sums = _Sums()
        is_gone = False
        next_s = time.monotonic()
        end_s = next_s + plan.seconds
        self._lead_out()
        try:
            while self._traced and (now_s := time.monotonic()) < end_s:
                if stop is not None and stop.is_set():
                    break
                pause(max(0.0, min(next_s, end_s) - now_s))
                begin_s = time.monotonic()
                if begin_s < end_s:
                    next_s = begin_s + plan.every_s
                    burst = self._burst(min(plan.burst_s, end_s - begin_s))
                    writer.add_burst(burst)
                    sums.add(burst)
            # Who set ``stop`` may have done so because the program ended.
            pause(0.0)
        except ProcessGone:
            is_gone = True
        finally:
            self._lead_out()
        return RecordTotals(
            n_sites=len(self._traced),
            n_targets=self._n_targets,
            n_bursts=sums.n_bursts,
            n_branches=sums.n_branches,
            n_dropped=sums.n_dropped,
            n_unknown=sums.n_unknown,
            seconds=sums.seconds,
            is_gone=is_gone,
            notes=self._notes,
        )

    def _lead_out(self) -> None:
        """Lead all sites away from their tracing blocks."""
        for traced in self._traced:
            traced.lead_out()

    def _burst(self, seconds: float) -> Burst:
        """Record one burst."""
        for reader in self._readers:
            reader.clear()
        try:
            for traced in self._traced:
                traced.lead_in()
            n_unknown = self._unknown()
            for reader in self._readers:
                reader.begin()
            start_ns = time.monotonic_ns()
            chunks, marks = self._read_until(start_ns + int(seconds * 1e9))
            n_unknown = self._unknown() - n_unknown
        finally:
            self._lead_out()
        return Burst(
            start_ns=start_ns,
            end_ns=marks[-1][1],
            pairs=np.concatenate(chunks) - np.uint32(1),
            marks=np.array(marks, np.int64),
            n_dropped=sum(reader.n_dropped for reader in self._readers),
            n_unknown=n_unknown,
        )

    def _unknown(self) -> int:
        """Return how many unknown targets came by in all tracing blocks ever."""
        total = 0
        for arena in {
            traced.record.arena.addr: traced.record.arena for traced in self._traced
        }.values():
            addrs = [
                traced.block.plan.miss_count_addr or 0
                for traced in self._traced
                if traced.record.arena is arena
            ]
            total += int(arena.sum_cells(np.array(addrs, np.int64)).sum())
        return total

    def _read_until(self, end_ns: int) -> tuple[list[NDArray[np.uint32]], list[tuple[int, int]]]:
        """Empty the rings until it is time; return what was read, and a mark for each time.

        Without a pause: a ring lasts for a millisecond or less.
        """
        chunks: list[NDArray[np.uint32]] = []
        marks: list[tuple[int, int]] = []
        n_read = 0
        now_ns = 0
        while now_ns < end_ns and n_read < MAX_BURST_PAIRS:
            now_ns = time.monotonic_ns()
            for reader in self._readers:
                chunk = reader.read(reader.head())
                chunks.append(chunk)
                n_read += len(chunk)
            marks.append((n_read, now_ns))
        return chunks, marks
