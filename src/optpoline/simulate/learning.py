# SPDX-License-Identifier: Apache-2.0
"""Learning windows of a replay: sites on their thunk count, and are promoted.

As ``Session.learn`` and ``controller/rediscovery.py`` have it: the first window is
over all sites, or where there are too many over those that samples of program
counters meet; later ones are over sites that samples meet in their thunks. How
often that is is a matter of chance, at the rate at which the site is in its thunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from optpoline.learn.counting import FIRST_OPEN_SLOTS
from optpoline.model import Miss
from optpoline.promote.policy import Action
from optpoline.promote.schedule import look_interval
from optpoline.promote.tree import balance_tree
from optpoline.simulate.state import ReplayState, SimulatedSite, Tenure
from optpoline.simulate.windows import Window

__all__ = ["Learner"]

MIN_LEARN_S = 0.1
"""Time left in a window that is worth linking more sites for, as in ``controller/session.py``."""


class Learner:
    """Opens learning windows.

    Args:
        state: The replay.
    """

    def __init__(self, state: ReplayState) -> None:
        """Have looked at nothing."""
        self._state = state
        self._next_look_s = 0.0
        self._n_calm = 0
        self._met = np.zeros(len(state.sites))

    def learn_first(self, end_s: float) -> list[SimulatedSite]:
        """Run the first window, from 0 to ``end_s``; return the sites that were promoted."""
        state = self._state
        if len(state.sites) <= state.engine.all_at_once_sites:
            begins = [(site, 0.0) for site in state.sites]
        else:
            begins = self._find_running(end_s)
        return self._learn(begins, end_s)

    def _find_running(self, end_s: float) -> list[tuple[SimulatedSite, float]]:
        """Return the sites that samples meet, and when each is linked."""
        engine = self._state.engine
        met_hz = self._site_rates_hz(0.0, end_s) * engine.thunk_s * engine.hot_hz
        running = np.flatnonzero(met_hz)
        first_s = self._state.rng.exponential(size=len(running)) / met_hz[running]
        begin_s = np.ceil(first_s / engine.hot_wave_s) * engine.hot_wave_s
        sites = self._state.sites
        return [
            (sites[number], moment_s)
            for number, moment_s in zip(running.tolist(), begin_s.tolist(), strict=True)
            if moment_s <= end_s - MIN_LEARN_S
        ]

    def learn_again(self, now_s: float) -> tuple[list[SimulatedSite], float]:
        """Run a window if time spent in thunks is worth it.

        Returns:
            The sites that were promoted, and the moment after.
        """
        found = self._find_in_thunks(now_s)
        if not found:
            return [], now_s
        self._n_calm = 0
        end_s = min(self._state.workload.seconds, now_s + self._state.engine.relearn_s)
        promoted = self._learn([(site, now_s) for site in found], end_s)
        engine = self._state.engine
        self._next_look_s = end_s + (engine.after_finds_s if promoted else engine.after_nothing_s)
        return promoted, end_s

    def _find_in_thunks(self, now_s: float) -> list[SimulatedSite]:
        """Return the unpromoted sites that samples have met in their thunks."""
        state, engine = self._state, self._state.engine
        if now_s < self._next_look_s:
            return []
        self._n_calm += 1
        self._next_look_s = now_s + look_interval(
            self._n_calm,
            every_s=engine.thunk_look_every_s,
            n_calm_looks=engine.n_calm_looks,
            max_s=engine.calm_look_every_s,
        )
        rates_hz = self._site_rates_hz(now_s - engine.thunk_look_s, now_s)
        n_samples = rates_hz * engine.thunk_s * engine.thunk_look_s * engine.thunk_look_hz
        self._met += state.rng.poisson(n_samples * ~state.is_promoted)
        return [
            state.sites[number]
            for number in np.flatnonzero(self._met).tolist()
            if not state.is_promoted[number] and now_s >= state.sites[number].rests_until_s
        ]

    def _site_rates_hz(self, start_s: float, end_s: float) -> NDArray[np.float64]:
        """Return the branches a second of each site between two moments."""
        work = self._state.workload
        first, last = work.slice_at(start_s), work.slice_at(end_s)
        taken = np.bincount(
            work.pair_sites, work.counts(first, last), minlength=len(self._state.sites)
        )
        rates: NDArray[np.float64] = taken / max(work.slice_s, end_s - start_s)
        return rates

    def _learn(
        self, begins: Sequence[tuple[SimulatedSite, float]], end_s: float
    ) -> list[SimulatedSite]:
        """Let sites count from moments of their own on, and promote what is worth it."""
        state = self._state
        windows: list[tuple[SimulatedSite, Window]] = []
        for site, begin_s in begins:
            window = state.run_window(
                site, begin_s, end_s, wave_s=state.engine.wave_s, n_open=FIRST_OPEN_SLOTS
            )
            state.replay.n_learning += 1
            self._met[site.number] = 0.0
            site.rate_hz = window.total / max(1e-6, end_s - begin_s)
            if window.total:
                self._note_stages(site, window)
                windows.append((site, window))
        windows.sort(key=lambda item: -item[0].rate_hz)
        promoted = self._decide(windows, end_s)
        for site, _ in begins:
            if not site.is_promoted:
                longest_s = state.engine.last_rest_s
                site.rest_s = min(longest_s, max(state.engine.first_rest_s, 2 * site.rest_s))
                site.rests_until_s = end_s + site.rest_s
        return promoted

    def _decide(
        self, windows: Sequence[tuple[SimulatedSite, Window]], now_s: float
    ) -> list[SimulatedSite]:
        """Promote what is worth it, hottest first."""
        state = self._state
        all_hz = sum(site.rate_hz for site, _ in windows)
        hotter_hz = 0.0
        promoted: list[SimulatedSite] = []
        for site, window in windows:
            view = site.history.view(
                window.counts,
                window_s=window.window_s,
                now_s=now_s,
                kind=site.kind,
                is_plain=site.is_plain,
                hotter_ratio=hotter_hz / all_hz,
            )
            hotter_hz += site.rate_hz
            decision = state.policy.decide(view)
            if decision.action is Action.PROMOTE and decision.plan is not None:
                state.promote(site, decision.plan, now_s)
                state.keep(site, decision, now_s)
                site.rest_s = 0.0
                promoted.append(site)
        state.replay.n_promoted += len(promoted)
        return promoted

    def _note_stages(self, site: SimulatedSite, window: Window) -> None:
        """Note what a site had during a learning window."""
        state = self._state
        state.end_tenure(site, window.stages[0].start_s)
        for stage in window.stages:
            state.replay.tenures.append(
                Tenure(
                    site=site.number,
                    start_s=stage.start_s,
                    end_s=stage.end_s,
                    tree=balance_tree(stage.known),
                    is_counting=True,
                )
            )
            state.memory.write_counting(site.number, len(stage.known), stage.n_open)
        state.memory.drop_counting(site.number)
        site.since_s = window.stages[-1].end_s
        site.tree = Miss()
