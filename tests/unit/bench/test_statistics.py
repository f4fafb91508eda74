# SPDX-License-Identifier: Apache-2.0
"""Medians, recovered shares and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import statistics

TIMES = st.lists(st.integers(1_000, 10_000), min_size=5, max_size=15)


def test_median_of_known_samples() -> None:
    estimate = statistics.median([5, 1, 4, 2, 3])
    assert estimate.value == 3.0
    assert 1.0 <= estimate.low <= estimate.value <= estimate.high <= 5.0


def test_constant_samples_have_an_interval_of_no_width() -> None:
    estimate = statistics.median([7] * 6)
    assert (estimate.low, estimate.value, estimate.high) == (7.0, 7.0, 7.0)


def test_recovered_of_known_times() -> None:
    estimate = statistics.recovered([100] * 5, [200] * 5, [103] * 5)
    assert estimate.value == pytest.approx(0.97)
    assert estimate.low == pytest.approx(estimate.high)


def test_recovered_is_nothing_where_promotion_changed_nothing() -> None:
    assert statistics.recovered([100] * 5, [150] * 5, [150] * 5).value == pytest.approx(0.0)


def test_recovered_is_negative_where_promotion_made_it_slower() -> None:
    assert statistics.recovered([100] * 5, [150] * 5, [160] * 5).value == pytest.approx(-0.2)


def test_recovered_counts_as_nothing_where_retpolines_cost_nothing() -> None:
    assert statistics.recovered([100] * 5, [100] * 5, [90] * 5).value == 0.0


@given(st.lists(st.floats(0.5, 2.0), min_size=5, max_size=11))
def test_a_machine_that_changes_speed_between_rounds_changes_nothing(speeds: list[float]) -> None:
    plain = [1000.0 * speed for speed in speeds]
    retpoline = [3000.0 * speed for speed in speeds]
    promoted = [1100.0 * speed for speed in speeds]
    estimate = statistics.recovered(plain, retpoline, promoted)
    assert estimate.value == pytest.approx(0.95)
    assert estimate.high - estimate.low == pytest.approx(0.0, abs=1e-9)


@given(TIMES)
def test_an_interval_lies_within_the_samples(times: list[int]) -> None:
    estimate = statistics.median(times)
    assert min(times) <= estimate.low <= estimate.high <= max(times)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        estimate = statistics.median([float(x) for x in rng.normal(100.0, 5.0, 25)])
        covered += estimate.low <= 100.0 <= estimate.high
    assert 180 <= covered <= 200


def test_more_rounds_give_a_narrower_interval() -> None:
    rng = np.random.default_rng(3)
    few = statistics.median([float(x) for x in rng.normal(100.0, 5.0, 9)])
    many = statistics.median([float(x) for x in rng.normal(100.0, 5.0, 400)])
    assert many.high - many.low < (few.high - few.low) / 2


def test_geometric_mean() -> None:
    assert statistics.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert statistics.geometric_mean([1.0, -0.1]) == 0.0


def test_recovered_mean_is_the_geometric_mean_of_the_workloads() -> None:
    triples = [([100] * 5, [200] * 5, [100 + lost] * 5) for lost in (0, 19)]
    estimate = statistics.recovered_mean(triples)
    assert estimate.value == pytest.approx(0.9)
    assert estimate.low == pytest.approx(0.9)


def test_overhead_and_loss() -> None:
    assert statistics.overhead([100] * 5, [130] * 5).value == pytest.approx(0.3)
    assert statistics.loss([100] * 5, [99] * 5).value == pytest.approx(-0.01)


def test_samples_that_are_not_of_the_same_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="4 samples where the other variant has 5"):
        statistics.recovered([100] * 5, [150] * 4, [150] * 5)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        statistics.median([])
    with pytest.raises(ValueError, match="at least one workload"):
        statistics.recovered_mean([])
