# SPDX-License-Identifier: Apache-2.0
"""Which blocks are garbage, when they are retired, and that they are freed after that.

The arena is a real one on a memfd; of the target and its children there is only what the
reclaimer asks them for, and threads are what an observer is told to see.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import cast

import pytest

from optpoline.controller import reclaim
from optpoline.controller.address_space import AddressSpace
from optpoline.controller.children import Children
from optpoline.controller.config import Config
from optpoline.controller.reclaim import Reclaimer
from optpoline.controller.records import SiteRecord
from optpoline.controller.target import Target
from optpoline.errors import Unsettled
from optpoline.learn.counting import NO_COUNTS
from optpoline.model import Addr, BlockPlan, Guard, Miss
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block, add_block, add_plain_thunk, redirect, redirection_of
from optpoline.patch.grace import Look, RetiredCode, ThreadKey
from optpoline.patch.layout import BlockState, JournalEntry
from optpoline.patch.ranges import AddressRanges
from optpoline.x86.blocks import POISON
from tests.unit.controller.lone_arena import THUNK, make_arena, make_record, make_site

SITE = make_site()
THREAD: ThreadKey = (100, 100)
CONFIG = Config(reclaim_after_size=1, reclaim_every_s=1.0, reclaim_duty=1e9)


@dataclass
class FakeTarget:
    """A target with one arena."""

    arenas: list[Arena]
    memory: FakeText = field(default_factory=lambda: FakeText())


@dataclass
class FakeText:
    """The program's text: one site."""

    code: bytes = SITE.code

    def read(self, addr: int, size: int) -> bytes:
        """Return it."""
        assert (addr, size) == (SITE.addr, len(SITE.code))
        return self.code


@dataclass
class FakeChildren:
    """Children whose text leads to some addresses."""

    leads: frozenset[Addr] = frozenset()
    asked: list[JournalEntry] = field(default_factory=list)
    unreadable: tuple[int, ...] = ()
    unreadable_next: tuple[int, ...] | None = None
    is_settled: bool = True

    def find(self) -> tuple[AddressSpace, ...]:
        """Return none: threads are the observer's."""
        if self.unreadable_next is not None:
            self.unreadable = self.unreadable_next
        return ()

    def led_to(self, entries: Iterable[JournalEntry]) -> frozenset[Addr]:
        """Return where they lead."""
        self.asked = list(entries)
        if not self.is_settled:
            raise Unsettled
        return self.leads


class FakeObserver:
    """Sees one thread, outside of all code unless it is told otherwise."""

    def __init__(self) -> None:
        """Begin with a thread outside."""
        self.is_unseen = False
        self.held: frozenset[int] = frozenset()
        self.n_looks = 0

    def look(self, ranges: AddressRanges, known: Collection[ThreadKey]) -> Look:
        """Look at the thread."""
        self.n_looks += 1
        held = frozenset(addr for addr in self.held if addr in ranges)
        is_outside = not self.is_unseen and not held
        return Look(
            quiescent=frozenset([THREAD] if is_outside else []),
            threads=frozenset([THREAD]),
            holding={THREAD: held} if held and not self.is_unseen else {},
        )

    def look_stopped(self, ranges: AddressRanges, known: Collection[ThreadKey]) -> Look:
        """Look at it in a stop, which shows no more."""
        return self.look(ranges, known)

    def search(self, ranges: AddressRanges) -> frozenset[int] | None:
        """Find nothing."""
        return frozenset()

    def is_switching(self) -> bool:
        """Never."""
        return False

    def suspect_switching(self) -> None:
        """Never mind."""


@dataclass
class Session:
    """What a test has."""

    arena: Arena
    observer: FakeObserver
    children: FakeChildren
    reclaimer: Reclaimer
    target: FakeTarget
    records: list[SiteRecord] = field(default_factory=list)
    spares: list[Block] = field(default_factory=list)
    now_s: float = 0.0

    def step(self, seconds: float = 2.0) -> None:
        """Let time pass and take a step."""
        self.now_s += seconds
        self.reclaimer.step(self.records, self.spares, self.now_s)

    def write(self) -> Block:
        """Write a block."""
        plan = BlockPlan(
            operand="rax",
            tree=Guard(Addr(0x4F00_2000), None, Miss()),
            thunk_addr=THUNK.addr,
        )
        return add_block(self.arena, plan, site_addr=SITE.addr)

    def add_record(self) -> SiteRecord:
        """Return the record of a site on its baseline."""
        record = make_record(self.arena, SITE)
        self.records.append(record)
        return record

    @property
    def live(self) -> set[Addr]:
        """Addresses of live blocks."""
        return {b.addr for b in self.arena.blocks if b.state is BlockState.LIVE}


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Return an arena with no program on the other side."""
    made = make_arena()
    yield made
    made.close()


def start(arena: Arena, monkeypatch: pytest.MonkeyPatch, config: Config = CONFIG) -> Session:
    """Return a session with that arena."""
    observer, children = FakeObserver(), FakeChildren()
    monkeypatch.setattr(reclaim, "target_space", lambda _target: None)
    monkeypatch.setattr(reclaim, "ThreadObserver", lambda *_args, **_named: observer)
    target = FakeTarget([arena])
    reclaimer = Reclaimer(config, cast(Target, target), cast(Children, children))
    return Session(arena, observer, children, reclaimer, target)


@pytest.fixture
def session(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Return a session that reclaims whatever it can."""
    return start(arena, monkeypatch)


# --- what is garbage


def test_block_that_nothing_leads_to_is_freed(session: Session) -> None:
    block = session.write()
    session.step()
    assert session.live == set()
    assert session.arena.read(block.addr, block.size) == bytes((POISON,)) * block.size
    summary = session.reclaimer.summary()
    assert (summary.blocks_retired, summary.blocks_reclaimed) == (1, 1)
    assert (summary.grace_periods, summary.holders) == (1, ())
    assert summary.bytes_poisoned >= block.size
    assert summary.blocks_reused == 0
    session.write()
    assert session.reclaimer.summary().blocks_reused == 1


@pytest.mark.parametrize("role", ["home", "active", "counting", "learner"])
def test_block_of_a_record_is_kept_until_it_is_let_go(session: Session, role: str) -> None:
    record = session.add_record()
    block = session.write()
    setattr(record, role, block)
    session.step()
    assert session.live == {block.addr}
    setattr(record, role, None)
    session.step()
    assert session.live == set()


def test_earlier_block_of_a_window_is_kept_until_it_ends(session: Session) -> None:
    record = session.add_record()
    block = session.write()
    record.earlier.append((block, NO_COUNTS))
    session.step()
    assert session.live == {block.addr}
    record.earlier.clear()
    session.step()
    assert session.live == set()


def test_spare_block_is_kept(session: Session) -> None:
    session.spares = [session.write()]
    garbage = session.write()
    session.step()
    assert session.live == {session.spares[0].addr}
    assert session.arena.read(garbage.addr, 1) == bytes((POISON,))


def test_block_that_only_the_text_leads_to_is_kept(session: Session) -> None:
    # The record knows of none: a change of the text failed half way.
    record = session.add_record()
    session.arena.journal(SITE)
    block = session.write()
    disp = (block.addr - record.entry.end).to_bytes(4, "little", signed=True)
    session.target.memory.code = SITE.code[:1] + disp
    session.records.clear()
    session.step()
    assert session.live == {block.addr}
    session.target.memory.code = SITE.code
    session.step()
    assert session.live == set()


def test_redirected_head_keeps_its_destination(session: Session) -> None:
    record = session.add_record()
    home, middle, last, other = (session.write() for _ in range(4))
    record.home = home
    redirect(home, middle.addr)
    redirect(middle, last.addr)
    session.step()
    assert session.live == {home.addr, middle.addr, last.addr}
    assert session.arena.read(other.addr, 1) == bytes((POISON,))


def test_heads_that_lead_round_in_a_circle(session: Session) -> None:
    record = session.add_record()
    one, other = session.write(), session.write()
    record.home = one
    redirect(one, other.addr)
    redirect(other, one.addr)
    session.step()
    assert session.live == {one.addr, other.addr}


def test_circle_that_nothing_leads_to_is_garbage(session: Session) -> None:
    one, other = session.write(), session.write()
    redirect(one, other.addr)
    redirect(other, one.addr)
    session.step()
    assert session.live == set()


def test_retired_block_goes_on_to_no_other(session: Session) -> None:
    """It does its own work again, but where that was found out to be wrong."""
    session.observer.is_unseen = True  # so that they stay retired
    to_block, other, to_thunk = (session.write() for _ in range(3))
    redirect(to_block, other.addr)
    redirect(to_thunk, THUNK.addr)
    session.step()
    assert session.live == set()
    assert session.arena.head_of(to_block.addr) == to_block.head
    assert redirection_of(session.arena, to_thunk.addr) == THUNK.addr


def test_thunk_of_a_plain_site_stays_and_is_led_to(session: Session) -> None:
    session.observer.is_unseen = True
    thunk = add_plain_thunk(session.arena, "rax", site_addr=SITE.addr)
    refused = session.write()
    redirect(refused, thunk)
    session.step()
    assert session.live == {thunk}
    assert redirection_of(session.arena, refused.addr) == thunk


def test_text_of_a_child_keeps_what_it_leads_to(session: Session) -> None:
    block, ahead = session.write(), session.write()
    redirect(block, ahead.addr)
    entry = session.arena.journal(SITE)
    session.children.leads = frozenset([block.addr, THUNK.addr])
    session.step()
    assert session.live == {block.addr, ahead.addr}
    assert session.children.asked == [entry]
    session.children.leads = frozenset()
    session.step()
    session.step()
    assert session.live == set()


def test_left_bytes_of_a_block_are_told_and_not_freed(session: Session) -> None:
    record = session.add_record()
    home, active = session.write(), session.write()
    record.home, record.active = home, active
    redirect(home, active.addr)
    body = RetiredCode(Addr(home.addr + 1), Addr(home.addr + home.size))
    session.reclaimer.await_left(body)
    session.observer.held = frozenset([home.addr + 9])
    session.step()
    assert session.reclaimer.take_left() == ()
    # Whoever is at the first byte is not inside.
    session.observer.held = frozenset([home.addr])
    for _ in range(10):
        session.step()
    assert session.reclaimer.take_left() == (body.start,)
    assert session.reclaimer.take_left() == ()
    assert session.live == {home.addr, active.addr}
    assert session.arena.read(home.addr, home.size).count(POISON) < home.size // 2
    assert session.reclaimer.summary().blocks_retired == 0


def test_left_bytes_that_nobody_waits_for_any_more(session: Session) -> None:
    record = session.add_record()
    home, active = session.write(), session.write()
    record.home, record.active = home, active
    redirect(home, active.addr)
    body = RetiredCode(Addr(home.addr + 1), Addr(home.addr + home.size))
    session.observer.held = frozenset([home.addr + 9])
    session.reclaimer.await_left(body)
    session.step()
    session.reclaimer.cancel_left([body.start, active.addr])
    n_looks = session.observer.n_looks
    for _ in range(5):
        session.step()
    assert session.observer.n_looks == n_looks
    assert session.reclaimer.take_left() == ()
    # The site moves on, and the block is garbage like any other.
    record.home = active
    session.observer.held = frozenset()
    for _ in range(5):
        session.step()
    assert session.live == {active.addr}


def test_left_bytes_that_are_given_up_before_they_are_told(session: Session) -> None:
    record = session.add_record()
    record.home = record.active = home = session.write()
    body = RetiredCode(Addr(home.addr + 1), Addr(home.addr + home.size))
    session.reclaimer.await_left(body)
    for _ in range(5):
        session.step()
    session.reclaimer.cancel_left([body.start])
    assert session.reclaimer.take_left() == ()


def test_block_is_not_retired_while_its_bytes_are_waited_for(session: Session) -> None:
    home = session.write()
    session.observer.is_unseen = True
    session.reclaimer.await_left(RetiredCode(Addr(home.addr + 1), Addr(home.addr + home.size)))
    session.step()
    assert session.live == {home.addr}
    session.observer.is_unseen = False
    for _ in range(5):
        session.step()
    assert session.live == set()
    assert session.reclaimer.summary().blocks_reclaimed == 1


# --- when


def test_little_garbage_is_not_worth_a_grace_period(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start(arena, monkeypatch)
    one = session.write()
    session = start(arena, monkeypatch, replace(CONFIG, reclaim_after_size=one.size + 1))
    session.step()
    assert session.live == {one.addr}
    assert session.observer.n_looks == 0
    session.write()
    # What there was before still counts.
    session.step()
    assert session.live == set()


def test_nothing_is_swept_before_its_time(session: Session) -> None:
    session.write()
    session.step()
    block = session.write()
    session.step(0.5)
    assert session.live == {block.addr}
    session.step(0.5)
    assert session.live == set()


def test_sweeps_are_ever_rarer_while_nothing_is_written(session: Session) -> None:
    session.write()
    session.step()
    assert session.live == set()
    unasked = [JournalEntry(addr=SITE.addr, code=SITE.code, disp_off=1)]
    n_sweeps = 0
    for _ in range(100):
        session.children.asked = unasked
        session.step(1.0)
        n_sweeps += session.children.asked is not unasked
    assert 3 <= n_sweeps <= 8
    session.children.asked = unasked
    session.write()
    session.step(1.0)
    assert session.children.asked is not unasked


def test_looks_take_no_more_than_their_share_of_time(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start(arena, monkeypatch, replace(CONFIG, reclaim_duty=0.01))
    times = iter([10.0, 10.5])  # a step of half a second
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    cpu_times = iter([1.0, 1.5])
    monkeypatch.setattr(time, "process_time", lambda: next(cpu_times))
    session.observer.is_unseen = True
    session.write()
    session.step()
    assert session.observer.n_looks == 1
    for _ in range(24):
        session.step()
    assert session.observer.n_looks == 1
    times, cpu_times = iter([100.0, 100.0]), iter([2.0, 2.0])
    session.step()
    assert session.observer.n_looks == 2


# --- grace periods


def test_retired_block_is_not_freed_while_a_thread_is_unseen(session: Session) -> None:
    session.observer.is_unseen = True
    block = session.write()
    code = session.arena.read(block.addr, block.size)
    for _ in range(3):
        session.step()
    assert [b.state for b in session.arena.blocks] == [BlockState.RETIRED]
    assert session.arena.read(block.addr, block.size) == code
    assert session.reclaimer.summary().holders == (THREAD[1],)
    session.observer.is_unseen = False
    session.step()
    assert session.arena.blocks == ()


def test_thread_keeps_back_the_block_that_it_is_in(session: Session) -> None:
    held, free = session.write(), session.write()
    session.observer.held = frozenset([int(held.addr) + 3])
    for _ in range(20):
        session.step()
    assert [b.addr for b in session.arena.blocks] == [held.addr]
    assert session.arena.read(free.addr, 1) == bytes((POISON,))
    session.observer.held = frozenset()
    session.step()
    assert session.arena.blocks == ()


def test_grace_period_that_outlasts_a_sweep_frees_all_the_same(session: Session) -> None:
    """Garbage at each sweep must not put off for good what was retired before."""
    n_freed: list[int] = []
    for i in range(40):
        session.write()
        # No thread is ever seen at the first look after a sweep.
        session.observer.is_unseen = i % 2 == 0
        session.step(1.0)
        n_freed.append(session.reclaimer.summary().blocks_reclaimed)
    assert n_freed[-1] >= 30
    assert len(session.arena.blocks) <= 4


def test_block_that_a_child_leads_to_after_all_is_not_freed(session: Session) -> None:
    """It was not seen at the sweep, or was being forked when the text changed."""
    session.observer.is_unseen = True
    block, garbage = session.write(), session.write()
    code = session.arena.read(block.addr, block.size)
    session.step()
    assert session.live == set()
    session.children.leads = frozenset([block.addr])
    session.observer.is_unseen = False
    for _ in range(3):
        session.step()
    assert session.live == {block.addr}
    assert session.arena.read(block.addr, block.size) == code
    assert session.arena.read(garbage.addr, 1) == bytes((POISON,))
    assert session.reclaimer.summary().blocks_reclaimed == 1
    session.children.leads = frozenset()
    session.write()
    for _ in range(3):
        session.step()
    assert session.arena.blocks == ()


def test_block_that_the_text_leads_to_after_all_is_not_freed(session: Session) -> None:
    session.observer.is_unseen = True
    record = session.add_record()
    session.arena.journal(SITE)
    block = session.write()
    session.step()
    disp = (block.addr - record.entry.end).to_bytes(4, "little", signed=True)
    session.target.memory.code = SITE.code[:1] + disp
    session.observer.is_unseen = False
    session.step()
    assert session.live == {block.addr}


def test_nothing_is_retired_or_freed_while_children_come_too_fast(session: Session) -> None:
    """They cannot all be read; later they can, and no sweep is waited for till then."""
    block = session.write()
    session.children.is_settled = False
    session.step()
    assert session.live == {block.addr}
    session.children.is_settled = True
    session.observer.is_unseen = True
    session.step(1.0)
    assert [b.state for b in session.arena.blocks] == [BlockState.RETIRED]
    session.children.is_settled = session.observer.is_unseen = False
    session.step()
    assert [b.state for b in session.arena.blocks] == [BlockState.RETIRED]
    session.children.is_settled = True
    session.step()
    assert session.arena.blocks == ()


def test_child_that_could_not_be_read_is_looked_for_again(session: Session) -> None:
    block = session.write()
    session.children.unreadable = session.children.unreadable_next = (4711,)
    session.step()
    assert session.live == {block.addr}
    session.children.unreadable_next = ()
    session.step(200.0)
    assert session.live == set()


def test_nothing_is_retired_while_a_child_cannot_be_read(session: Session) -> None:
    block = session.write()
    session.children.unreadable = (4711,)
    session.step()
    assert session.live == {block.addr}
    session.children.unreadable = ()
    session.step(200.0)
    assert session.live == set()
