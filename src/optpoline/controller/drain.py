# SPDX-License-Identifier: Apache-2.0
"""Fetch and zero the counters of many tables while the program counts in them, exactly.

Every count is returned by exactly one drain. For each row, the first way that is open::

    row of a CPU, in sequences   SECTION   our thread moves there and takes the cells in
                                           sequences of its own; nothing stops, no privilege
                                 PINNED    at real-time priority, at most 1 ms at a time
                                 STOPPED   all threads stand
    row 0, or without rseq       LOCKED    what was read is subtracted by a locked instruction
                                 STOPPED

Slots that a CPU's threads have claimed in its own row are free again afterwards. Slots of row 0
stay claimed, only their counts are taken: a thread may stand between comparing such a slot's
target and counting, stopped or not, and would count for whoever claims the slot next.

All tables of a row are dealt with together: the calling thread visits each CPU in turn, and cells
that hold nothing are not touched at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optpoline.controller.cell_batch import Batch, CellTable, Part, group_tables
from optpoline.controller.exclusion import Exclusion, Way, on_cpu, pinned, promptly
from optpoline.controller.executor import (
    MAX_ATTEMPTS,
    CounterMemory,
    Executor,
    OperationEvent,
)
from optpoline.errors import ExclusionError, OptpolineError, ProcessGone, UnsupportedTarget
from optpoline.model import SLOT_CLAIMED
from optpoline.process.cell_fetcher import CellFetcher

__all__ = ["Drained", "Drainer"]

MAX_PINNED_CELLS = 500
"""Cells of one pinned run: loading and storing them takes 0.4 ms, of the 1 ms that nothing
else may be kept off a CPU."""

MAX_SECTION_CELLS = 10_000
"""Cells taken in one visit to a CPU, 0.2 ms: it may be at real-time priority, to be prompt."""

N_VISITS = 3
"""How often a CPU is visited again after the thread was moved away, or aborted too often."""

_COUNT_MASK = SLOT_CLAIMED - 1

_Words = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """What a drain has taken.

    Attributes:
        columns: For each table u64[1 + n_cpus][n_cells], as ``CounterMemory.columns`` has it:
            in target cells the target, in the others the count taken.
        left: Rows that could not be drained, and why; a later drain finds what they hold.
        is_exclusive: Whether it is certain that nothing was lost or is counted twice.
        duration_ns: How long it took.
    """

    columns: tuple[_Words, ...]
    left: tuple[tuple[int, str], ...]
    is_exclusive: bool
    duration_ns: int


class Drainer:
    """Drains the counters of one target.

    Args:
        executor: Who stops, and tells events.
    """

    def __init__(self, executor: Executor) -> None:
        """Map the code that takes counts, if this process may."""
        self._executor = executor
        try:
            self._fetcher: CellFetcher | None = CellFetcher()
        except UnsupportedTarget:
            self._fetcher = None

    def close(self) -> None:
        """Unmap it."""
        if self._fetcher is not None:
            self._fetcher.close()

    def drain(
        self,
        memory: CounterMemory,
        tables: Sequence[CellTable],
        *,
        ways: Sequence[Way] = tuple(Way),
    ) -> Drained:
        """Fetch and zero all counters of some tables of one counter memory.

        Args:
            memory: The counters.
            tables: Which; none may be given twice.
            ways: Ways that may be taken.

        Target state: running.
        On error: what was taken until then is lost; only the end of the target raises. A row
        for which it cannot be stopped now (a debugger has it) is left.

        Raises:
            ProcessGone: if it has to be stopped, and is gone.
        """
        begin_ns = time.monotonic_ns()
        rows = memory.rows
        parts = [Part(memory, group) for group in group_tables(tables)]
        left: list[tuple[int, str]] = []
        is_exclusive = True
        for row in range(1 + rows.n_cpus):
            batch = Batch.of_row(rows, row, parts)
            if batch.n_cells:
                reason = self._drain_row(memory, batch, ways)
                if reason is not None:
                    left.append((row, reason))
                is_exclusive = is_exclusive and batch.is_exclusive
                batch.scatter()
        columns = {id(table): part.columns_of(table) for part in parts for table in part.tables}
        return Drained(
            columns=tuple(columns[id(table)] for table in tables),
            left=tuple(left),
            is_exclusive=is_exclusive,
            duration_ns=time.monotonic_ns() - begin_ns,
        )

    def _drain_row(self, memory: CounterMemory, batch: Batch, ways: Sequence[Way]) -> str | None:
        """Take one row's cells; return why not all of them could be, or None."""
        reasons: list[str] = []
        for way in batch.ways:
            if way not in ways:
                continue
            begin_ns, n_before = time.monotonic_ns(), batch.n_left
            try:
                self._take(memory, batch, way)
            except ProcessGone:
                raise
            except OptpolineError as error:
                reasons.append(str(error))
            now_ns = time.monotonic_ns()
            self._executor.tell(
                OperationEvent(
                    time_ns=now_ns,
                    duration_ns=now_ns - begin_ns,
                    cpu=batch.cpu,
                    way=way,
                    why_not="; ".join(reasons) or None,
                    n_drained=n_before - batch.n_left,
                    is_exclusive=batch.is_exclusive,
                )
            )
            if not batch.n_left:
                return None
        return "; ".join(reasons) or "none of the ways allowed excludes who counts there"

    def _take(self, memory: CounterMemory, batch: Batch, way: Way) -> None:
        """Take what is left of a row's cells, one way.

        Raises:
            ExclusionError: if that cannot be done now, or only in part.
            OptpolineError: if the target cannot be stopped now.
        """
        match way:
            case Way.SECTION:
                self._take_in_sections(memory, batch)
            case Way.LOCKED:
                if self._fetcher is None:
                    raise ExclusionError("this process may not map code of its own")
                cells = batch.count_addrs() + _to_own(memory)
                self._fetcher.subtract(cells, batch.counts, _COUNT_MASK)
                batch.n_done = batch.n_cells
            case Way.PINNED:
                cpu = batch.cpu
                assert cpu is not None
                while batch.n_left:
                    self._take_exclusively(memory, batch, lambda _: pinned(cpu), MAX_PINNED_CELLS)
            case Way.STOPPED:
                self._take_exclusively(memory, batch, self._executor.stopping, batch.n_left)

    def _take_in_sections(self, memory: CounterMemory, batch: Batch) -> None:
        """Visit the CPU and take its cells in sequences of our own."""
        fetcher = self._fetcher
        if fetcher is None or not fetcher.has_sections:
            raise ExclusionError("this process has no restartable sequences")
        assert batch.cpu is not None
        singles, pairs = batch.singles + _to_own(memory), batch.pairs + _to_own(memory)
        n_singles, n_idle = len(singles), 0
        while batch.n_left and n_idle < N_VISITS:
            before = batch.n_done
            end = min(batch.n_cells, before + MAX_SECTION_CELLS)
            with promptly(), on_cpu(batch.cpu):
                if before < n_singles:
                    cells = singles[before : min(end, n_singles)]
                    out = batch.counts[before : before + len(cells)]
                    batch.n_done += fetcher.take_counts(cells, out, batch.cpu)
                if n_singles <= batch.n_done < end:
                    cells = pairs[batch.n_done - n_singles : end - n_singles]
                    out = batch.counts[batch.n_done : end]
                    batch.n_done += fetcher.free_pairs(cells, out, batch.cpu)
            n_idle = 0 if batch.n_done == end else n_idle + 1
        if batch.n_left:
            raise ExclusionError(f"this thread was moved off CPU {batch.cpu} or stepped through")

    def _take_exclusively(
        self,
        memory: CounterMemory,
        batch: Batch,
        exclude: Callable[[int], AbstractContextManager[Exclusion]],
        n_cells: int,
    ) -> None:
        """Take some cells while nobody else counts: load all, then store all."""
        first = batch.n_done
        last = first + min(n_cells, batch.n_left)
        n_singles = len(batch.singles)
        counts = batch.count_addrs()[first:last].tolist()
        frees = batch.pairs[max(0, first - n_singles) : max(0, last - n_singles)].tolist()
        keep = SLOT_CLAIMED if batch.cpu is None else 0
        for attempt in range(MAX_ATTEMPTS):
            with exclude(attempt) as exclusion:
                values = [memory.load_u64(addr) for addr in counts]
                if not exclusion.is_intact():
                    continue
                for addr, value in zip(counts, values, strict=True):
                    memory.store_u64(addr, value & keep)
                for addr in frees if not keep else ():
                    memory.store_u64(addr, 0)
                # At once: they are nowhere else by now, however the exclusion ends.
                batch.counts[first:last] += np.array(values, np.uint64) & np.uint64(_COUNT_MASK)
                batch.n_done = last
                batch.is_exclusive = batch.is_exclusive and exclusion.is_intact()
            return
        raise ExclusionError(f"an exclusion was undermined {MAX_ATTEMPTS} times on end")


def _to_own(memory: CounterMemory) -> np.uint64:
    """Return what to add, modulo 2^64, to an address in the program for our own."""
    return np.uint64((memory.own_rows_addr - memory.rows.shared_addr) % (1 << 64))
