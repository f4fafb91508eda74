# SPDX-License-Identifier: Apache-2.0
"""Notice sites that were cold and are hot now, without touching the target.

A site on its baseline counts nothing. What it costs shows elsewhere: a
retpoline spends nearly all of its time inside its thunk, so the share of
sampled program counters that lie in thunks *is* the overhead left to win. When
it is worth it, the session opens a new learning window over the sites that are
not promoted. Where sampling is not permitted, such windows come by the clock,
rarely.

Sites that stay on their thunk for good reason (nothing dominates) keep that
share up; the interval between windows doubles while they change nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.errors import OptpolineError, ProcessGone
from optpoline.model import Addr
from optpoline.process.perf import PcSampler, share_within

__all__ = ["Rediscovery"]

LOOK_EVERY_S = 1.0
"""Time between looks; one takes LOOK_S at LOOK_HZ, some 50 samples a busy thread,
each a microsecond or two: 0.01 % of a CPU."""

LOOK_S = 0.05
LOOK_HZ = 997

MIN_THUNK_SHARE = 0.03
"""Share of the target's CPU time in thunks that is worth a window of learning,
which takes two stops and slows the unpromoted sites for a quarter of a second."""

MISS_S = 7e-9
"""Seconds that a miss of a promoted site spends in a thunk (6.8 ns measured): known
overhead, which no learning window will find anything new about."""

MIN_SAMPLES = 20
"""Samples below which a share says nothing; the target is nearly idle then."""

FIRST_INTERVAL_S = 2.0
MAX_INTERVAL_S = 600.0
"""Interval between windows: doubles from the first to the longest while they find
nothing to promote, and starts afresh when one does."""

BLIND_INTERVAL_S = 120.0
"""First interval where program counters may not be sampled."""

THUNK_SIZE = 32
"""Bytes taken for a thunk; GCC's are 17, Clang's with its padding up to 32."""


class Rediscovery:
    """Decides when the unpromoted sites deserve another learning window.

    Args:
        pid: The target.
        now_s: CLOCK_MONOTONIC, seconds.
    """

    def __init__(self, pid: int, now_s: float) -> None:
        """Begin; nothing is opened but for the length of a look."""
        self._pid = pid
        self._next_look_s = now_s + LOOK_EVERY_S
        self._interval_s = FIRST_INTERVAL_S
        self._not_before_s = now_s + FIRST_INTERVAL_S
        self.reason_blind: str | None = None
        """Why program counters cannot be sampled, or None."""

    def is_due(self, records: Collection[SiteRecord], now_s: float) -> bool:
        """Tell whether a learning window over the unpromoted sites is worth it now.

        Takes ``LOOK_S`` when it looks.

        Raises:
            ProcessGone: if the target has exited.
        """
        if now_s < self._next_look_s or now_s < self._not_before_s:
            return False
        self._next_look_s = now_s + LOOK_EVERY_S
        thunks = {r.thunk_addr for r in records if r.state is SiteState.BASELINE}
        if not thunks:
            return False
        if self.reason_blind is not None:
            return True
        try:
            # A clock at rest still costs its thread 0.1 us a context switch: none stays open.
            with PcSampler(self._pid, frequency_hz=LOOK_HZ) as sampler:
                samples = sampler.sample(LOOK_S)
        except ProcessGone:
            raise
        except OptpolineError as error:
            self._go_blind(str(error), now_s)
            return False
        n_samples = sum(sample.count for sample in samples)
        if n_samples < MIN_SAMPLES:
            return False
        misses_hz = sum(r.miss_rate_hz for r in records if r.state is SiteState.PROMOTED)
        n_busy_cpus = n_samples / (LOOK_S * LOOK_HZ)
        known_share = misses_hz * MISS_S / n_busy_cpus
        return share_within(samples, _ranges(thunks)) - known_share >= MIN_THUNK_SHARE

    def _go_blind(self, reason: str, now_s: float) -> None:
        """Go by the clock from now on."""
        self.reason_blind = reason
        self._interval_s = BLIND_INTERVAL_S
        self._not_before_s = now_s + self._interval_s

    def learned(self, n_promoted: int, now_s: float) -> None:
        """Note how a window ended, to choose when the next may come."""
        first_s = FIRST_INTERVAL_S if self.reason_blind is None else BLIND_INTERVAL_S
        self._interval_s = first_s if n_promoted else min(MAX_INTERVAL_S, 2 * self._interval_s)
        self._not_before_s = now_s + self._interval_s


def _ranges(thunks: Iterable[Addr]) -> list[tuple[Addr, Addr]]:
    """Return the address ranges of thunks, ascending and disjoint."""
    ranges: list[tuple[Addr, Addr]] = []
    for start in sorted(thunks):
        if ranges and start < ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], Addr(start + THUNK_SIZE))
        else:
            ranges.append((start, Addr(start + THUNK_SIZE)))
    return ranges
