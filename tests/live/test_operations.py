# SPDX-License-Identifier: Apache-2.0
"""Counts are taken, and vectors run, while programs count: nothing lost, nothing twice."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from optpoline.controller.drain import Drainer
from optpoline.controller.exclusion import Way
from optpoline.controller.executor import OperationEvent
from optpoline.errors import OperationError, ProcessGone
from optpoline.learn.operations import (
    Add,
    CompareEqual,
    Copy,
    Operation,
    OperationStatus,
    ShiftLeft,
)
from optpoline.model import SLOT_CLAIMED
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.counted_rows import (
    N_SINGLE,
    N_TARGETS,
    ROWS_TABLE_CELLS,
    CountedRows,
    executor_for,
    totals_of,
)

pytestmark = pytest.mark.live

N_DRAINS = 100
MOVED = ("2", "1000")
"""Two threads, moved to the other CPU every millisecond."""

Ways = tuple[Way, ...]
WAYS: dict[str, Ways] = {
    "section": (Way.SECTION, Way.LOCKED),
    "pinned": (Way.PINNED, Way.LOCKED),
    "stopped": (Way.STOPPED,),
    "pinned, row 0 stopped": (Way.PINNED, Way.STOPPED),
}


def scheduling() -> tuple[object, ...]:
    """Return what must be as before."""
    return os.sched_getaffinity(0), os.sched_getscheduler(0), os.sched_getparam(0).sched_priority


def count_and_drain(
    target: LiveTarget, memory: CountedRows, ways: Ways, n_drains: int = N_DRAINS
) -> tuple[list[OperationEvent], np.ndarray, np.ndarray, list[int]]:
    """Return (events, what drains took, what the target counted, each drain's duration)."""
    events: list[OperationEvent] = []
    totals = np.zeros(N_SINGLE + N_TARGETS, np.uint64)
    durations: list[int] = []
    with executor_for(target, memory, events.append) as executor:
        drainer = Drainer(executor)
        try:
            assert target.ask("go") == "going"
            for _ in range(n_drains):
                drained = drainer.drain(memory, [memory.table], ways=ways)
                totals += totals_of(drained)
                durations.append(drained.duration_ns)
            told = np.array(target.ask("halt").split(), np.uint64)
            # What was passed over because an exclusion did not last is found now.
            totals += totals_of(drainer.drain(memory, [memory.table]))
        finally:
            drainer.close()
    return events, totals, told, durations


@pytest.mark.parametrize("ways", WAYS.values(), ids=list(WAYS))
def test_drains_are_exact(
    start_target: StartTarget, ways: Ways, record_property: Callable[[str, object], None]
) -> None:
    target = start_target("rows", *MOVED)
    memory = CountedRows(target)
    before = scheduling()
    events, totals, told, durations = count_and_drain(target, memory, ways)
    assert scheduling() == before
    assert told.sum() > 1_000_000
    assert all(event.is_exclusive for event in events)
    assert totals.tolist() == told.tolist()
    # Every way that was to be taken was: rows of CPUs, and row 0.
    assert {event.way for event in events if event.n_drained} >= {*ways}
    left = memory.columns(memory.rows.shared_addr, ROWS_TABLE_CELLS)
    assert not left[1:].any()
    assert not (left[0, N_SINGLE + 1 :: 2] % SLOT_CLAIMED).any()
    record_property("drain_us_median", sorted(durations)[len(durations) // 2] / 1e3)
    record_property("counted", int(told.sum()))
    assert target.finish() == "ok\n"


def test_drains_without_rseq(start_target: StartTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.pthread.rseq=0")
    target = start_target("rows", *MOVED)
    monkeypatch.undo()
    memory = CountedRows(target, has_rseq=False)
    events, totals, told, _ = count_and_drain(target, memory, tuple(Way))
    assert totals.tolist() == told.tolist()
    assert {event.way for event in events} == {Way.LOCKED}
    assert {event.cpu for event in events} == {None}
    assert target.finish() == "ok\n"


def take_carelessly(target: LiveTarget, memory: CountedRows) -> bool:
    """Load and store what others count in, from whatever CPU; tell whether counts add up."""
    taken = 0
    assert target.ask("go") == "going"
    for _ in range(5_000):
        for cpu in range(memory.rows.n_cpus):
            for number in range(N_SINGLE):
                cell = memory.cell(number, cpu)
                taken += memory.load_u64(cell)
                memory.store_u64(cell, 0)
    told = np.array(target.ask("halt").split(), np.uint64)
    left = memory.columns(memory.rows.shared_addr, N_SINGLE)
    return taken + int(left.sum()) == int(told[:N_SINGLE].sum())


def test_carelessness_shows(start_target: StartTarget) -> None:
    """Without an exclusion counts are lost, so that the others add up is not luck."""
    target = start_target("rows", *MOVED)
    memory = CountedRows(target)
    assert any(not take_carelessly(target, memory) for _ in range(50))
    assert target.finish() == "ok\n"


@pytest.mark.parametrize("way", [Way.PINNED, Way.STOPPED])
def test_vectors_are_atomic(start_target: StartTarget, way: Way) -> None:
    """Cells of a CPU are moved to a cell of ours, all or nothing, while the CPU counts in them."""
    target = start_target("rows", *MOVED)
    memory = CountedRows(target)
    before = scheduling()
    events: list[OperationEvent] = []
    taken = np.zeros(N_SINGLE, np.uint64)
    with executor_for(target, memory, events.append) as executor:
        assert target.ask("go") == "going"
        for turn in range(200):
            cpu, number = turn % memory.rows.n_cpus, turn % N_SINGLE
            # Nobody else counts there.
            cell, kept = memory.cell(number, cpu), memory.cell(ROWS_TABLE_CELLS, cpu)
            vector: list[Operation] = [
                CompareEqual(addr=kept, value=0),
                Copy(dst=kept, src=cell, n_words=1),
                ShiftLeft(addr=cell, n_bits=63),
                ShiftLeft(addr=cell, n_bits=1),
                CompareEqual(addr=cell, value=0),
                Add(addr=kept, value=1),
            ]
            assert executor.run(cpu, vector, way=way).status is OperationStatus.DONE
            # A second time its first cell is not what it should be.
            vector = [Add(addr=cell, value=5), *vector]
            result = executor.run(cpu, vector, way=way)
            assert (result.status, result.index) == (OperationStatus.COMPARISON_FAILED, 1)
            taken[number] += memory.load_u64(kept) - 1
            memory.store_u64(kept, 0)
        told = np.array(target.ask("halt").split(), np.uint64)
    assert scheduling() == before
    assert {event.way for event in events} == {way}
    assert all(event.is_exclusive and event.error is None for event in events)
    left = memory.columns(memory.rows.shared_addr, N_SINGLE).sum(axis=0)
    assert (taken + left).tolist() == told[:N_SINGLE].tolist()
    assert taken.all()
    assert target.finish() == "ok\n"


def test_row_0_is_not_pinned_for(start_target: StartTarget) -> None:
    target = start_target("rows", "1")
    memory = CountedRows(target)
    events: list[OperationEvent] = []
    with executor_for(target, memory, events.append) as executor:
        assert target.ask("go") == "going"
        vector = [Add(addr=memory.cell(100, None), value=3)]
        executor.run(None, vector)
        executor.run(0, vector)
        executor.run(0, [Add(addr=memory.cell(100, 0), value=3)])
        with pytest.raises(OperationError, match="row 0"):
            executor.run(0, vector, way=Way.PINNED)
        with pytest.raises(OperationError, match="operation 1"):
            executor.run(0, [*vector, Add(addr=memory.cell(100, 1), value=1)])
    assert memory.load_u64(memory.cell(100, None)) == 6
    assert memory.load_u64(memory.cell(100, 1)) == 0
    assert [event.way for event in events] == [Way.STOPPED, Way.STOPPED, Way.PINNED, None, None]
    assert events[0].why_not == "row 0 is written from every CPU"
    assert events[4].error is not None
    target.tell("halt")


def test_cpu_outside_of_ours(start_target: StartTarget) -> None:
    """A CPU that does not exist stands for one that is offline, or not in our cpuset."""
    target = start_target("rows", "1")
    memory = CountedRows(target)
    absent = memory.rows.n_cpus
    # Twice as many rows, half as long; nobody counts meanwhile.
    memory.rows = replace(memory.rows, row_shift=memory.rows.row_shift - 1, n_cpus=2 * absent)
    events: list[OperationEvent] = []
    before = scheduling()
    with executor_for(target, memory, events.append) as executor:
        executor.run(absent, [Add(addr=memory.cell(0, absent), value=1)])
        with pytest.raises(OperationError, match=f"CPU {absent} is offline"):
            executor.run(absent, [Add(addr=memory.cell(0, absent), value=1)], way=Way.PINNED)
    assert events[0].way is Way.STOPPED
    assert events[0].why_not == f"CPU {absent} is offline or outside of our cpuset"
    assert scheduling() == before
    assert target.finish() == "ok\n"


def run_unprivileged(work: Callable[[], None]) -> int:
    """Run a function in a child without the right to real-time priority; return its status."""
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))
            os.setuid(65534)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_sections_need_no_privilege(start_target: StartTarget) -> None:
    target = start_target("rows", "2")
    memory = CountedRows(target)
    for cpu in range(memory.rows.n_cpus):
        memory.store_u64(memory.cell(0, cpu), 7)
    with executor_for(target, memory) as executor:

        def drain() -> None:
            drainer = Drainer(executor)
            refused = drainer.drain(memory, [memory.table], ways=WAYS["pinned"])
            assert [row - 1 for row, _ in refused.left] == list(range(memory.rows.n_cpus))
            assert "CAP_SYS_NICE" in refused.left[0][1]
            drained = drainer.drain(memory, [memory.table], ways=WAYS["section"])
            assert not drained.left
            assert totals_of(drained)[0] == 7 * memory.rows.n_cpus

        assert run_unprivileged(drain) == 0
    assert target.finish() == "ok\n"


def test_drains_while_a_debugger_steps(start_target: StartTarget) -> None:
    gdb = shutil.which("gdb")
    assert gdb is not None
    target = start_target("rows", "2")
    memory = CountedRows(target)
    steps = ["-ex", "thread 2", "-ex", "stepi 400", "-ex", "thread 3", "-ex", "stepi 400"]
    totals = np.zeros(N_SINGLE + N_TARGETS, np.uint64)
    with executor_for(target, memory) as executor:
        drainer = Drainer(executor)
        assert target.ask("go") == "going"
        debugger = subprocess.Popen(
            [gdb, "-nx", "-batch", "-p", str(target.pid), *steps, "-ex", "info threads"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(debugger.communicate(timeout=60)[0]))
        reader.start()
        n_drains = 0
        while reader.is_alive():
            totals += totals_of(drainer.drain(memory, [memory.table], ways=WAYS["section"]))
            n_drains += 1
            reader.join(0.01)
        assert debugger.returncode == 0, said
        assert n_drains > 2
        told = np.array(target.ask("halt").split(), np.uint64)
        totals += totals_of(drainer.drain(memory, [memory.table]))
        drainer.close()
    assert totals.tolist() == told.tolist()
    assert target.finish() == "ok\n"


@pytest.mark.parametrize("way", [Way.PINNED, Way.STOPPED])
def test_target_goes_away_in_the_middle(start_target: StartTarget, way: Way) -> None:
    before = scheduling()
    target = start_target("rows", *MOVED)
    memory = CountedRows(target)
    n_runs = 0
    with executor_for(target, memory) as executor:
        assert target.ask("go") == "going"
        vector = [Add(addr=memory.cell(100, 0), value=1)]
        killer = threading.Timer(0.05, os.kill, (target.pid, signal.SIGKILL))
        killer.start()
        try:
            while killer.is_alive() or way is Way.STOPPED:
                executor.run(0, vector, way=way)
                n_runs += 1
            # Pinning does not need the program: its counters outlive it.
            assert way is Way.PINNED
        except ProcessGone:
            assert way is Way.STOPPED
        killer.join()
        assert memory.load_u64(vector[0].addr) == n_runs
    assert scheduling() == before
    target.finish(-signal.SIGKILL)
