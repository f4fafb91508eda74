# SPDX-License-Identifier: Apache-2.0
"""Counts are exact: every branch once, whatever disturbs the threads that make it."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import optpoline
from optpoline.controller.audit import audit
from optpoline.controller.counting_blocks import first_block
from optpoline.controller.growing import grow_full
from optpoline.controller.learning import begin_window, end_windows
from optpoline.controller.letting_go import let_go
from optpoline.controller.linker import Linker, Move
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import DetachOutcome, SiteState
from optpoline.controller.target import Target
from optpoline.learn.counting import SiteCounts, cells_of
from optpoline.model import SiteKind, tree_targets
from optpoline.process.procfs import list_tids
from optpoline.process.rseq import RseqRegistration, choose_rseq_abi
from tests.live.conftest import TARGETS, LiveTarget, StartTarget
from tests.live.witness import RETPOLINE, Witness

pytestmark = pytest.mark.live

N_THREADS = 2
N_ROUNDS = 3_000_000
N_FUNCTIONS = 12
_WAVE_S = 0.02
_TIMEOUT_S = 20.0
WITHOUT_RSEQ = "glibc.pthread.rseq=0"


class Run:
    """A target whose sites count."""

    def __init__(self, live: LiveTarget) -> None:
        """Link the sites of its executable to counting blocks."""
        self.live = live
        self.target = Target(live.pid, stop_timeout_s=2.0)
        self.target.refresh_modules()
        (loaded,) = (m for m in self.target.modules.values() if m.module.is_main)
        self.records = self.target.make_records(loaded)
        self._linker = Linker(self.target)

    def link(self) -> None:
        """Lead every site to its first counting block."""
        for record in self.records:
            record.arena.journal(record.site)
        moves = [Move(record=record, block=first_block(record)) for record in self.records]
        self._linker.link(moves)
        for record in self.records:
            assert record.home is not None
            record.state = SiteState.LEARNING

    def count(self, n_rounds: int) -> list[int]:
        """Let the target work through one window; return (calls, jumps) as it says."""
        for record in self.records:
            first_block(record)  # an earlier window has led it on to a bigger one
        begin_window(self.records, time.monotonic())
        answers: list[str] = []
        asker = threading.Thread(target=lambda: answers.append(self.live.ask(str(n_rounds))))
        asker.start()
        while asker.is_alive():
            grow_full(self.records, self.target.may_guard)
            asker.join(_WAVE_S)
        end_windows(self.records, time.monotonic())
        return [int(word) for word in answers[0].split()[1:]]

    def counted(self, function: str) -> SiteCounts:
        """Return what the site in a function has counted in the last window."""
        record = self.record(function)
        assert record.counted is not None
        return record.counted

    def record(self, function: str) -> SiteRecord:
        """Return the site in a function."""
        (record,) = (r for r in self.records if (r.site.function or "").split("+")[0] == function)
        return record


@contextmanager
def counting(live: LiveTarget) -> Iterator[Run]:
    """Link a target's sites; at the end all is as it was."""
    before = Witness.of(live.pid)
    run = Run(live)
    try:
        run.link()
        assert audit(live.pid).faults == ()
        yield run
        assert audit(live.pid).faults == ()
    finally:
        result = let_go(run.target, run.records, leave=False)
        run.target.close()
    assert result.outcome is DetachOutcome.CLEAN, result
    before.check(live.pid)


def row_sums(records: Sequence[SiteRecord]) -> list[int]:
    """Return what the blocks that sites were learned with have counted in each row."""
    sums = [0] * (1 + records[0].arena.rows.n_cpus)
    for record in records:
        assert record.learner is not None
        plan = record.learner.plan
        columns = record.arena.columns(*cells_of(plan)).tolist()
        for number, row in enumerate(columns):
            counts = [row[1], *row[3 + len(plan.hit_count_addrs) :: 2]]
            sums[number] += sum(count & (1 << 63) - 1 for count in counts)
    return sums


def check_window(run: Run, n_rounds: int) -> None:
    """Check that one window counts each branch once."""
    calls, jumps = run.count(n_rounds)
    assert calls >= N_THREADS * n_rounds
    assert (run.counted("by_call").total, run.counted("by_jump").total) == (calls, jumps)


@pytest.mark.parametrize("how", ["quiet", "migrate", "signals", "both"])
def test_exact(start_target: StartTarget, how: str) -> None:
    with counting(start_target("counted", str(N_THREADS), how, flags=RETPOLINE)) as run:
        assert run.records[0].arena.rows.rseq is not None
        assert run.record("by_call").site.kind is SiteKind.CALL
        assert run.record("by_jump").site.kind is SiteKind.JUMP
        check_window(run, N_ROUNDS)
        for function in ("by_call", "by_jump"):
            record = run.record(function)
            assert record.n_grown > 0
            assert record.counts is not None
            assert len(record.counts.counts) == N_FUNCTIONS
        # The same first blocks again: what they counted before is no part of the window.
        check_window(run, N_ROUNDS // 4)


@contextmanager
def without_rseq() -> Iterator[None]:
    """Let what is started have a C library that registers no rseq area."""
    os.environ["GLIBC_TUNABLES"] = WITHOUT_RSEQ
    try:
        yield
    finally:
        del os.environ["GLIBC_TUNABLES"]


@pytest.mark.parametrize("how", ["quiet", "both"])
def test_exact_without_rseq(start_target: StartTarget, how: str) -> None:
    with without_rseq():
        live = start_target("counted", str(N_THREADS), how, flags=RETPOLINE)
    with counting(live) as run:
        assert run.records[0].arena.rows.rseq is None
        check_window(run, N_ROUNDS)


@pytest.fixture
def musl_target(tmp_path: Path) -> Iterator[LiveTarget]:
    """Return the target linked statically with another C library, which registers no rseq."""
    path = tmp_path / "counted"
    command = ["musl-gcc", "-static", *RETPOLINE, "-o", str(path), str(TARGETS / "counted.c")]
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        pytest.skip("musl-gcc is not installed")
    live = LiveTarget([str(path), str(N_THREADS), "both"])
    yield live
    with live.process as process:
        process.kill()


def test_exact_with_musl(musl_target: LiveTarget) -> None:
    with counting(musl_target) as run:
        assert run.records[0].arena.rows.rseq is None
        check_window(run, N_ROUNDS)


def test_counted_in_the_rows_of_cpus(start_target: StartTarget) -> None:
    """A known target of a thread that nobody disturbs is counted in the row of its CPU."""
    live = start_target("counted", str(N_THREADS), "quiet", flags=RETPOLINE)
    cpus = sorted(os.sched_getaffinity(0))
    workers = sorted(set(list_tids(live.pid)) - {live.pid})
    assert len(workers) == N_THREADS
    where = [cpus[number % len(cpus)] for number in range(N_THREADS)]
    for tid, cpu in zip(workers, where, strict=True):
        os.sched_setaffinity(tid, {cpu})
    with counting(live) as run:
        record = run.record("by_call")
        begin_window(run.records, time.monotonic())
        run.live.ask(str(N_ROUNDS))
        shared, *found = row_sums([record])
    assert shared + sum(found) == N_THREADS * N_ROUNDS
    assert shared < 0.01 * sum(found)
    for cpu, count in enumerate(found):
        n_here = where.count(cpu) * N_ROUNDS
        assert n_here - shared <= count <= n_here


def test_registration_is_found_in_every_thread(start_target: StartTarget) -> None:
    live = start_target("calls", "spin", "4", flags=RETPOLINE)
    target = Target(live.pid, stop_timeout_s=2.0)
    found: dict[int, RseqRegistration] = {}
    deadline_s = time.monotonic() + _TIMEOUT_S
    try:
        while len(found) < 4 and time.monotonic() < deadline_s:
            with target.stop() as stop:  # those that wait for a CPU may be left alone
                some = stop.read_rseq_registrations()
                assert {one.tid for one in some} == {thread.tid for thread in stop.stopped}
                abi = choose_rseq_abi(some, target.memory)
            # One that has hardly run has not registered yet.
            found |= {one.tid: one for one in some if one.area_addr}
            assert abi is not None or not some
    finally:
        target.close()
    assert len(found) >= 4
    assert len({one.thread_pointer for one in found.values()}) == len(found)
    assert len({(one.offset, one.signature) for one in found.values()}) == 1
    assert live.finish().startswith("ok ")


# --- drained while the program runs

N_DRAINED_CALLS = 50_000_000
N_DRAINS = 100
N_WARM_ROUNDS = 5_000
FUNCTIONS = tuple(f"f{number}" for number in range(N_FUNCTIONS))

Totals = dict[str, Counter[str]]
"""For each site, by its function: how often each target was taken; "" for those without a slot."""


def ask_for_rounds(live: LiveTarget, n_rounds: int) -> Counter[str]:
    """Let the target work; return how often it went to each function, at each of its sites."""
    assert live.ask(str(n_rounds)) == "done" + f" {N_THREADS * n_rounds}" * 2
    made = [int(word) for word in live.ask("targets").split()[1:-1]]
    assert sum(made) == N_THREADS * n_rounds
    return Counter(dict(zip(FUNCTIONS, made, strict=True)))


def drain_into(session: optpoline.Session, totals: Totals) -> None:
    """Drain a session's sites once."""
    names = {record.site.addr: record.site.function or "" for record in session.records}
    for addr, counts in session.drain().items():
        found = totals.setdefault(names[addr].split("+")[0], Counter())
        found.update({session.target.symbol_at(c.target) or "": c.hit_count for c in counts.counts})
        found.update({"": counts.n_unknown} if counts.n_unknown else {})


def run_beside(work: Callable[[], None], meanwhile: Callable[[], None]) -> None:
    """Do one thing in a thread of its own, and another again and again until it is done."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():
        meanwhile()
        thread.join(0.001)
    assert not failures, failures


def learn_all_targets(
    session: optpoline.Session, live: LiveTarget, is_linked: threading.Event
) -> Counter[str]:
    """Learn until every site has a place for each function; return what the target did."""
    made: Counter[str] = Counter()
    stop = threading.Event()

    def work() -> None:
        deadline_s = time.monotonic() + _TIMEOUT_S
        try:
            assert is_linked.wait(_TIMEOUT_S)
            while not all(knows_all(record) for record in session.records):
                made.update(ask_for_rounds(live, N_WARM_ROUNDS))
                assert time.monotonic() < deadline_s
        finally:
            stop.set()

    def learn() -> None:
        if not stop.is_set():
            session.learn(_TIMEOUT_S, stop)

    run_beside(work, learn)
    return made


def knows_all(record: SiteRecord) -> bool:
    """Tell whether the block that a site counts in has a place for each function.

    Threads that meet one at the same time may each give it a slot of the shared row, so it
    must have one there already, where that is not the exception.
    """
    if not record.tables:
        return False
    *_, block = record.tables.values()
    known, slots = {*tree_targets(block.plan.tree)}, block.plan.open_slots
    if block.plan.is_below_stack_free and record.arena.rows.rseq is not None:
        return len(known) + len(slots) >= N_FUNCTIONS
    found = {record.arena.load_u64(slot.target_addr) for slot in slots} - {0}
    return len(known | found) == N_FUNCTIONS


def check_drains(live: LiveTarget, n_calls: int, config: optpoline.Config) -> list[str]:
    """Drain a session's sites while they count; return what it told of each drain."""
    told: list[str] = []
    is_linked = threading.Event()

    def tell(event: optpoline.Event) -> None:
        if event.kind is optpoline.EventKind.OPERATION:
            told.append(event.message)
        if event.kind is optpoline.EventKind.LEARNING:
            is_linked.set()

    before = Witness.of(live.pid)
    with optpoline.attach(live.pid, config=config, on_event=tell) as session:
        made = learn_all_targets(session, live, is_linked)
        totals: Totals = {}
        drain_into(session, totals)
        # Not all had a slot at once.
        assert {name: found.total() for name, found in totals.items()} == {
            "by_call": made.total(),
            "by_jump": made.total(),
        }
        assert all(found - made == Counter({"": found[""]}) for found in totals.values())
        assert session.drain() == {}
        totals.clear()
        told.clear()
        made.clear()
        n_drains = 0

        def drain() -> None:
            nonlocal n_drains
            drain_into(session, totals)
            n_drains += 1

        def work() -> None:
            made.update(ask_for_rounds(live, n_calls // N_THREADS))
            while n_drains < N_DRAINS:  # it was faster
                made.update(ask_for_rounds(live, n_calls // N_THREADS))

        run_beside(work, drain)
        drain_into(session, totals)
        assert made.total() >= n_calls
        assert totals.keys() == {"by_call", "by_jump"}
        for found in totals.values():
            # Threads that race for a slot may use two for a target, and leave it none: then it
            # is counted as unknown. Each is counted once all the same.
            unknown = found.pop("", 0)
            assert not found - made
            assert (made - found).total() == unknown
        assert audit(live.pid).faults == ()
        assert session.notes == []
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(live.pid)
    assert live.finish() == ""
    return told


def test_drained_exactly(start_target: StartTarget) -> None:
    """50 million calls and as many jumps, by threads that change their CPU each millisecond."""
    live = start_target("counted", str(N_THREADS), "migrate", flags=RETPOLINE)
    told = check_drains(live, N_DRAINED_CALLS, optpoline.Config())
    assert any("CPU 0 " in message and ", section" in message for message in told)
    # Who was moved in the middle of a sequence has counted there.
    assert any("the shared row" in message and ", locked" in message for message in told)


def test_drained_exactly_without_rseq(start_target: StartTarget) -> None:
    with without_rseq():
        live = start_target("counted", str(N_THREADS), "migrate", flags=RETPOLINE)
    told = check_drains(live, N_DRAINED_CALLS // 5, optpoline.Config())
    assert any("CPU 0 " in message for message in told)
    assert all(", locked" in message for message in told)


def test_drained_exactly_from_one_row(start_target: StartTarget) -> None:
    live = start_target("counted", str(N_THREADS), "migrate", flags=RETPOLINE)
    told = check_drains(live, N_DRAINED_CALLS // 5, optpoline.Config(shared_counters=True))
    assert all("the shared row" in message and ", locked" in message for message in told)
