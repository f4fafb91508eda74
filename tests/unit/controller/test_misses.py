# SPDX-License-Identifier: Apache-2.0
"""Which sites are looked at, by what their blocks miss and by the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from optpoline.controller.misses import MissWatch
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.model import Addr, BlockPlan, Guard, Miss, SiteKind
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import add_block
from tests.unit.controller.lone_arena import THUNK, make_arena, make_record, make_site

TARGET = Addr(0x4F00_2000)
FLOOR_HZ, GROWTH = 1000.0, 2.0
POLL_S = 0.05
ALWAYS_S = 1e9
"""Time of a window that never comes."""


@pytest.fixture
def arena() -> Iterator[Arena]:
    """An arena."""
    made = make_arena(n_sites=4)
    yield made
    made.close()


def promote(record: SiteRecord) -> None:
    """Give a site a promoted block of its own."""
    record.active = add_block(
        record.arena,
        BlockPlan(
            operand="rax",
            tree=Guard(TARGET, None, Miss()),
            thunk_addr=THUNK.addr,
            miss_count_addr=record.arena.add_counters(1),
        ),
        site_addr=record.site.addr,
    )
    record.state = SiteState.PROMOTED
    record.next_sample_s = ALWAYS_S


def promoted_record(arena: Arena, number: int = 0) -> SiteRecord:
    """Return the record of a promoted site."""
    record = make_record(arena, make_site(number, SiteKind.JUMP))
    promote(record)
    return record


def miss(record: SiteRecord, n: int) -> None:
    """Miss as the program does."""
    assert record.active is not None
    addr = record.active.plan.miss_count_addr
    assert addr is not None
    record.arena.store_u64(addr, (record.arena.load_u64(addr) + n) % 2**64)


def poll(
    watch: MissWatch, now_s: float = 0.0, *, by_clock: bool = True
) -> tuple[list[SiteRecord], list[SiteRecord]]:
    """Poll as the sampler does."""
    return watch.find_due(now_s, POLL_S, FLOOR_HZ, GROWTH, by_clock=by_clock)


def watching(*records: SiteRecord) -> MissWatch:
    """Return a watch over sites."""
    watch = MissWatch()
    watch.use(records)
    return watch


def test_nobody_to_watch() -> None:
    watch = MissWatch()
    assert poll(watch) == ([], [])
    watch.use([])
    assert poll(watch) == ([], [])


def test_misses_show_at_the_next_poll(arena: Arena) -> None:
    sites = [promoted_record(arena, i) for i in range(3)]
    watch = watching(*sites)
    assert poll(watch) == ([], [])
    miss(sites[1], round(1.1 * FLOOR_HZ * POLL_S))
    miss(sites[2], round(0.9 * FLOOR_HZ * POLL_S))
    missing, due = poll(watch)
    assert [r.site.addr for r in missing] == [sites[1].site.addr]
    assert due == []
    # They are jumps, all of them.
    assert watch.jump_misses_hz() == pytest.approx(2 * FLOOR_HZ)
    # It was a burst.
    assert poll(watch) == ([], [])
    assert watch.jump_misses_hz() == 0.0


def test_what_was_missed_before_does_not_count(arena: Arena) -> None:
    site = promoted_record(arena)
    miss(site, 10**9)
    assert poll(watching(site)) == ([], [])


def test_level_that_was_judged_is_normal_until_it_doubles(arena: Arena) -> None:
    site = promoted_record(arena)
    watch = watching(site)
    level = round(10 * FLOOR_HZ * POLL_S)
    for factor, expected in ((1.0, 1), (1.0, 0), (1.9, 0), (2.1, 1)):
        miss(site, round(factor * level))
        missing, _ = poll(watch)
        assert len(missing) == expected
        if missing and factor == 1.0:
            watch.judged(missing)


def test_quiet_makes_watchful_again(arena: Arena) -> None:
    site = promoted_record(arena)
    watch = watching(site)
    level = round(10 * FLOOR_HZ * POLL_S)
    miss(site, level)
    watch.judged(poll(watch)[0])
    for _ in range(20):
        assert poll(watch) == ([], [])
    miss(site, level)
    assert len(poll(watch)[0]) == 1


def test_site_on_hold_may_miss_as_it_likes(arena: Arena) -> None:
    site = promoted_record(arena)
    site.hold_until_s = 5.0
    watch = watching(site)
    for now_s, expected in ((1.0, 0), (4.9, 0), (5.0, 1)):
        miss(site, 10**6)
        assert len(poll(watch, now_s)[0]) == expected


def test_sites_are_due_by_the_clock_longest_waiting_first(arena: Arena) -> None:
    sites = [promoted_record(arena, i) for i in range(3)]
    for site, due_s in zip(sites, (3.0, 1.0, 2.0), strict=True):
        site.next_sample_s = due_s
    watch = watching(*sites)
    assert poll(watch, 0.5) == ([], [])
    _, due = poll(watch, 2.0)
    assert [r.site.addr for r in due] == [sites[1].site.addr, sites[2].site.addr]
    sites[1].next_sample_s = 9.0
    watch.judged([sites[1]])
    _, due = poll(watch, 3.0)
    assert [r.site.addr for r in due] == [sites[2].site.addr, sites[0].site.addr]


def test_clock_may_wait_but_not_misses(arena: Arena) -> None:
    sites = [promoted_record(arena, i) for i in range(2)]
    for site in sites:
        site.next_sample_s = 1.0
    watch = watching(*sites)
    assert poll(watch, 2.0, by_clock=False) == ([], [])
    miss(sites[1], 10**6)
    missing, due = poll(watch, 2.0, by_clock=False)
    assert [r.site.addr for r in missing] == [sites[1].site.addr]
    assert due == []
    _, due = poll(watch, 2.0)
    assert len(due) == 2


def test_missing_site_is_not_due_as_well(arena: Arena) -> None:
    site = promoted_record(arena)
    site.next_sample_s = 0.0
    watch = watching(site)
    miss(site, 10**6)
    missing, due = poll(watch, 1.0)
    assert (len(missing), len(due)) == (1, 0)


def test_demoted_site_is_left_alone_at_once(arena: Arena) -> None:
    site = promoted_record(arena)
    watch = watching(site)
    site.state = SiteState.BASELINE
    miss(site, 10**6)
    assert poll(watch) == ([], [])
    watch.use([site])
    assert watch.records == []


def test_new_block_starts_anew_and_the_others_go_on(arena: Arena) -> None:
    one, other = promoted_record(arena, 0), promoted_record(arena, 1)
    watch = watching(one, other)
    miss(one, 10**6)
    miss(other, 10**6)
    watch.judged(poll(watch)[0])
    promote(one)
    miss(one, 10**6)
    miss(other, 10**6)
    watch.use([one, other])
    missing, _ = poll(watch)
    # The block of ``one`` is new, its misses before count no more; ``other`` was judged.
    assert missing == []
    miss(one, 10**5)
    miss(other, 10**6)
    missing, _ = poll(watch)
    assert [r.site.addr for r in missing] == [one.site.addr]


def test_sites_of_two_arenas(arena: Arena) -> None:
    second = make_arena(Addr(0x9000_0000), 4)
    try:
        sites = [promoted_record(arena, 0), promoted_record(second, 1), promoted_record(arena, 2)]
        watch = watching(*sites)
        for site in sites[:2]:
            miss(site, 10**6)
        missing, _ = poll(watch)
        assert {r.site.addr for r in missing} == {site.site.addr for site in sites[:2]}
    finally:
        second.close()


def test_counter_that_wraps_is_no_burst(arena: Arena) -> None:
    site = promoted_record(arena)
    miss(site, 2**64 - 5)
    watch = watching(site)
    miss(site, 10)
    assert poll(watch) == ([], [])
    assert watch.jump_misses_hz() == pytest.approx(10 / POLL_S)


def test_two_thousand_sites_are_read_in_no_time() -> None:
    n_sites = 2000
    arena = make_arena(n_sites=n_sites)
    try:
        watch = watching(*(promoted_record(arena, i) for i in range(n_sites)))
        times: list[float] = []
        for _ in range(50):
            begin_s = time.thread_time()
            poll(watch)
            times.append(time.thread_time() - begin_s)
        # Polled every 50 ms that is 1 % of a core; it takes a tenth of it.
        assert sorted(times)[len(times) // 2] < 0.01 * POLL_S
    finally:
        arena.close()
