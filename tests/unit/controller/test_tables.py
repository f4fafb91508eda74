# SPDX-License-Identifier: Apache-2.0
"""Tables of dynamic calls in a session: who shares, who does not, and what is dropped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import BranchSource, SiteState
from optpoline.controller.tables import Tables
from optpoline.learn.counting import NO_COUNTS, SiteCounts
from optpoline.model import Addr, Count, Table
from optpoline.patch.arena import Arena
from tests.unit.controller.lone_arena import make_arena, make_record, make_site

HANDLERS = Table(name="handlers", type="int, int")
A, B = Addr(0x4F10_0000), Addr(0x4F10_0040)
MANY = 10_000
FEW = 10


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Return an arena."""
    arena = make_arena(n_sites=8)
    yield arena
    arena.close()


def member(arena: Arena, number: int, table: Table | None = HANDLERS) -> SiteRecord:
    """Return the record of a site of a table that leads to its thunk."""
    return make_record(arena, replace(make_site(number), table=table))


def count(record: SiteRecord, target: Addr, n: int, rate_hz: float = 1000.0) -> None:
    """Have a site's first window count something."""
    record.counts = SiteCounts(counts=(Count(target=target, hit_count=n),), n_unknown=0)
    record.window_s, record.rate_hz, record.is_news = 1.0, rate_hz, True


def targets_of(tables: Tables, record: SiteRecord) -> list[Addr]:
    """Return what a site is decided on by."""
    shared = tables.share(record)
    assert shared is not None
    return [count.target for count in shared.window.counts]


def make_tables(*records: SiteRecord) -> Tables:
    """Return tables that know what these sites have counted."""
    tables = Tables()
    tables.use(records)
    for record in records:
        tables.note(record, record.counts or NO_COUNTS)
    return tables


def test_who_ran_tells_who_did_not(arena: Arena) -> None:
    hot, warm, cold = (member(arena, number) for number in range(3))
    count(hot, A, MANY)
    count(warm, B, FEW, rate_hz=10.0)
    tables = make_tables(hot, warm, cold)
    assert targets_of(tables, hot) == [A]
    assert targets_of(tables, warm) == targets_of(tables, cold) == [A, B]


@pytest.mark.parametrize(
    "other",
    [None, Table(name="handlers", type="long"), Table(name="others", type="int, int")],
    ids=["no table", "another type", "another name"],
)
def test_nobody_to_share_with(arena: Arena, other: Table | None) -> None:
    hot, stranger = member(arena, 0), member(arena, 1, other)
    count(hot, A, MANY)
    tables = make_tables(hot, stranger)
    assert tables.share(hot) is tables.share(stranger) is None
    assert tables.find_idle([hot]) == []


def test_who_knows_itself_does_not_ask(arena: Arena) -> None:
    hot, demoted = member(arena, 0), member(arena, 1)
    count(hot, A, MANY)
    demoted.source = BranchSource.SITE
    tables = make_tables(hot, demoted)
    assert tables.share(demoted) is None
    assert tables.find_idle([hot]) == []


def test_idle_are_those_on_their_baseline(arena: Arena) -> None:
    learned, idle, promoted, refused, stranger = (member(arena, number) for number in range(5))
    promoted.state, refused.state = SiteState.PROMOTED, SiteState.REFUSED
    stranger = member(arena, 5, None)
    count(learned, A, FEW)
    count(stranger, A, FEW)
    tables = make_tables(learned, idle, promoted, refused, stranger)
    assert tables.find_idle([learned]) == [idle]
    assert tables.find_idle([stranger]) == []
    assert tables.find_idle([]) == []


def test_a_table_that_was_hot_once_need_not_be(arena: Arena) -> None:
    """A window of its sites that counted nothing has nobody else promoted."""
    learned, idle = member(arena, 0), member(arena, 1)
    count(learned, A, MANY)
    tables = make_tables(learned, idle)
    assert tables.find_idle([learned]) == [idle]
    learned.is_news = False  # decided
    assert tables.find_idle([learned]) == []
    assert targets_of(tables, idle) == targets_of(tables, learned) == [A]


def test_what_sites_had_counted_goes_with_their_module(arena: Arena) -> None:
    gone, hot, cold = (member(arena, number) for number in range(3))
    count(gone, A, MANY)
    count(hot, B, MANY)
    tables = make_tables(gone, hot, cold)
    assert targets_of(tables, cold) == [A, B]
    tables.use([hot, cold])
    assert targets_of(tables, cold) == [B]
    tables.use([cold])
    assert tables.share(cold) is None
    tables.use([hot, cold])
    assert targets_of(tables, cold) == []


def test_later_windows_take_the_place_of_earlier_ones(arena: Arena) -> None:
    hot, cold = member(arena, 0), member(arena, 1)
    count(hot, A, MANY)
    tables = make_tables(hot, cold)
    tables.note(hot, SiteCounts(counts=(Count(target=B, hit_count=300),), n_unknown=0))
    assert targets_of(tables, cold) == [B]
