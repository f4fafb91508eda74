# SPDX-License-Identifier: Apache-2.0
"""Later windows of a replay: promoted sites are looked at again.

As ``controller/sampling.py`` and ``controller/misses.py`` have it: at each poll, sites
that miss as never before count until they are known; sites whose time has come count
for a part of a window. The policy's schedule says when that is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from optpoline.learn.counting import NO_COUNTS, UNKNOWN_SHARE_TO_GROW, SiteCounts, add
from optpoline.promote.cost import CostModel
from optpoline.promote.policy import Action
from optpoline.promote.schedule import (
    forgotten_ratio,
    next_interval,
    poll_interval,
    stretch_factor,
)
from optpoline.promote.tree import stake_cycles
from optpoline.simulate.state import ReplayState, SimulatedSite
from optpoline.simulate.windows import SAMPLE_OPEN_SLOTS, Window

__all__ = ["GOLDEN_RATIO", "Sampler"]

GOLDEN_RATIO = 0.618033988749895
"""As in ``controller/sampling.py``."""

_STAKE_MODEL = CostModel()


class Sampler:
    """Looks at promoted sites.

    Args:
        state: The replay.
    """

    def __init__(self, state: ReplayState) -> None:
        """Have nothing on the schedule."""
        self._state = state
        self._schedule = state.policy.schedule
        self._stretch = 1.0
        self._next_review_s = 0.0
        self._last_poll_s = 0.0
        self._elapsed_s = 0.0
        """Between the last two polls."""
        self._changed_s = 0.0

    def next_poll_s(self, now_s: float) -> float:
        """Return when the next poll is."""
        return now_s + poll_interval(self._state.engine.poll_s, now_s - self._changed_s)

    def schedule(self, now_s: float) -> None:
        """Put newly promoted sites on the schedule, spread over their first interval."""
        new = [site for site in self._state.sites if site.is_promoted and site.interval_s == 0.0]
        for site in new:
            site.interval_s = self._interval_s(site, now_s)
            self._changed_s = now_s
        self._last_poll_s = now_s
        self._review(now_s)
        for site in new:
            share = 1.0 - site.number * GOLDEN_RATIO % 1.0
            self._state.due_s[site.number] = now_s + share * self._stretch * site.interval_s

    def _interval_s(
        self,
        site: SimulatedSite,
        now_s: float,
        *,
        wants_confirmation: bool = False,
        hold_s: float = 0.0,
    ) -> float:
        """Return a site's next interval, before stretching."""
        return next_interval(
            self._schedule,
            rate_hz=site.rate_hz,
            stake_cycles=stake_cycles(site.tree, _STAKE_MODEL),
            since_change_s=now_s - site.history.changed_s,
            n_changes=site.history.n_changes,
            wants_confirmation=wants_confirmation,
            hold_s=hold_s,
        )

    def _review(self, now_s: float) -> None:
        """Take in what looking at all sites costs."""
        self._next_review_s = now_s + self._state.engine.review_every_s
        self._stretch = stretch_factor(
            self._schedule,
            [(site.rate_hz, site.interval_s) for site in self._state.sites if site.is_promoted],
        )

    def poll(self, now_s: float) -> float:
        """Read misses, let sites count, decide; return the moment after."""
        if now_s >= self._next_review_s:
            self._review(now_s)
        miss_hz = self._miss_rates_hz(now_s)
        state, schedule = self._state, self._schedule
        limit_hz = np.maximum(schedule.miss_rate_floor_hz, schedule.miss_growth * state.judged_hz)
        is_missing = state.is_promoted & (miss_hz > limit_hz) & (now_s >= state.hold_s)
        state.judged_hz = np.maximum(
            np.minimum(state.judged_hz, miss_hz), forgotten_ratio(self._elapsed_s) * state.judged_hz
        )
        due = np.flatnonzero(state.is_promoted & (now_s >= state.due_s) & ~is_missing)
        due = due[np.argsort(state.due_s[due], kind="stable")][: state.engine.max_due]
        surprised = [(state.sites[i], now_s) for i in np.flatnonzero(is_missing).tolist()]
        calm_s = now_s
        for number in due.tolist():
            site = state.sites[number]
            end_s = now_s + schedule.part_s(site.rate_hz)
            calm_s = max(calm_s, end_s)
            window = self._count(site, now_s, end_s)
            if self._is_surprised(site, window, end_s):
                surprised.append((site, now_s))
                continue
            self._keep_part(site, window, now_s, end_s)
            site.n_parts += 1
            if site.n_parts >= schedule.n_parts:
                self._decide(site, end_s, miss_hz)
        after_s = calm_s
        for site, begin_s in surprised:
            # Parts from before the surprise say nothing any more.
            site.sampled = NO_COUNTS
            end_s = self._count_until_known(site, begin_s, calm_s)
            after_s = max(after_s, end_s)
            self._decide(site, end_s, miss_hz)
        return after_s

    def _miss_rates_hz(self, now_s: float) -> NDArray[np.float64]:
        """Return the misses a second of each site since the last poll."""
        state, work = self._state, self._state.workload
        first, last = work.slice_at(self._last_poll_s), work.slice_at(now_s)
        self._elapsed_s = max(1e-6, now_s - self._last_poll_s)
        self._last_poll_s = now_s
        taken = work.counts(first, last) * ~state.is_guarded
        missed = np.bincount(work.pair_sites, taken, minlength=len(state.sites))
        rates: NDArray[np.float64] = missed / self._elapsed_s
        return rates

    def _count(self, site: SimulatedSite, start_s: float, end_s: float) -> Window:
        """Let a site count for a while."""
        state = self._state
        look_s = state.engine.look_s
        return state.run_window(site, start_s, end_s, wave_s=look_s, n_open=SAMPLE_OPEN_SLOTS)

    def _keep_part(self, site: SimulatedSite, window: Window, start_s: float, end_s: float) -> None:
        """Keep what a part of a window counted."""
        state = self._state
        for stage in window.stages:
            state.memory.write_counting(site.number, len(stage.known), stage.n_open)
        state.replay.counted.append((start_s, window.total))
        site.sampled = add(site.sampled, window.counts)
        if window.total:
            site.rate_hz = window.total / max(1e-6, end_s - start_s)

    def _count_until_known(self, site: SimulatedSite, start_s: float, calm_s: float) -> float:
        """Let a site count until its targets are known; return when that is.

        Args:
            site: Which.
            start_s: When it began to count.
            calm_s: When the parts of the sites that are not surprised are over.
        """
        end_s = calm_s
        limit_s = calm_s + self._schedule.sample_s
        while end_s < limit_s:
            end_s = min(limit_s, end_s + self._state.engine.look_s)
            window = self._count(site, start_s, end_s)
            if self._is_known(window.counts):
                break
        self._keep_part(site, window, start_s, end_s)
        return end_s

    def _is_known(self, counts: SiteCounts) -> bool:
        """Tell whether a site has counted enough, and nearly all of it by target."""
        return (
            counts.total >= self._schedule.enough_count
            and counts.n_unknown <= UNKNOWN_SHARE_TO_GROW * counts.total
        )

    def _is_surprised(self, site: SimulatedSite, window: Window, now_s: float) -> bool:
        """Ask whether this part alone shows that the tree is wrong."""
        view = site.history.view(
            window.counts,
            window_s=self._schedule.sample_s,
            now_s=now_s,
            kind=site.kind,
            is_plain=site.is_plain,
        )
        return self._state.policy.is_surprising(view)

    def _decide(self, site: SimulatedSite, now_s: float, miss_hz: NDArray[np.float64]) -> None:
        """Carry out what the policy makes of a complete window."""
        state = self._state
        state.replay.n_windows += 1
        counts, site.sampled, site.n_parts = site.sampled, NO_COUNTS, 0
        window_s = counts.total / site.rate_hz if site.rate_hz else self._schedule.sample_s
        view = site.history.view(
            counts, window_s=window_s, now_s=now_s, kind=site.kind, is_plain=site.is_plain
        )
        decision = state.policy.decide(view)
        state.judged_hz[site.number] = max(state.judged_hz[site.number], miss_hz[site.number])
        match decision.action:
            case Action.PROMOTE if decision.plan is not None:
                state.promote(site, decision.plan, now_s)
                state.replay.n_repromoted += 1
                self._changed_s = now_s
            case Action.DEMOTE:
                state.demote(site, now_s)
                state.replay.n_demoted += 1
                self._changed_s = now_s
            case _:
                pass
        state.keep(site, decision, now_s)
        if not site.is_promoted:
            return
        state.hold_s[site.number] = now_s + decision.hold_s
        is_confirming = decision.action is Action.CONFIRM
        site.interval_s = self._interval_s(
            site, now_s, wants_confirmation=is_confirming, hold_s=decision.hold_s
        )
        stretch = 1.0 if is_confirming else self._stretch
        state.due_s[site.number] = now_s + stretch * site.interval_s
