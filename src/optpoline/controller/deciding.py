# SPDX-License-Identifier: Apache-2.0
"""What a site's policy is told, and the decisions on sites that lead to their thunks.

Between a policy, which knows no record, and the records of a session, which know no policy.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import NamedTuple

from optpoline.controller.learning import TargetFilter
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import BranchSource, SiteState
from optpoline.controller.tables import Tables
from optpoline.learn.counting import SiteCounts
from optpoline.learn.pooling import ENOUGH_COUNT
from optpoline.model import Addr
from optpoline.promote.policy import Action, Decision, Policy, SiteHistory, SiteView

__all__ = [
    "FirstDecider",
    "first_history_of",
    "fit_counts",
    "history_of",
    "keep_history",
    "view_of",
]

MIN_FREE_RATIO = 0.5
"""Share of an arena's code that must be free for a block that nobody may ever enter: sites that
run, and change, need theirs."""


def fit_counts(record: SiteRecord, counts: SiteCounts, may_guard: TargetFilter) -> SiteCounts:
    """Return counts with targets that must not be guarded counted as unknown."""
    kept = tuple(c for c in counts.counts if may_guard(record, c.target))
    if len(kept) == len(counts.counts):
        return counts
    lost = sum(c.hit_count for c in counts.counts) - sum(c.hit_count for c in kept)
    return replace(counts, counts=kept, n_unknown=counts.n_unknown + lost)


def history_of(record: SiteRecord) -> SiteHistory:
    """Return what a site's policy goes by."""
    return SiteHistory(
        current=record.plan,
        profile=record.profile,
        n_confirmed=record.n_confirmed,
        n_changes=record.n_changes,
        changed_s=record.changed_s,
        calm_since_s=record.calm_since_s,
    )


def first_history_of(record: SiteRecord) -> SiteHistory:
    """Return what a policy goes by of a site that leads to its thunk."""
    history = history_of(record)
    if history.current is not None or history.profile is not None:
        history = replace(history, current=None, profile=None)
    return history


def view_of(
    record: SiteRecord,
    history: SiteHistory,
    counts: SiteCounts,
    *,
    window_s: float,
    now_s: float,
    hotter_ratio: float = 0.0,
) -> SiteView:
    """Return what a site's policy is told after a window (``SiteView``)."""
    return history.view(
        counts,
        window_s=window_s,
        now_s=now_s,
        kind=record.site.kind,
        hotter_ratio=hotter_ratio,
        max_guards=record.site.max_guards,
        is_plain=record.site.is_plain,
    )


def keep_history(record: SiteRecord, history: SiteHistory) -> None:
    """Keep what a site's policy goes by next time."""
    record.plan = history.current
    record.profile = history.profile
    record.n_confirmed = history.n_confirmed
    record.n_changes = history.n_changes
    record.changed_s = history.changed_s
    record.calm_since_s = history.calm_since_s


class _Fitted(NamedTuple):
    """What there is to know of the targets of a table's counts, for some of its sites.

    Attributes:
        counts: The counts as ``fit_counts`` returns them.
        far_targets: Those of the targets that are out of reach.
        operand_targets: Those at which the operand may still be needed.
    """

    counts: SiteCounts
    far_targets: set[Addr]
    operand_targets: set[Addr]


class FirstDecider:
    """Decides on sites that lead to their thunks, by their own counts or their tables'.

    Sites of one table that are decided on by that have one decision: it is made once. So is the
    verdict on each target, for sites that are alike in all that it depends on.

    Args:
        policy: Decides.
        may_guard: Tells which targets a block may branch to.
        guard_kin: Returns what is the same for sites of which that says the same.
        tables: What sites know together.
        now_s: CLOCK_MONOTONIC, seconds.
    """

    def __init__(
        self,
        policy: Policy,
        may_guard: TargetFilter,
        guard_kin: Callable[[SiteRecord], Hashable],
        tables: Tables,
        now_s: float,
    ) -> None:
        """Have decided nothing."""
        self._now_s = now_s
        self._policy = policy
        self._may_guard = may_guard
        self._guard_kin = guard_kin
        self._tables = tables
        self._fitted: dict[tuple[Hashable, SiteCounts], _Fitted] = {}
        self._by_table: dict[SiteView, Decision] = {}

    def decide(self, record: SiteRecord, hotter_ratio: float) -> Decision | None:
        """Return the decision to promote a site; None if it is not to be, for now.

        Notes whose counts it was decided on by.
        """
        shared = self._tables.share(record)
        counts = record.news if shared is None else shared.window
        if counts is None or record.state is SiteState.REFUSED:
            return None
        is_by_table = shared is not None and shared.is_by_table
        if is_by_table:
            counts = self._fit_shared(record, counts)
        else:
            counts = fit_counts(record, counts, self._may_guard)
        if record.unsafe_targets:
            return None
        if is_by_table:
            record.source = BranchSource.TABLE
        elif counts.total >= ENOUGH_COUNT:
            record.source = BranchSource.SITE
        view = view_of(
            record,
            first_history_of(record),
            counts,
            window_s=record.window_s if shared is None else shared.window_s,
            now_s=self._now_s,
            hotter_ratio=hotter_ratio,
        )
        decision = self._decide_by_table(record, view) if is_by_table else self._policy.decide(view)
        if decision is None or decision.action is not Action.PROMOTE or decision.plan is None:
            return None
        return decision

    def _fit_shared(self, record: SiteRecord, counts: SiteCounts) -> SiteCounts:
        """Do ``fit_counts`` with a table's counts, once for all sites of a kin."""
        key = (self._guard_kin(record), counts)
        known = self._fitted.get(key)
        if known is not None:
            record.far_targets |= known.far_targets
            record.operand_targets |= known.operand_targets
            return known.counts
        fitted = fit_counts(record, counts, self._may_guard)
        if not record.unsafe_targets:  # else each of them is to be refused
            targets = {count.target for count in counts.counts}
            self._fitted[key] = _Fitted(
                fitted, record.far_targets & targets, record.operand_targets & targets
            )
        return fitted

    def _decide_by_table(self, record: SiteRecord, view: SiteView) -> Decision | None:
        """Decide on a site by its table, or not at all where an arena is filling up."""
        if record.arena.free_code_size < MIN_FREE_RATIO * record.arena.code_size:
            return None
        # One that is not known to run comes last, and its own history says nothing of the table.
        view = replace(view, hotter_ratio=1.0, since_change_s=0.0, n_changes=0)
        known = self._by_table.get(view)
        if known is None:
            known = self._by_table[view] = self._policy.decide(view)
        return known
