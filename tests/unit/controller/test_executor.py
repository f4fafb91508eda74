# SPDX-License-Identifier: Apache-2.0
"""Which exclusion a vector gets, and what is left when one does not last."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from optpoline.controller import executor as module
from optpoline.controller.cell_batch import CellTable
from optpoline.controller.drain import Drainer
from optpoline.controller.exclusion import Exclusion, Way, on_cpu, pinned
from optpoline.controller.executor import Executor, OperationEvent
from optpoline.errors import ExclusionError, OperationError, PermissionDenied
from optpoline.learn.operations import Add, CompareEqual, OperationStatus
from optpoline.model import SLOT_CLAIMED, Addr, BlockPlan, CounterRows, Miss, OpenSlot, RseqAbi
from optpoline.process.cell_fetcher import CellFetcher

BASE = 0x7000_0000_0000
N_CPUS = os.sysconf("SC_NPROCESSORS_CONF")


class Cells:
    """Counter rows of nobody's."""

    def __init__(self, *, has_rseq: bool = True, n_cpus: int = N_CPUS) -> None:
        """All 0."""
        abi = RseqAbi(offset=0, signature=1) if has_rseq else None
        self.rows = CounterRows(shared_addr=Addr(BASE), row_shift=9, n_cpus=n_cpus, rseq=abi)
        self.words = np.zeros((1 + n_cpus, 64), np.uint64)
        self.n_stores = 0

    @property
    def own_rows_addr(self) -> int:
        """Where they are."""
        return self.words.ctypes.data

    def load_u64(self, addr: Addr) -> int:
        """Return a cell."""
        return int(self.words.flat[(addr - BASE) // 8])

    def store_u64(self, addr: Addr, value: int) -> None:
        """Store a cell."""
        self.n_stores += 1
        self.words.flat[(addr - BASE) // 8] = value

    def columns(self, addr: Addr, n_cells: int) -> NDArray[np.uint64]:
        """Return adjacent cells of all rows."""
        first = (addr - BASE) // 8
        return self.words[:, first : first + n_cells].copy()


def cell(number: int, row: int = 1) -> Addr:
    """Return a cell of a row."""
    return Addr(BASE + (row << 9) + 8 * number)


def make(cells: Cells, events: list[OperationEvent], unreadable: tuple[int, ...] = ()) -> Executor:
    """Return an executor of a target without threads."""
    return Executor(
        memories=lambda: [cells],
        spaces=lambda: [],
        unreadable=lambda: unreadable,
        on_event=events.append,
    )


def scheduling() -> tuple[object, ...]:
    """Return what must be as before."""
    return os.sched_getaffinity(0), os.sched_getscheduler(0), os.sched_getparam(0).sched_priority


def test_events_and_results() -> None:
    cells, events = Cells(), list[OperationEvent]()
    executor = make(cells, events)
    assert executor.run(0, [Add(addr=cell(1), value=4)]).status is OperationStatus.DONE
    failed = executor.run(0, [Add(addr=cell(1), value=4), CompareEqual(addr=cell(1), value=4)])
    assert (failed.status, failed.index) == (OperationStatus.COMPARISON_FAILED, 1)
    with pytest.raises(OperationError, match="operation 0"):
        executor.run(0, [Add(addr=Addr(BASE - 8), value=4)])
    assert cells.words[1, 1] == 4
    assert [event.way for event in events] == [Way.PINNED, Way.PINNED, None]
    assert events[1].result == failed
    assert events[2].result is None
    assert events[2].error is not None
    assert all(event.duration_ns > 0 for event in events)


def test_without_rseq_threads_are_stopped() -> None:
    cells, events = Cells(has_rseq=False), list[OperationEvent]()
    make(cells, events).run(0, [Add(addr=cell(1), value=4)])
    assert events[0].way is Way.STOPPED
    assert events[0].why_not == "without rseq the row of a CPU is written from others as well"


def test_child_that_cannot_be_stopped() -> None:
    """Whoever may count in row 0 unseen forbids a vector there, not one of a CPU's row."""
    cells, events = Cells(), list[OperationEvent]()
    executor = make(cells, events, unreadable=(4711,))
    executor.run(0, [Add(addr=cell(1), value=4)])
    with pytest.raises(OperationError, match="process 4711 may count"):
        executor.run(None, [Add(addr=cell(1, 0), value=4)])
    assert not cells.words[0].any()
    assert cells.words[1, 1] == 4


@pytest.mark.parametrize("n_broken", [1, 3])
def test_begins_again_when_undermined(n_broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, events, asked = Cells(), list[OperationEvent](), list[int]()

    @contextmanager
    def fragile(cpu: int) -> Iterator[Exclusion]:
        def is_intact() -> bool:
            asked.append(cpu)
            return len(asked) > n_broken

        yield Exclusion(way=Way.PINNED, is_intact=is_intact)

    monkeypatch.setattr(module, "pinned", fragile)
    make(cells, events).run(0, [Add(addr=cell(1), value=4)])
    assert len(asked) == n_broken + 2
    assert (cells.words[1, 1], cells.n_stores) == (4, 1)
    assert events[0].is_exclusive


def test_says_when_it_broke_at_the_last_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    cells, events = Cells(), list[OperationEvent]()

    @contextmanager
    def fragile(cpu: int) -> Iterator[Exclusion]:
        yield Exclusion(way=Way.PINNED, is_intact=lambda: cells.n_stores == 0)

    monkeypatch.setattr(module, "pinned", fragile)
    make(cells, events).run(0, [Add(addr=cell(1), value=4)])
    assert not events[0].is_exclusive


def fail_pinned() -> None:
    """Raise an error while pinned."""
    with pinned(0) as exclusion:
        assert os.sched_getaffinity(0) == {0}
        assert os.sched_getscheduler(0) == os.SCHED_FIFO
        assert exclusion.is_intact()
        raise ValueError("inside")


def test_scheduling_is_restored_after_an_error() -> None:
    before = scheduling()
    with pytest.raises(ValueError, match="inside"):
        fail_pinned()
    assert scheduling() == before
    with pytest.raises(ExclusionError, match="offline"), pinned(N_CPUS + 900):
        pytest.fail("not reached")
    assert scheduling() == before


def test_a_switch_breaks_pinning() -> None:
    with pinned(0) as exclusion:
        assert exclusion.is_intact()
        threading.Event().wait(0.001)
        assert not exclusion.is_intact()


def plan_of(rows: CounterRows) -> BlockPlan:
    """Return a plan with two counted targets, two slots and the overflow pair before all."""
    return BlockPlan(
        operand="rax",
        tree=Miss(),
        thunk_addr=Addr(1),
        miss_count_addr=cell(1, 0),
        hit_count_addrs=((Addr(5), cell(2, 0)), (Addr(6), cell(3, 0))),
        open_slots=tuple(
            OpenSlot(target_addr=cell(at, 0), count_addr=cell(at + 1, 0)) for at in (4, 6)
        ),
        rows=rows,
    )


@pytest.mark.parametrize(
    "ways", [(Way.SECTION, Way.LOCKED), (Way.PINNED, Way.STOPPED), (Way.STOPPED,)]
)
def test_drain_takes_all_and_frees(ways: tuple[Way, ...]) -> None:
    cells, events = Cells(), list[OperationEvent]()
    table = CellTable.of_plan(plan_of(cells.rows))
    assert (table.addr, table.n_cells) == (cell(0, 0), 8)
    assert table.pair_addrs == (cell(0, 0), cell(4, 0), cell(6, 0))
    other = CellTable(addr=cell(20, 0), n_cells=2, pair_addrs=())
    cells.words[:, 8:20] = 99  # somebody else's
    cells.words[1, :8] = [70, 1, 2, 3, 71, 4, 72, 0]
    cells.words[0, :8] = [80, 5, 6, 0, 81, 7 + SLOT_CLAIMED, 0, SLOT_CLAIMED]
    cells.words[1, 20:22] = [8, 9]
    drainer = Drainer(make(cells, events))
    drained = drainer.drain(cells, [other, table], ways=ways)
    assert drained.columns[0][:2].tolist() == [[0, 0], [8, 9]]
    assert drained.columns[1][1].tolist() == [70, 1, 2, 3, 71, 4, 72, 0]
    assert drained.columns[1][0].tolist() == [80, 5, 6, 0, 81, 7, 0, 0]
    assert drained.is_exclusive
    assert not drained.left
    assert not cells.words[1:, :8].any()
    assert not cells.words[:, 20:22].any()
    assert cells.words[0, :8].tolist() == [80, 0, 0, 0, 81, SLOT_CLAIMED, 0, SLOT_CLAIMED]
    assert (cells.words[:, 8:20] == 99).all()
    again = drainer.drain(cells, [table], ways=ways)
    assert again.columns[0][1:].tolist() == [[0] * 8] * N_CPUS
    assert again.columns[0][0].tolist() == [80, 0, 0, 0, 81, 0, 0, 0]
    drainer.close()


def test_rows_that_no_way_is_open_for_are_left() -> None:
    cells, events = Cells(), list[OperationEvent]()
    cells.words[:, 2] = 5
    table = CellTable(addr=cell(0, 0), n_cells=8, pair_addrs=())
    drainer = Drainer(make(cells, events, unreadable=(4711,)))
    drained = drainer.drain(cells, [table], ways=(Way.PINNED, Way.STOPPED))
    assert [row for row, _ in drained.left] == [0]
    assert "4711" in drained.left[0][1]
    assert drained.columns[0][:, 2].tolist() == [0] + [5] * N_CPUS
    assert cells.words[:, 2].tolist() == [5] + [0] * N_CPUS
    drainer.close()


def test_what_was_taken_is_not_lost_with_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose CPU is not there needs a stop, which a debugger may forbid."""
    cells, events = Cells(n_cpus=N_CPUS + 1), list[OperationEvent]()
    cells.words[:, 2] = 5
    executor = make(cells, events)

    def forbid(_: int) -> AbstractContextManager[Exclusion]:
        raise PermissionDenied("gdb has it")

    monkeypatch.setattr(executor, "stopping", forbid)
    drainer = Drainer(executor)
    table = CellTable(addr=cell(0, 0), n_cells=8, pair_addrs=())
    drained = drainer.drain(cells, [table])
    assert [row for row, _ in drained.left] == [N_CPUS + 1]
    assert "gdb has it" in drained.left[0][1]
    assert drained.columns[0][:, 2].tolist() == [5] * (1 + N_CPUS) + [0]
    assert cells.words[:, 2].tolist() == [0] * (1 + N_CPUS) + [5]
    drainer.close()


def test_sections_only_work_on_their_cpu() -> None:
    """On another CPU than the one named nothing is taken."""
    words = np.array([3, 4, 5, 6], np.uint64)
    addrs = np.arange(4, dtype=np.uint64) * np.uint64(8) + np.uint64(words.ctypes.data)
    out = np.zeros(4, np.uint64)
    with CellFetcher() as fetcher, on_cpu(0):
        assert fetcher.has_sections
        assert fetcher.take_counts(addrs, out, 1) == 0
        assert fetcher.free_pairs(addrs[::2].copy(), out[:2], 1) == 0
        assert words.tolist() == [3, 4, 5, 6]
        assert fetcher.take_counts(addrs[:2], out[:2], 0) == 2
        assert fetcher.free_pairs(addrs[2:3].copy(), out[2:3], 0) == 1
        assert words.tolist() == [0, 0, 0, 0]
        assert out.tolist() == [3, 4, 6, 0]
        with pytest.raises(ValueError, match="one writable count"):
            fetcher.take_counts(addrs, out[:2], 0)
