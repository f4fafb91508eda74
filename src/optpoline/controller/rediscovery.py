# SPDX-License-Identifier: Apache-2.0
"""Notice sites that were cold and are hot now, without touching the target.

A site on its baseline counts nothing. What it costs shows elsewhere: in the share of
samples that meet a thread in a thunk or at the very start of where one led it, and the
stacks say which sites it is spent for (``site_map``). When it is worth it,
the session opens a learning window over those, and no others.

A share too small to say so at one look is remembered: a site that is met again
and again gets its window as well.

Sites that stay on their thunk for good reason (nothing dominates) keep that
share up; they rest, longer each time, and what they cost does not count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from optpoline.controller.hot_sites import NEARBY_WEIGHT, HotSites
from optpoline.controller.records import SiteRecord
from optpoline.controller.site_map import Evidence, Weights
from optpoline.controller.summary import SiteState
from optpoline.promote.schedule import look_interval

__all__ = ["Rediscovery"]

LOOK_EVERY_S = 1.0
"""Time between looks; one takes LOOK_S at LOOK_HZ, some 100 samples a busy thread,
each two or three microseconds: 0.03 % of a CPU."""

CALM_LOOKS = 4
"""Looks in a row followed by no window after which the time between them doubles: one takes the
controller 3 to 9 ms, with its caches cold, and most programs start nothing new for hours."""

CALM_LOOK_EVERY_S = 8.0
"""What it comes to at most."""

LOOK_S = 0.05
LOOK_HZ = 1993

MIN_BRANCHING_SHARE = 0.03
"""Share of the target's CPU time for sites on their thunk that is worth a window of
learning at once, which takes two stops and slows these sites for a quarter of a second."""

MIN_TIMES_MET = 0.5
"""Samples within FORGET_S that must have met a site branching for a window of its own: one,
if it was named alone or as one of two. So rarely is a site met by chance, and so little
does a window over a few sites cost, that nothing is gained by waiting for more."""

FORGET_S = 60.0

MISS_S = 7e-9
"""Seconds that a miss of a promoted site spends in a thunk (6.8 ns measured): known
overhead, which no learning window will find anything new about. Samples name call
sites; only the misses of jump sites must be taken off like this."""

MIN_SAMPLES = 20
"""Samples below which a share says nothing; the target is nearly idle then."""

AFTER_FINDS_S = 0.5
AFTER_NOTHING_S = 2.0
"""Time from one window to the next look: by whether the window had sites promoted."""

MANY_FINDS = 64
AFTER_MANY_FINDS_S = 0.1
"""The same where a window had so many promoted, as in programs with thousands of hot sites:
a window meets a few hundred of them, and many more wait for their turn."""

BLIND_INTERVAL_S = 120.0
"""Time between looks where there is no clock: each stops the threads ten times."""


class Rediscovery:
    """Decides when unpromoted sites deserve a learning window, and which.

    Args:
        hot: Finds sites that run.
        jump_misses_hz: Returns how often promoted jump sites take their thunks, a second.
        now_s: CLOCK_MONOTONIC, seconds.
    """

    def __init__(self, hot: HotSites, jump_misses_hz: Callable[[], float], now_s: float) -> None:
        """Begin; nothing is opened but for the length of a look."""
        self._hot = hot
        self._jump_misses_hz = jump_misses_hz
        self._next_look_s = now_s + AFTER_NOTHING_S
        self._n_calm = 0
        """Looks since the last window."""
        self._met: Weights = defaultdict(float)
        self._forget_s = now_s + FORGET_S

    def find(self, now_s: float) -> list[SiteRecord]:
        """Return the sites for which a learning window is worth it now, hottest first.

        Takes ``LOOK_S`` when it looks.

        Args:
            now_s: CLOCK_MONOTONIC, seconds.

        Raises:
            ProcessGone: if the target has exited.
        """
        if now_s < self._next_look_s:
            return []
        evidence = self._hot.look(LOOK_S, LOOK_HZ)
        is_blind = self._hot.reason_blind is not None
        self._n_calm += 1
        every_s = look_interval(
            self._n_calm, every_s=LOOK_EVERY_S, n_calm_looks=CALM_LOOKS, max_s=CALM_LOOK_EVERY_S
        )
        self._next_look_s = now_s + (BLIND_INTERVAL_S if is_blind else every_s)
        if evidence.n_samples < (1 if is_blind else MIN_SAMPLES):
            return []
        if now_s >= self._forget_s:
            self._met.clear()
            self._forget_s = now_s + FORGET_S
        for addr, weight in evidence.branching.items():
            self._met[addr] += weight
        return self._choose(evidence, now_s)

    def _choose(self, evidence: Evidence, now_s: float) -> list[SiteRecord]:
        """Return the sites worth a window by what was seen now and before."""
        named = self._hot.eligible(evidence.branching, now_s)
        unnamed = self._hot.take_unnamed(evidence)
        branching = sum(evidence.branching[record.site.addr] for record in named)
        if unnamed:
            branching += sum(evidence.unnamed.values())
        n_busy_cpus = evidence.n_samples / self._hot.samples_per_cpu(LOOK_S, LOOK_HZ)
        known_share = self._jump_misses_hz() * MISS_S / n_busy_cpus
        if branching / evidence.n_samples - known_share >= MIN_BRANCHING_SHARE:
            nearby = {addr: NEARBY_WEIGHT * n for addr, n in evidence.nearby.items()}
            chosen = self._hot.eligible({**nearby, **evidence.branching}, now_s)
            return [*chosen, *(record for record in unnamed if record not in chosen)]
        often = {addr: n for addr, n in self._met.items() if n >= MIN_TIMES_MET}
        return self._hot.eligible(often, now_s)

    def learned(self, records: Sequence[SiteRecord], now_s: float) -> None:
        """Note that a window over some sites is over."""
        self._n_calm = 0
        for record in records:
            self._met.pop(record.site.addr, None)
        self._hot.learned(records, now_s)
        n_promoted = sum(record.state is SiteState.PROMOTED for record in records)
        if self._hot.reason_blind is None:
            self._next_look_s = now_s + _pause_s(n_promoted)


def _pause_s(n_promoted: int) -> float:
    """Return how long after a window to look again, by how many it had promoted."""
    if n_promoted >= MANY_FINDS:
        return AFTER_MANY_FINDS_S
    return AFTER_FINDS_S if n_promoted else AFTER_NOTHING_S
