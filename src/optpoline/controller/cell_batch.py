# SPDX-License-Identifier: Apache-2.0
"""Which cells of which tables there are to drain, row by row, and where their counts belong.

Tables that lie within a page are looked at together (a *part*); what holds something in one row,
in all parts, is a *batch*: single counts first, then pairs of target and count. No I/O but the
one look at each part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from optpoline.controller.exclusion import Way
from optpoline.controller.executor import CounterMemory
from optpoline.model import CELL_SIZE, Addr, BlockPlan, CounterRows

__all__ = ["Batch", "CellTable", "Part", "group_tables"]

_PAGE_CELLS = 4096 // CELL_SIZE
_WAYS_OF_SECTIONS = (Way.SECTION, Way.PINNED, Way.STOPPED)
_WAYS_OF_LOCKS = (Way.LOCKED, Way.STOPPED)

_Words = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CellTable:
    """Adjacent cells of one block.

    Attributes:
        addr: The first, in row 0.
        n_cells: How many.
        pair_addrs: Those of them that hold a target, whose count is the next cell.
    """

    addr: Addr
    n_cells: int
    pair_addrs: tuple[Addr, ...]

    @classmethod
    def of_plan(cls, plan: BlockPlan) -> CellTable:
        """Return the cells of a counting block; those between them count as its own."""
        counts = [addr for _, addr in plan.hit_count_addrs]
        pairs = [slot.target_addr for slot in plan.open_slots]
        if plan.miss_count_addr is not None:
            # The last target that found no slot, and how many there were.
            pairs.append(Addr(plan.miss_count_addr - CELL_SIZE))
        first = min(counts + pairs)
        last = max(counts + [addr + CELL_SIZE for addr in pairs])
        return cls(
            addr=first, n_cells=(last - first) // CELL_SIZE + 1, pair_addrs=tuple(sorted(pairs))
        )


class Part:
    """Tables that lie within one page or so, and what was taken of them."""

    def __init__(self, memory: CounterMemory, tables: Sequence[CellTable]) -> None:
        """Look at their cells as they are."""
        self.tables = tables
        self.addr = tables[0].addr
        n_cells = (tables[-1].addr - self.addr) // CELL_SIZE + tables[-1].n_cells
        self.seen = memory.columns(self.addr, n_cells)
        self.taken = np.zeros_like(self.seen)
        is_pair = np.zeros(n_cells, np.bool_)
        pairs = [addr for table in tables for addr in table.pair_addrs]
        is_pair[(np.array(pairs, np.int64) - self.addr) // CELL_SIZE] = True
        firsts = (np.array([table.addr for table in tables], np.int64) - self.addr) // CELL_SIZE
        edges = np.zeros(n_cells + 1, np.int64)
        np.add.at(edges, firsts, 1)
        np.add.at(edges, firsts + np.array([table.n_cells for table in tables], np.int64), -1)
        is_count = np.cumsum(edges[:-1]) > 0
        is_count &= ~is_pair
        is_count[1:] &= ~is_pair[:-1]
        self.is_single = is_count
        self.is_pair = is_pair
        self.taken[:, is_pair] = self.seen[:, is_pair]

    def columns_of(self, table: CellTable) -> _Words:
        """Return what was taken of one table."""
        first = (table.addr - self.addr) // CELL_SIZE
        return self.taken[:, first : first + table.n_cells]


@dataclass(slots=True)
class Batch:
    """The cells of one row that hold something: single counts first, then pairs.

    Attributes:
        cpu: Whose row it is, None for row 0.
        ways: How they may be taken.
        singles: Addresses of single counts in that row.
        pairs: Addresses of the target cells of pairs.
        counts: What was taken of each.
        n_done: How many are done, from the first on.
        is_exclusive: Whether nobody can have come between.
        places: Where each part's share of ``counts`` belongs.
    """

    cpu: int | None
    ways: tuple[Way, ...]
    singles: _Words
    pairs: _Words
    counts: _Words
    n_done: int = 0
    is_exclusive: bool = True
    places: list[tuple[_Words, NDArray[np.intp], slice]] = field(default_factory=list)

    @classmethod
    def of_row(cls, rows: CounterRows, row: int, parts: Sequence[Part]) -> Batch:
        """Return what there is to take in a row."""
        found: dict[bool, list[tuple[Part, NDArray[np.intp]]]] = {False: [], True: []}
        for part in parts:
            seen = part.seen[row]
            # A pair is left alone until its target can be seen: then it stays the same.
            found[False].append((part, np.flatnonzero(part.is_single & (seen != 0))))
            found[True].append((part, np.flatnonzero(part.is_pair & (seen != 0))))
        row_off = row << rows.row_shift
        addrs = {
            is_pair: _concatenate(
                [
                    (at * CELL_SIZE + (int(part.addr) + row_off)).astype(np.uint64)
                    for part, at in of_kind
                ]
            )
            for is_pair, of_kind in found.items()
        }
        cpu = None if row == 0 else row - 1
        uses_sections = cpu is not None and rows.rseq is not None
        batch = cls(
            cpu=cpu,
            ways=_WAYS_OF_SECTIONS if uses_sections else _WAYS_OF_LOCKS,
            singles=addrs[False],
            pairs=addrs[True],
            counts=np.zeros(len(addrs[False]) + len(addrs[True]), np.uint64),
        )
        begin = 0
        for is_pair, of_kind in found.items():
            for part, at in of_kind:
                batch.places.append((part.taken[row], at + is_pair, slice(begin, begin + len(at))))
                begin += len(at)
        return batch

    @property
    def n_cells(self) -> int:
        """Single counts and pairs."""
        return len(self.counts)

    @property
    def n_left(self) -> int:
        """Those that are not done."""
        return self.n_cells - self.n_done

    def count_addrs(self) -> _Words:
        """Return the address of each count, those of pairs included."""
        return np.concatenate([self.singles, self.pairs + np.uint64(CELL_SIZE)])

    def scatter(self) -> None:
        """Put what was taken where it belongs in the tables."""
        for taken, at, part in self.places:
            taken[at] = self.counts[part]


def _concatenate(arrays: Sequence[_Words]) -> _Words:
    """Join arrays, none at all as well."""
    return np.concatenate(arrays) if arrays else np.zeros(0, np.uint64)


def group_tables(tables: Sequence[CellTable]) -> Iterator[list[CellTable]]:
    """Yield tables in address order, together while they are within a page's size."""
    group: list[CellTable] = []
    for table in sorted(tables, key=lambda table: table.addr):
        end = table.addr + table.n_cells * CELL_SIZE
        if group and end - group[0].addr > _PAGE_CELLS * CELL_SIZE:
            yield group
            group = []
        group.append(table)
    if group:
        yield group
