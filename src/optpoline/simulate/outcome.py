# SPDX-License-Identifier: Apache-2.0
"""What a policy's tenures are worth: hits, cycles, how soon it follows changes.

Two ideals stand beside the policies. *static*: one tree for each site, the best
for the whole run, from the start; what a compiler with a perfect profile would
make. *oracle*: at each change of a hot site the best tree until the next one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optpoline.model import Addr, Count, Miss
from optpoline.promote.cost import CostModel
from optpoline.promote.tree import PlannedTree, plan_tree
from optpoline.simulate.changes import Change
from optpoline.simulate.cycles import hits_of_slices, tree_cycles
from optpoline.simulate.state import Replay, Tenure
from optpoline.simulate.workload import Workload

__all__ = ["Adaptation", "Outcome", "ideal_tenures", "judge", "judge_tenures"]

ADAPTED_RATIO = 0.1
ADAPTED_CYCLES = 0.3
"""A site has adapted when its tree costs so much more than the best at most; what the
default policy takes for noise."""

HORIZON_S = 0.01
"""Over which that is averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """How changes were followed.

    Attributes:
        n_changes: Changes of hot sites.
        n_missed: Those that were not followed before the next one.
        median_s: Time from a change until the tree fits again; one that was missed
            counts as long as it lasted. None without changes.
        max_s: The longest.
    """

    n_changes: int
    n_missed: int
    median_s: float | None
    max_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one policy made of a workload.

    Attributes:
        policy: Its name.
        hit_ratio: Share of all branches that went directly where they go.
        cycles: Cycles a branch, counting included.
        watch_cycles: Those of them that counting in later windows took.
        adaptation: How changes were followed.
        replay: What it did, or None for an ideal.
        hits: Share of branches that went directly, by slice; nan where there is none.
        slice_cycles: Cycles a branch by slice; nan where there is none.
    """

    policy: str
    hit_ratio: float
    cycles: float
    watch_cycles: float
    adaptation: Adaptation
    replay: Replay | None
    hits: NDArray[np.float64]
    slice_cycles: NDArray[np.float64]


def judge(
    workload: Workload,
    replay: Replay,
    changes: Sequence[Change],
    model: CostModel,
    counting_cycles: float,
) -> Outcome:
    """Return what a replay is worth.

    Args:
        workload: What was replayed.
        replay: What the policy did.
        changes: ``find_changes`` of the workload.
        model: Cycles of everything; one for all policies.
        counting_cycles: What a counted branch costs more.
    """
    watching = np.zeros(workload.n_slices)
    for moment_s, n_counted in replay.counted:
        watching[min(workload.slice_at(moment_s), workload.n_slices - 1)] += n_counted
    return _judge(
        workload,
        replay.policy,
        replay.tenures,
        changes,
        model,
        replay=replay,
        watching=watching * counting_cycles,
        counting_cycles=counting_cycles,
    )


def judge_tenures(
    workload: Workload,
    name: str,
    tenures: Sequence[Tenure],
    changes: Sequence[Change],
    model: CostModel,
) -> Outcome:
    """Return what an ideal is worth."""
    return _judge(
        workload,
        name,
        tenures,
        changes,
        model,
        replay=None,
        watching=np.zeros(workload.n_slices),
        counting_cycles=0.0,
    )


def _judge(
    workload: Workload,
    name: str,
    tenures: Sequence[Tenure],
    changes: Sequence[Change],
    model: CostModel,
    *,
    replay: Replay | None,
    watching: NDArray[np.float64],
    counting_cycles: float,
) -> Outcome:
    """Sum up tenures."""
    made = workload.contents.sum(axis=1)[workload.slices] * workload.factors
    hits = np.zeros(workload.n_slices)
    cycles = np.zeros(workload.n_slices)
    changed = {change.site for change in changes}
    by_site: dict[int, NDArray[np.float64]] = {}
    for tenure in tenures:
        first, last = workload.slice_at(tenure.start_s), workload.slice_at(tenure.end_s)
        if first == last:
            continue
        own_hits, own_cycles = _sum_tenure(workload, tenure, first, last, model, counting_cycles)
        hits[first:last] += own_hits
        cycles[first:last] += own_cycles
        if tenure.site in changed:
            by_site.setdefault(tenure.site, np.zeros(workload.n_slices))[first:last] += own_cycles
    cycles += watching
    n_branches = max(1.0, workload.n_branches)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Outcome(
            policy=name,
            hit_ratio=float(hits.sum()) / n_branches,
            cycles=float(cycles.sum()) / n_branches,
            watch_cycles=float(watching.sum()) / n_branches,
            adaptation=_adaptation(workload, changes, by_site, model),
            replay=replay,
            hits=hits / made,
            slice_cycles=cycles / made,
        )


def _sum_tenure(
    workload: Workload,
    tenure: Tenure,
    first: int,
    last: int,
    model: CostModel,
    counting_cycles: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (hits, cycles) of a tenure by slice.

    Both grow with how often a content is taken, so they are worked out once for each
    content that occurs.
    """
    used, inverse = np.unique(workload.slices[first:last], return_inverse=True)
    rows = workload.contents[used, workload.pairs_of(tenure.site)]
    targets = workload.pair_targets[workload.pairs_of(tenure.site)]
    factors = workload.factors[first:last]
    hits = hits_of_slices(tenure.tree, rows, targets)
    own_model = workload.sites[tenure.site].model(model)
    cycles = tree_cycles(tenure.tree, rows, targets, own_model)
    if tenure.is_counting:
        cycles = cycles + rows.sum(axis=1) * counting_cycles
    return hits[inverse] * factors, cycles[inverse] * factors


def _adaptation(
    workload: Workload,
    changes: Sequence[Change],
    by_site: dict[int, NDArray[np.float64]],
    model: CostModel,
) -> Adaptation:
    """Return how soon each change was followed."""
    taken_s: list[float] = []
    n_missed = 0
    for change in changes:
        own = by_site[change.site][change.first : change.last]
        rows = workload.site_rows(change.site, change.first, change.last)
        targets = workload.pair_targets[workload.pairs_of(change.site)]
        own_model = workload.sites[change.site].model(model)
        best = tree_cycles(_plan(rows, targets, own_model).tree, rows, targets, own_model)
        width = max(1, round(HORIZON_S / workload.slice_s))
        kernel = np.ones(width)
        # Each slice with the few after it: "from now on it fits".
        own_sum = np.convolve(own, kernel)[width - 1 :]
        best_sum = np.convolve(best, kernel)[width - 1 :]
        made = np.convolve(rows.sum(axis=1), kernel)[width - 1 :]
        limit = best_sum + np.maximum(ADAPTED_RATIO * best_sum, ADAPTED_CYCLES * made)
        fits = np.flatnonzero((own_sum <= limit) & (made > 0))
        if len(fits):
            taken_s.append(int(fits[0]) * workload.slice_s)
        else:
            n_missed += 1
            taken_s.append((change.last - change.first) * workload.slice_s)
    return Adaptation(
        n_changes=len(changes),
        n_missed=n_missed,
        median_s=float(np.median(taken_s)) if taken_s else None,
        max_s=max(taken_s, default=None),
    )


def ideal_tenures(workload: Workload, changes: Sequence[Change], model: CostModel) -> list[Tenure]:
    """Return the best tree for each site, and a better one after each of ``changes``.

    Args:
        workload: What it does.
        changes: Moments to change trees at; none for one tree each.
        model: Cycles of everything.
    """
    cuts: dict[int, list[int]] = {}
    for change in changes:
        cuts.setdefault(change.site, []).append(change.first)
    tenures: list[Tenure] = []
    everything = workload.counts(0, workload.n_slices)
    for site in range(len(workload.sites)):
        pairs = workload.pairs_of(site)
        if not everything[pairs].any():
            continue
        edges = [0, *sorted(cuts.get(site, ())), workload.n_slices]
        for first, last in itertools.pairwise(edges):
            start_s, end_s = first * workload.slice_s, last * workload.slice_s
            taken = workload.site_counts(site, start_s, end_s)
            own_model = workload.sites[site].model(model)
            plan = _plan(taken[None, :], workload.pair_targets[pairs], own_model)
            is_worth_it = plan.cycles < own_model.retpoline_cycles
            tree = plan.tree if is_worth_it else Miss()
            tenures.append(Tenure(site=site, start_s=start_s, end_s=end_s, tree=tree))
    return tenures


def _plan(rows: NDArray[np.float64], targets: NDArray[np.int64], model: CostModel) -> PlannedTree:
    """Return the cheapest tree for what slices take together."""
    counts = [
        Count(target=Addr(int(target)), hit_count=round(n))
        for target, n in zip(targets, rows.sum(axis=0), strict=True)
        if n >= 0.5
    ]
    return plan_tree(counts, 0, model)
