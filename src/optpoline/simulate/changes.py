# SPDX-License-Identifier: Apache-2.0
"""When the workload of a site changed, whatever any policy made of it.

The shares of its targets in a while before and a while after each moment are
compared; their distance (half the sum of differences, 0..1) peaks at a change.
Only the hottest sites are looked at, and only changes that last as long as the
while: a session cannot follow shorter ones, and is not meant to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optpoline.simulate.workload import Workload

__all__ = ["MAX_SITES", "Change", "find_changes", "hottest_sites"]

MAX_SITES = 64
"""Sites looked at."""

WHILE_S = 0.25
"""A while, before and after."""

MIN_DISTANCE = 0.3
"""Distance of shares that is a change: three branches in ten go elsewhere."""

MIN_COUNT = 256
"""Branches in a while below which nothing is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change of one site.

    Attributes:
        site: Which.
        first: The first slice after it.
        last: The slice after the last one before the next change.
    """

    site: int
    first: int
    last: int


def hottest_sites(workload: Workload) -> list[int]:
    """Return the sites that changes are looked for at, hottest first."""
    taken = workload.counts(0, workload.n_slices)
    totals = np.bincount(workload.pair_sites, taken, minlength=len(workload.sites))
    order = np.argsort(-totals, kind="stable")[:MAX_SITES]
    return [int(site) for site in order if totals[site] > 0]


def find_changes(workload: Workload) -> list[Change]:
    """Return all changes of the hottest sites."""
    found: list[Change] = []
    for site in hottest_sites(workload):
        moments = _change_points(workload, site)
        ends = [*moments[1:], workload.n_slices][: len(moments)]
        found += [
            Change(site=site, first=first, last=last)
            for first, last in zip(moments, ends, strict=True)
        ]
    return found


def _change_points(workload: Workload, site: int) -> list[int]:
    """Return the slices at which a site changed, ascending."""
    width = round(WHILE_S / workload.slice_s)
    if workload.n_slices < 2 * width:
        return []
    rows = workload.site_rows(site, 0, workload.n_slices)
    distance = _distances(rows, width)
    found: list[int] = []
    # The highest peak first; a change is one peak, as wide as the while on either side.
    while len(distance) and (peak := int(np.argmax(distance))) >= 0:
        if distance[peak] < MIN_DISTANCE:
            break
        found.append(peak + width)
        distance[max(0, peak - width + 1) : peak + width] = 0.0
    return sorted(found)


def _distances(rows: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the distance of shares around slice ``width + i`` for each i."""
    sums = np.concatenate((np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0)))
    n = len(rows)
    before = sums[width : n - width + 1] - sums[: n - 2 * width + 1]
    after = sums[2 * width :] - sums[width : n - width + 1]
    n_before, n_after = before.sum(axis=1), after.sum(axis=1)
    enough = np.minimum(n_before, n_after) >= MIN_COUNT
    before /= np.maximum(n_before, 1.0)[:, None]
    after /= np.maximum(n_after, 1.0)[:, None]
    distance: NDArray[np.float64] = 0.5 * np.abs(before - after).sum(axis=1)
    distance[~enough] = 0.0
    return distance
