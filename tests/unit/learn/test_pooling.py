# SPDX-License-Identifier: Apache-2.0
"""Pools of tables: sums that count nothing twice, and who is decided on by them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpoline.learn.counting import NO_COUNTS, SiteCounts
from optpoline.learn.pooling import ENOUGH_COUNT, MAX_POOL_TARGETS, TablePool
from optpoline.model import Addr, Count

A, B, C = Addr(0x1000), Addr(0x2000), Addr(0x3000)


def counted(hits: dict[Addr, int], n_unknown: int = 0) -> SiteCounts:
    """Return counts, hottest first."""
    ranked = sorted(hits.items(), key=lambda item: (-item[1], item[0]))
    counts = tuple(Count(target=target, hit_count=n) for target, n in ranked)
    return SiteCounts(counts=counts, n_unknown=n_unknown)


def hits_of(counts: SiteCounts) -> dict[Addr, int]:
    """Return counts by target."""
    return {count.target: count.hit_count for count in counts.counts}


WINDOWS = st.builds(
    counted,
    st.dictionaries(st.integers(1, 40).map(Addr), st.integers(1, 10_000), max_size=24),
    st.integers(0, 500),
)


@given(st.lists(st.tuples(st.integers(0, 4), st.none() | WINDOWS), max_size=30))
def test_sum_of_what_is_known_last(steps: list[tuple[int, SiteCounts | None]]) -> None:
    # A site's rate is its count here: its part is what it has counted.
    pool = TablePool()
    last: dict[int, SiteCounts] = {}
    for site, counts in steps:
        if counts is None:
            pool.forget(site)
            last.pop(site, None)
            continue
        pool.note(site, counts, counts.total)
        if counts.total:  # who has counted nothing says nothing new
            last[site] = counts
    expected: Counter[Addr] = Counter()
    for counts in last.values():
        expected.update(hits_of(counts))
    found = pool.counts
    assert found.total == sum(counts.total for counts in last.values())
    assert all(expected[target] == n for target, n in hits_of(found).items())
    hottest = sorted(expected.values(), reverse=True)[:MAX_POOL_TARGETS]
    assert [count.hit_count for count in found.counts] == hottest


def test_rates_add_up_not_counts() -> None:
    pool = TablePool()
    pool.note(1, counted({A: 1_000_000}), 1_000.0)  # a long window of a cool site
    pool.note(2, counted({B: 300, C: 100}, 100), 50_000.0)
    assert hits_of(pool.counts) == {B: 30_000, C: 10_000, A: 1_000}
    assert pool.counts.n_unknown == 10_000


def test_new_part_takes_the_place_of_the_old() -> None:
    pool = TablePool()
    pool.note(1, counted({A: 10}), 1_000.0)
    pool.note(1, counted({B: 10}), 2_000.0)
    assert hits_of(pool.counts) == {B: 2_000}
    pool.note(1, NO_COUNTS, 0.0)
    assert hits_of(pool.counts) == {B: 2_000}


@pytest.mark.parametrize("n_own", [0, 1, ENOUGH_COUNT - 1, ENOUGH_COUNT])
def test_who_has_counted_enough_knows_better(n_own: int) -> None:
    pool = TablePool()
    pool.note(1, counted({A: 9_000, B: 1_000}), 10_000.0)
    own = counted({C: n_own}) if n_own else NO_COUNTS
    pool.note(2, own, n_own)
    shared = pool.share(own)
    assert shared.is_by_table is (n_own < ENOUGH_COUNT)
    assert shared.window == (own if n_own == ENOUGH_COUNT else pool.counts)
    # As hot as the whole table, either way.
    assert shared.window.total / shared.window_s == pytest.approx(10_000 + n_own)


def test_empty_pool_is_as_hot_as_nothing() -> None:
    shared = TablePool().share(NO_COUNTS)
    assert (shared.window.total, shared.window_s) == (0, 0.0)
