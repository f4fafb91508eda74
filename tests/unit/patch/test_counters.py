# SPDX-License-Identifier: Apache-2.0
"""Counter rows: handed out, read and summed, and memory only where somebody counted."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optpoline.errors import ArenaError
from optpoline.model import SLOT_CLAIMED, Addr, CounterRows
from optpoline.patch.counters import CounterTable

PAGE_SIZE = 4096
OFF = 2 * PAGE_SIZE
ROWS = CounterRows(shared_addr=Addr(0x2000_2000), row_shift=14, n_cpus=3, rseq=None)
N_CELLS = ROWS.row_size // 8


class Table:
    """A table, and the program's view of its memory."""

    def __init__(self) -> None:
        """Make a file with the rows behind two pages of something else."""
        self.fd = os.memfd_create("rows")
        os.ftruncate(self.fd, OFF + ROWS.size)
        self._memory = mmap.mmap(self.fd, OFF + ROWS.size)
        self.table = CounterTable(self._memory, self.fd, OFF, ROWS)

    def store(self, addr: int, row: int, value: int) -> None:
        """Store a cell as a program that runs on that CPU."""
        off = OFF + addr - ROWS.shared_addr + (row << ROWS.row_shift)
        os.pwrite(self.fd, value.to_bytes(8, "little"), off)

    def resident_size(self) -> int:
        """Return how much memory there is behind the file."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Let go of all."""
        self.table.close()
        self._memory.close()
        os.close(self.fd)


@pytest.fixture
def made() -> Iterator[Table]:
    """Return an empty table."""
    table = Table()
    yield table
    table.close()


def test_columns_are_what_each_row_holds(made: Table) -> None:
    first = made.table.add(5)
    addr = made.table.add(3)
    assert (first, addr) == (ROWS.shared_addr, ROWS.shared_addr + 40)
    assert made.table.columns(addr, 3).tolist() == [[0] * 3] * 4
    made.store(addr, 0, 7)
    made.store(addr + 8, 2, 8)
    made.store(addr + 16, 3, (1 << 64) - 1)
    assert made.table.columns(addr, 3).tolist() == [
        *([7, 0, 0], [0, 0, 0], [0, 8, 0], [0, 0, (1 << 64) - 1])
    ]
    assert made.table.columns(first, 5).sum() == 0


def test_columns_are_a_copy(made: Table) -> None:
    addr = made.table.add(1)
    made.store(addr, 1, 5)
    before = made.table.columns(addr, 1)
    made.store(addr, 1, 6)
    assert before[1, 0] == 5
    before[1, 0] = 9
    assert made.table.columns(addr, 1)[1, 0] == 6


def test_looking_makes_no_memory(made: Table) -> None:
    addr = made.table.add(N_CELLS)
    made.store(addr + PAGE_SIZE, 2, 1)  # the second page of one row
    assert made.resident_size() == PAGE_SIZE
    addrs = np.arange(addr, addr + ROWS.row_size, 8)
    for _ in range(2):
        assert made.table.columns(addr, N_CELLS).sum() == 1
        assert made.table.sum_cells(addrs).sum() == 1
        assert made.table.sum_ranges(addrs[:1], np.array([N_CELLS])).tolist() == [1]
        made.table.give(addr, N_CELLS)
        assert made.table.add(N_CELLS) == addr
        made.store(addr + PAGE_SIZE, 2, 1)
    assert made.resident_size() <= 4 * PAGE_SIZE  # at most the row that somebody counted in


def test_page_that_comes_into_being_later_is_seen(made: Table) -> None:
    addr = made.table.add(1)
    addrs = np.array([addr])
    for row in (3, 0, 1):
        before = int(made.table.sum_cells(addrs)[0])
        made.store(addr, row, 10 + row)
        assert made.table.columns(addr, 1)[row, 0] == 10 + row
        assert made.table.sum_cells(addrs)[0] == before + 10 + row
        assert made.table.sum_ranges(addrs, np.array([1]))[0] == before + 10 + row


def test_claims_are_no_part_of_a_sum(made: Table) -> None:
    addr = made.table.add(2)
    made.store(addr, 0, SLOT_CLAIMED | 5)
    made.store(addr, 1, 6)
    assert made.table.sum_cells(np.array([addr])).tolist() == [11]
    assert made.table.sum_ranges(np.array([addr]), np.array([2])).tolist() == [11]
    assert made.table.columns(addr, 1)[0, 0] == SLOT_CLAIMED | 5


def test_given_back_cells_are_zero_in_every_row(made: Table) -> None:
    kept, addr = made.table.add(1), made.table.add(2)
    for row in range(4):
        made.store(kept, row, 1)
        made.store(addr + 8, row, 1)
    made.table.give(addr, 2)
    assert made.table.add(2) == addr
    assert made.table.columns(addr, 2).tolist() == [[0, 0]] * 4
    assert made.table.columns(kept, 1).tolist() == [[1]] * 4


def test_used_up(made: Table) -> None:
    made.table.add(N_CELLS - 1)
    with pytest.raises(ArenaError, match="used up"):
        made.table.add(2)
    last = made.table.add(1)
    made.store(last, 3, 4)
    assert made.table.columns(last, 1)[3, 0] == 4
    with pytest.raises(ArenaError):
        made.table.add(1)


def test_nothing_to_sum(made: Table) -> None:
    nothing = np.zeros(0, np.int64)
    assert made.table.sum_cells(nothing).tolist() == []
    assert made.table.sum_ranges(nothing, nothing).tolist() == []


@settings(max_examples=50, deadline=None)
@given(
    stores=st.lists(
        st.tuples(st.integers(0, 599), st.integers(0, 3), st.integers(0, (1 << 63) - 1)),
        max_size=40,
    ),
    ranges=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 600)), max_size=10),
)
def test_sums_are_those_of_the_cells(
    stores: list[tuple[int, int, int]], ranges: list[tuple[int, int]]
) -> None:
    made = Table()
    try:
        addr = made.table.add(600)  # of two pages
        cells = {(i, row): value for i, row, value in stores}
        for (i, row), value in cells.items():
            made.store(addr + 8 * i, row, value)
        wanted = [sum(cells.get((i, row), 0) for row in range(4)) for i in range(600)]
        found = made.table.sum_cells(np.arange(addr, addr + 8 * 600, 8))
        assert found.tolist() == [value % (1 << 64) for value in wanted]
        spans = [(min(pair), max(pair)) for pair in ranges]
        sums = made.table.sum_ranges(
            np.array([addr + 8 * first for first, _ in spans], np.int64),
            np.array([last - first for first, last in spans], np.int64),
        )
        assert sums.tolist() == [sum(wanted[a:b]) % (1 << 64) for a, b in spans]
    finally:
        made.close()
