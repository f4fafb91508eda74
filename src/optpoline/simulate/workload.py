# SPDX-License-Identifier: Apache-2.0
"""What a program does, slice by slice: the form that policies are replayed against.

Time is cut into equal *slices*. A slice says how often each pair (one site, one
target of it) is taken in it. Many slices look alike, so each is one of a few
*contents*, taken so many times: a matrix of contents, and per slice the number
of its content and a factor. All that the replay asks (how often was each pair
taken between two moments?) is then sums over rows, and never a loop over
branches.

The order of branches within a slice is lost. It does not matter to windows,
which are longer; what branch history makes of it is in the cost model
(``mispredict_ratio``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from optpoline.model import Table
from optpoline.promote.cost import CostModel

__all__ = ["SLICE_S", "Workload", "WorkloadSite"]

SLICE_S = 0.0025
"""Seconds: one part of a re-sampling window, the shortest look a session takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSite:
    """One site of a workload.

    Attributes:
        name: For people.
        kind: "call", "jump" or "cond_jump".
        table: The table of dynamic calls that it shares, or None.
        max_guards: Guards that its source allows at most, 0 for any number.
        is_plain: Whether a miss is a plain indirect branch, not a retpoline.
    """

    name: str
    kind: str = "call"
    table: Table | None = None
    max_guards: int = 0
    is_plain: bool = False

    def model(self, model: CostModel) -> CostModel:
        """Return what things cost at this site, given what they cost at others."""
        return replace(model, retpoline_cycles=model.plain_cycles) if self.is_plain else model


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """A program's branches over time.

    Attributes:
        name: For people.
        sites: Its sites.
        pair_sites: Site of each pair, ascending: i64[n_pairs].
        pair_targets: Target address of each pair: i64[n_pairs].
        contents: How often each pair is taken: f64[n_contents, n_pairs].
        slices: Content of each slice: i64[n_slices].
        factors: How many times over: f64[n_slices].
        slice_s: Length of a slice in seconds.
        notes: Sentences worth telling about where it comes from.
    """

    name: str
    sites: tuple[WorkloadSite, ...]
    pair_sites: NDArray[np.int64]
    pair_targets: NDArray[np.int64]
    contents: NDArray[np.float64]
    slices: NDArray[np.int64]
    factors: NDArray[np.float64]
    slice_s: float = SLICE_S
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that the parts fit each other."""
        if len(self.slices) != len(self.factors) or len(self.pair_sites) != len(self.pair_targets):
            raise ValueError("parts of different length")
        if self.contents.shape[1] != len(self.pair_sites):
            raise ValueError("contents of other pairs")
        if np.any(np.diff(self.pair_sites) < 0):
            raise ValueError("pairs are not in the order of sites")

    @property
    def n_slices(self) -> int:
        """Number of slices."""
        return len(self.slices)

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.n_slices * self.slice_s

    @cached_property
    def n_branches(self) -> float:
        """All branches made."""
        return float(self.contents.sum(axis=1)[self.slices] @ self.factors)

    @cached_property
    def first_pairs(self) -> NDArray[np.int64]:
        """First pair of each site, and one more: i64[n_sites + 1]."""
        return np.searchsorted(self.pair_sites, np.arange(len(self.sites) + 1))

    def repeated(self, times: int) -> Workload:
        """Return the same workload so many times, one after the other."""
        return replace(
            self, slices=np.tile(self.slices, times), factors=np.tile(self.factors, times)
        )

    def slice_at(self, now_s: float) -> int:
        """Return the number of the slice that a moment lies in, or the number of slices."""
        return min(self.n_slices, max(0, int(now_s / self.slice_s + 1e-9)))

    def counts(self, first: int, last: int) -> NDArray[np.float64]:
        """Return how often each pair is taken in slices first..last-1."""
        weights = np.bincount(
            self.slices[first:last], self.factors[first:last], minlength=len(self.contents)
        )
        used = np.flatnonzero(weights)
        summed: NDArray[np.float64] = weights[used] @ self.contents[used]
        return summed

    def pairs_of(self, site: int) -> slice:
        """Return where a site's pairs are."""
        return slice(int(self.first_pairs[site]), int(self.first_pairs[site + 1]))

    def site_counts(self, site: int, start_s: float, end_s: float) -> NDArray[np.float64]:
        """Return how often each of a site's pairs is taken between two moments.

        Within a slice branches are spread evenly.
        """
        first = min(self.n_slices, max(0, math.floor(start_s / self.slice_s)))
        last = min(self.n_slices, max(first, math.ceil(end_s / self.slice_s)))
        begins = np.arange(first, last) * self.slice_s
        overlap = np.minimum(begins + self.slice_s, end_s) - np.maximum(begins, start_s)
        weights = self.factors[first:last] * np.maximum(overlap, 0.0) / self.slice_s
        rows = self.contents[self.slices[first:last], self.pairs_of(site)]
        summed: NDArray[np.float64] = weights @ rows
        return summed

    def site_rows(self, site: int, first: int, last: int) -> NDArray[np.float64]:
        """Return how often a site's pairs are taken in each slice: f64[last - first, n]."""
        rows: NDArray[np.float64] = self.contents[self.slices[first:last], self.pairs_of(site)]
        return rows * self.factors[first:last, None]
