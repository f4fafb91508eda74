# SPDX-License-Identifier: Apache-2.0
"""When sites are looked at again, and that it costs what it may and no more."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpoline.promote.schedule import WatchSchedule, next_interval, stretch_factor

SCHEDULE = WatchSchedule()


def interval(
    *,
    rate_hz: float,
    stake_cycles: float,
    since_change_s: float = 0.0,
    n_changes: int = 0,
    stretch: float = 1.0,
) -> float:
    """Return the next interval of a site by the default schedule."""
    return next_interval(
        SCHEDULE,
        rate_hz=rate_hz,
        stake_cycles=stake_cycles,
        since_change_s=since_change_s,
        n_changes=n_changes,
        stretch=stretch,
    )


def test_hot_site_with_much_at_stake_is_looked_at_often() -> None:
    # Phases of 5 s of other weights are noticed soon enough to be followed.
    assert interval(rate_hz=3e8, stake_cycles=3.0) < 0.3
    assert interval(rate_hz=3e8, stake_cycles=8.0) == SCHEDULE.sample_every_s


def test_site_with_nothing_at_stake_is_hardly_looked_at() -> None:
    assert interval(rate_hz=3e8, stake_cycles=0.0) == SCHEDULE.sample_every_max_s
    assert interval(rate_hz=0.0, stake_cycles=3.0) == SCHEDULE.sample_every_max_s


def test_interval_is_where_looking_and_not_looking_cost_the_same() -> None:
    rate_hz, stake_cycles = 3e6, 2.0
    t = interval(rate_hz=rate_hz, stake_cycles=stake_cycles)
    assert SCHEDULE.sample_every_s < t < SCHEDULE.sample_every_max_s
    looking = SCHEDULE.window_cpu_s(rate_hz) / t
    not_looking = stake_cycles * rate_hz / 3e9 * t / (2 * SCHEDULE.change_every_s)
    assert looking == pytest.approx(not_looking)


def test_calm_site_is_looked_at_ever_more_rarely() -> None:
    times = [
        interval(rate_hz=3e8, stake_cycles=3.0, since_change_s=calm_s)
        for calm_s in (0, 100, 1_000, 10_000, 100_000)
    ]
    assert times == sorted(times)
    assert times[2] == pytest.approx(times[3] / math.sqrt(10), rel=0.01)


def test_site_that_changed_lately_is_looked_at_more_often_unless_it_never_settles() -> None:
    times = [interval(rate_hz=1e7, stake_cycles=3.0, n_changes=n) for n in range(8)]
    assert times[3] == pytest.approx(times[0] / 2)
    assert times[:4] == sorted(times[:4], reverse=True)
    assert times[4:] == [times[0]] * 4


def test_confirmation_is_wanted_at_once_and_holding_waits() -> None:
    def after(
        schedule: WatchSchedule, *, wants_confirmation: bool = False, hold_s: float = 0.0
    ) -> float:
        return next_interval(
            schedule,
            rate_hz=1e6,
            stake_cycles=2.0,
            since_change_s=0.0,
            wants_confirmation=wants_confirmation,
            hold_s=hold_s,
        )

    assert after(SCHEDULE, wants_confirmation=True) == 0.0
    assert after(SCHEDULE, hold_s=300.0) == 300.0
    once = WatchSchedule(sample_every_s=math.inf, sample_every_max_s=math.inf)
    assert after(once, wants_confirmation=True) == math.inf


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 50)), min_size=1, max_size=200))
def test_all_windows_together_cost_no_more_than_they_may(
    sites: list[tuple[float, float]],
) -> None:
    plain = [(rate, interval(rate_hz=rate, stake_cycles=stake)) for rate, stake in sites]
    stretch = stretch_factor(SCHEDULE, plain)
    assert stretch >= 1.0
    cost = sum(
        SCHEDULE.window_cpu_s(rate) / interval(rate_hz=rate, stake_cycles=stake, stretch=stretch)
        for rate, stake in sites
    )
    assert cost <= SCHEDULE.overhead_ratio * 1.0001


def test_two_thousand_sites_cost_one_percent_not_more() -> None:
    sites = [(1e5, SCHEDULE.sample_every_s)] * 2000
    stretch = stretch_factor(SCHEDULE, sites)
    cost = 2000 * SCHEDULE.window_cpu_s(1e5) / (SCHEDULE.sample_every_s * stretch)
    assert cost == pytest.approx(SCHEDULE.overhead_ratio)


def test_parts_end_early_once_enough_was_counted() -> None:
    longest = SCHEDULE.sample_s / SCHEDULE.n_parts
    assert SCHEDULE.part_s(0.0) == SCHEDULE.part_s(1e4) == longest
    assert SCHEDULE.part_s(1e9) == SCHEDULE.min_part_s
    rate_hz = 1e6
    assert longest > SCHEDULE.part_s(rate_hz) > SCHEDULE.min_part_s
    n_counted = rate_hz * SCHEDULE.part_s(rate_hz) * SCHEDULE.n_parts
    assert n_counted == pytest.approx(SCHEDULE.enough_count)


def test_a_window_costs_the_hottest_site_little() -> None:
    # A loop that does nothing but take the site: 2 ms of four, at most.
    assert SCHEDULE.window_cpu_s(5e8) < 0.004


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WatchSchedule(sample_every_s=2.0, sample_every_max_s=1.0), "sample_every_s"),
        (lambda: WatchSchedule(sample_every_s=-1.0), "sample_every_s"),
        (lambda: WatchSchedule(min_part_s=1.0), "part"),
        (lambda: WatchSchedule(min_part_s=0.0), "part"),
        (lambda: WatchSchedule(n_parts=0), "part"),
        (lambda: WatchSchedule(overhead_ratio=0.0), "overhead_ratio"),
        (lambda: WatchSchedule(max_slots=129), "max_slots"),
    ],
)
def test_nonsense_is_refused(make: Callable[[], WatchSchedule], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
