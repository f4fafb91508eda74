# SPDX-License-Identifier: Apache-2.0
"""The counter rows of an arena as its controller sees them (layout: ``patch/layout.py``).

A *column* is one cell in every row; a count is the sum of a column. Most of a row was never
counted in, and memory of a shared file comes into being when it is looked at through a
mapping: with 256 CPUs, looking at all rows would make the program's memory grow by 256
times what one CPU needs. So before a page is looked at the file is asked whether it holds
data there (SEEK_DATA), until it does; memory that swap has taken counts as data.

Everything returned is a copy. Each cell is read by one load; cells are not read together,
so sums are exact once those who count have stopped or gone elsewhere.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
from numpy.typing import NDArray

from optpoline.errors import ArenaFull
from optpoline.model import CELL_SIZE, SLOT_CLAIMED, Addr, CounterRows
from optpoline.patch.extents import Extent, FreeExtents

__all__ = ["CounterTable"]

_PAGE_SIZE = 4096
_COUNT_MASK = np.uint64(SLOT_CLAIMED - 1)


class CounterTable:
    """Hands out columns and reads them.

    Args:
        memory: The arena, mapped.
        fd: Its file; a duplicate is kept.
        off: Offset of row 0 in it.
        rows: The rows as the program sees them.
    """

    def __init__(self, memory: mmap.mmap, fd: int, off: int, rows: CounterRows) -> None:
        """Begin with every cell free."""
        self.rows = rows
        self._fd = os.dup(fd)
        self._off = off
        cells = np.frombuffer(memory, np.uint64, rows.size // CELL_SIZE, off)
        self._cells = cells.reshape(1 + rows.n_cpus, -1)
        self._free = FreeExtents(0, rows.row_size)
        self._used_end = 0
        n_pages = rows.row_size // _PAGE_SIZE
        self._has_data = np.zeros((1 + rows.n_cpus, n_pages), np.bool_)

    def close(self) -> None:
        """Let go of the memory."""
        self._cells = np.empty((0, 0), np.uint64)
        os.close(self._fd)

    @property
    def own_addr(self) -> int:
        """Where row 0 is in this process."""
        return int(self._cells.ctypes.data)

    # --- handing out columns

    def add(self, n_cells: int) -> Addr:
        """Return the address of ``n_cells`` adjacent cells that are 0 in every row.

        Raises:
            ArenaError: if all are used up.
        """
        found = self._free.find(n_cells * CELL_SIZE, lambda off: off)
        if found is None:
            raise ArenaFull(self.rows.shared_addr - self._off, "counters")
        self._free.take(found)
        self._used_end = max(self._used_end, found.end)
        return Addr(self.rows.shared_addr + found.at)

    def give(self, addr: Addr, n_cells: int) -> None:
        """Take cells back, and make them 0 in every row; nobody may count there any more."""
        first = self._index(addr)
        self._cells[self._rows_with_data(first, n_cells), first : first + n_cells] = 0
        off = first * CELL_SIZE
        self._free.give(Extent(start=off, at=off, end=off + n_cells * CELL_SIZE))

    def _index(self, addr: Addr) -> int:
        """Return the number of a cell in its row."""
        return (addr - self.rows.shared_addr) // CELL_SIZE

    # --- reading

    def columns(self, addr: Addr, n_cells: int) -> NDArray[np.uint64]:
        """Return adjacent cells as they are: u64[1 + n_cpus][n_cells]."""
        first = self._index(addr)
        rows = self._rows_with_data(first, n_cells)
        if len(rows) == len(self._cells):
            return self._cells[:, first : first + n_cells].copy()
        found = np.zeros((len(self._cells), n_cells), np.uint64)
        found[rows] = self._cells[rows, first : first + n_cells]
        return found

    def sum_cells(self, addrs: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the sum over all rows of each of some cells, claims of slots left out."""
        self._find_data(0, self._used_end)
        indices = (addrs - int(self.rows.shared_addr)) // CELL_SIZE
        pages = indices // (_PAGE_SIZE // CELL_SIZE)
        sums = np.zeros(len(indices), np.uint64)
        for number, row in enumerate(self._cells):
            there = np.flatnonzero(self._has_data[number, pages])
            values = row[indices[there]]
            sums[there] += values & _COUNT_MASK if number == 0 else values
        return sums

    def sum_ranges(self, addrs: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the sum of all columns of each of some ranges.

        Args:
            addrs: The first cell of each.
            sizes: Cells of each.
        """
        self._find_data(0, self._used_end)
        per_page = _PAGE_SIZE // CELL_SIZE
        n_pages = -(-self._used_end // _PAGE_SIZE)
        sums = np.zeros((n_pages, per_page), np.uint64)
        for number, row in enumerate(self._cells):
            pages = row[: n_pages * per_page].reshape(n_pages, per_page)
            there = np.flatnonzero(self._has_data[number, :n_pages])
            values = pages[there]
            sums[there] += values & _COUNT_MASK if number == 0 else values
        ends = np.concatenate([np.zeros(1, np.uint64), np.cumsum(sums)])
        indices = (addrs - int(self.rows.shared_addr)) // CELL_SIZE
        # Sums of u64 wrap around, and their differences back.
        return np.asarray(ends[indices + sizes] - ends[indices], np.uint64)

    # --- what exists

    def _rows_with_data(self, first: int, n_cells: int) -> NDArray[np.intp]:
        """Return the rows in which any of some cells was ever touched."""
        begin, end = first * CELL_SIZE, (first + n_cells) * CELL_SIZE
        self._find_data(begin, end)
        pages = self._has_data[:, begin // _PAGE_SIZE : -(-end // _PAGE_SIZE)]
        return np.flatnonzero(pages.any(axis=1))

    def _find_data(self, begin: int, end: int) -> None:
        """Find the pages that came into being since the last look, in a part of each row.

        Rows without any data are passed over in one call, however many they are.
        """
        pages = self._has_data[:, begin // _PAGE_SIZE : -(-end // _PAGE_SIZE)]
        if pages.all():
            return
        shift, file_end = self.rows.row_shift, self._off + self.rows.size
        at = self._off + begin
        while at < file_end:
            try:
                at = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError:
                return  # ENXIO: nothing but a hole behind
            number = at - self._off >> shift
            row_off = self._off + (number << shift)
            if at - row_off < begin:
                at = row_off + begin
                continue
            following = row_off + (1 << shift) + begin
            if at - row_off >= end or pages[number].all():
                at = following
                continue
            hole = min(os.lseek(self._fd, at, os.SEEK_HOLE), row_off + end)
            first, last = (at - row_off) // _PAGE_SIZE, (hole - row_off - 1) // _PAGE_SIZE
            self._has_data[number, first : last + 1] = True
            at = following if hole == row_off + end else hole
