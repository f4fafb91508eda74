# SPDX-License-Identifier: Apache-2.0
"""How many sites fit one stop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpoline.controller.pace import (
    FIRST_BATCH_SIZE,
    MAX_BATCH_SIZE,
    MIN_BATCH_SIZE,
    STOP_SHARE,
    Pace,
)

MAX_NS = 5_000_000


def test_first_batch_is_cautious() -> None:
    assert Pace(max_ns=MAX_NS).batch_size() == FIRST_BATCH_SIZE


def test_batch_fills_its_share_of_the_greatest_length() -> None:
    pace = Pace(max_ns=MAX_NS)
    pace.note(100, 250_000)  # 2.5 us each
    assert pace.batch_size() == STOP_SHARE * MAX_NS / 2_500


@pytest.mark.parametrize(("duration_ns", "size"), [(1, MAX_BATCH_SIZE), (10**12, MIN_BATCH_SIZE)])
def test_batch_is_neither_tiny_nor_huge(duration_ns: int, size: int) -> None:
    pace = Pace(max_ns=MAX_NS)
    pace.note(FIRST_BATCH_SIZE, duration_ns)
    assert pace.batch_size() == size


def test_last_stop_counts() -> None:
    pace = Pace(max_ns=MAX_NS)
    pace.note(100, 10_000_000)
    slow = pace.batch_size()
    pace.note(100, 100_000)
    assert pace.batch_size() > slow
    pace.note(100, 10_000_000)
    assert pace.batch_size() == slow


@pytest.mark.parametrize(("n_pokes", "duration_ns"), [(MIN_BATCH_SIZE - 1, 4_000_000), (500, 0)])
def test_stops_that_tell_nothing_are_not_noted(n_pokes: int, duration_ns: int) -> None:
    # A few sites: all of it is the fixed cost. No time: nobody ran, nobody was stopped.
    pace = Pace(max_ns=MAX_NS)
    pace.note(n_pokes, duration_ns)
    assert pace.batch_size() == FIRST_BATCH_SIZE


@given(
    fixed_ns=st.integers(0, 2_000_000),
    poke_ns=st.integers(100, 50_000),
    n_stops=st.integers(1, 20),
)
def test_stops_settle_below_the_greatest_length(fixed_ns: int, poke_ns: int, n_stops: int) -> None:
    """Wherever a stop can be short enough at all."""
    pace = Pace(max_ns=MAX_NS)
    length_ns = 0
    for i in range(n_stops):
        n = pace.batch_size()
        length_ns = fixed_ns + n * poke_ns
        if i:
            assert length_ns <= MAX_NS or n == MIN_BATCH_SIZE
        pace.note(n, length_ns)
