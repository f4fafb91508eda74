# SPDX-License-Identifier: Apache-2.0
"""Synthetic workloads: what they are made from, and that they are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from optpoline.errors import UsageError
from optpoline.simulate.synthetic import (
    SYNTHETIC_NAMES,
    Synthetic,
    make_synthetic,
    parse_synthetic,
)
from optpoline.simulate.workload import Workload


def make(text: str) -> Workload:
    """Return the workload that a command line asks for."""
    return make_synthetic(*parse_synthetic(text))


def shares(workload: Workload, site: int, start_s: float, end_s: float) -> list[float]:
    """Return the shares of a site's targets."""
    counts = workload.site_counts(site, start_s, end_s)
    return [float(share) for share in counts / counts.sum()]


@pytest.mark.parametrize("name", SYNTHETIC_NAMES)
def test_same_seed_same_workload(name: str) -> None:
    one, other, third = make(f"{name}:seed=5"), make(f"{name}:seed=5"), make(f"{name}:seed=6")
    assert np.array_equal(one.contents, other.contents)
    assert np.array_equal(one.slices, other.slices)
    assert not np.array_equal(one.slices, third.slices)


def test_rate_and_length() -> None:
    workload = make("alternating:rate=1e6,seconds=4,sites=3,targets=2")
    assert workload.seconds == pytest.approx(4.0)
    assert workload.n_branches == pytest.approx(4e6, rel=0.01)
    assert len(workload.sites) == 3
    assert shares(workload, 1, 0.0, 4.0) == pytest.approx([0.5, 0.5], abs=0.01)


def test_zipf() -> None:
    workload = make("zipf:sites=3,targets=4,skew=1,rate=1e8,seconds=1")
    per_site = [float(workload.site_counts(site, 0.0, 1.0).sum()) for site in range(3)]
    total = sum(per_site)
    assert [n / total for n in per_site] == pytest.approx([6 / 11, 3 / 11, 2 / 11], rel=0.01)
    expected = [12 / 25, 6 / 25, 4 / 25, 3 / 25]
    assert sorted(shares(workload, 0, 0.0, 1.0), reverse=True) == pytest.approx(expected, rel=0.02)


def test_phases_of_other_targets() -> None:
    workload = make("phases:targets=4,hot=1,phase=1,seconds=3")
    assert shares(workload, 0, 0.0, 1.0) == [1.0, 0.0, 0.0, 0.0]
    assert shares(workload, 0, 1.0, 2.0) == [0.0, 1.0, 0.0, 0.0]
    assert shares(workload, 0, 2.0, 3.0) == [0.0, 0.0, 1.0, 0.0]


def test_phases_of_other_weights() -> None:
    workload = make("phases:mode=weights,targets=3,skew=1,phase=1,seconds=2")
    weights = [6 / 11, 3 / 11, 2 / 11]
    assert shares(workload, 0, 0.0, 1.0) == pytest.approx(weights, rel=0.01)
    turned = [weights[2], weights[0], weights[1]]
    assert shares(workload, 0, 1.0, 2.0) == pytest.approx(turned, rel=0.01)


def test_sites_of_a_table_have_the_same_targets() -> None:
    workload = make("zipf:sites=4,targets=3,tables=2")
    targets = [[*workload.pair_targets[workload.pairs_of(site)]] for site in range(4)]
    assert targets[0] == targets[2] != targets[1] == targets[3]
    tables = [site.table for site in workload.sites]
    assert tables[0] == tables[2] != tables[1] == tables[3]
    alone = make("zipf:sites=4,targets=3")
    assert {site.table for site in alone.sites} == {None}
    assert len({*alone.pair_targets.tolist()}) == 12


def test_bursts_are_idle_between() -> None:
    workload = make("bursts:phase=1,duty=0.25,seconds=2")
    for start_s in (0.0, 1.0):
        quiet = workload.counts(workload.slice_at(start_s), workload.slice_at(start_s + 0.75))
        busy = workload.counts(workload.slice_at(start_s + 0.75), workload.slice_at(start_s + 1.0))
        assert quiet.sum() == 0
        assert busy.sum() > 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("none", "no synthetic workload"),
        ("phases:nope=1", "has no 'nope'"),
        ("phases:sites", "key=value"),
        ("phases:sites=1.5", "not a whole number"),
        ("phases:rate=fast", "not a number"),
        ("phases:rate=nan", "not a number"),
        ("phases:sites=0", "more than 0"),
        ("phases:mode=both", "targets or weights"),
        ("phases:duty=2", "duty"),
        ("phases:rest=2", "rest"),
        ("phases:skew=-1", "skew"),
        ("phases:seed=-1", "seed"),
        ("phases:tables=-1", "tables must not be negative"),
        ("phases:branches=-1", "branches must not be negative"),
        ("phases:sites=1000000,targets=8", "memory"),
        ("phases:seconds=1e9", "memory"),
        ("phases:phase=1e12", "memory"),
        ("phases:phase=1e-9", "phase must be 0.0025 at least"),
        ("phases:rate=1e300", "rate must be"),
    ],
)
def test_what_makes_no_sense(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_synthetic(text)


def test_no_workload_of_that_name() -> None:
    with pytest.raises(UsageError, match="no synthetic workload"):
        make_synthetic("none", Synthetic())
