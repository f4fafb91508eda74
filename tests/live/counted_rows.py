# SPDX-License-Identifier: Apache-2.0
"""The rows that tests/targets/rows.c counts in, as a controller sees them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from optpoline.controller.address_space import child_space
from optpoline.controller.cell_batch import CellTable
from optpoline.controller.drain import Drained
from optpoline.controller.executor import Executor, OperationEvent
from optpoline.model import CELL_SIZE, SLOT_CLAIMED, Addr, CounterRows, RseqAbi
from tests.live.conftest import LiveTarget

__all__ = ["N_SINGLE", "N_TARGETS", "ROWS_TABLE_CELLS", "CountedRows", "executor_for", "totals_of"]

ROW_SHIFT = 12
N_SINGLE, N_SLOTS, N_TARGETS = 8, 4, 3
ROWS_TABLE_CELLS = N_SINGLE + 2 * (N_SLOTS + 1)
_STOP_TIMEOUT_NS = 2_000_000_000


class CountedRows:
    """A ``CounterMemory`` over the target's memory file."""

    def __init__(self, target: LiveTarget, *, has_rseq: bool = True) -> None:
        """Map it."""
        fd_number, addr = map(int, target.ask("where").split())
        self.rows = CounterRows(
            shared_addr=Addr(addr),
            row_shift=ROW_SHIFT,
            n_cpus=os.sysconf("SC_NPROCESSORS_CONF"),
            rseq=RseqAbi(offset=0, signature=0x53053053) if has_rseq else None,
        )
        fd = os.open(f"/proc/{target.pid}/fd/{fd_number}", os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = mmap.mmap(fd, self.rows.size)
        finally:
            os.close(fd)
        self._words = memoryview(self._memory).cast("Q")
        self.own_rows_addr = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def load_u64(self, addr: Addr) -> int:
        """Return a cell."""
        return self._words[(addr - self.rows.shared_addr) // CELL_SIZE]

    def store_u64(self, addr: Addr, value: int) -> None:
        """Store a cell."""
        self._words[(addr - self.rows.shared_addr) // CELL_SIZE] = value

    def columns(self, addr: Addr, n_cells: int) -> NDArray[np.uint64]:
        """Return adjacent cells of all rows."""
        cells = np.frombuffer(self._memory, np.uint64).reshape(1 + self.rows.n_cpus, -1)
        first = (addr - self.rows.shared_addr) // CELL_SIZE
        return cells[:, first : first + n_cells].copy()

    def cell(self, number: int, cpu: int | None) -> Addr:
        """Return the address of a cell of a row."""
        cell = Addr(self.rows.shared_addr + CELL_SIZE * number)
        return cell if cpu is None else self.rows.cell_of_cpu(cell, cpu)

    @property
    def table(self) -> CellTable:
        """All cells that the target uses."""
        first = self.rows.shared_addr
        pairs = range(N_SINGLE, ROWS_TABLE_CELLS, 2)
        return CellTable(
            addr=first,
            n_cells=ROWS_TABLE_CELLS,
            pair_addrs=tuple(Addr(first + CELL_SIZE * number) for number in pairs),
        )


def totals_of(drained: Drained) -> NDArray[np.uint64]:
    """Return what a drain took, as the target tells its totals: by cell, then by target."""
    (columns,) = drained.columns
    totals = np.zeros(N_SINGLE + N_TARGETS, np.uint64)
    totals[:N_SINGLE] = columns[:, :N_SINGLE].sum(axis=0)
    for row in columns:
        for number in range(N_SINGLE, ROWS_TABLE_CELLS, 2):
            assert row[number + 1] < SLOT_CLAIMED
            if row[number]:
                totals[N_SINGLE + int(row[number]) - 1] += row[number + 1]
            else:
                assert row[number + 1] == 0
    return totals


@contextmanager
def executor_for(
    target: LiveTarget,
    memory: CountedRows,
    on_event: Callable[[OperationEvent], None] | None = None,
) -> Iterator[Executor]:
    """Yield an executor for the target alone."""
    space = child_space(target.pid, may_stop=True, timeout_ns=_STOP_TIMEOUT_NS)
    space.is_target = True
    try:
        yield Executor(memories=lambda: [memory], spaces=lambda: [space], on_event=on_event)
    finally:
        space.memory.close()
