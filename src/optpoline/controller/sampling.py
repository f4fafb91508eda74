# SPDX-License-Identifier: Apache-2.0
"""Keep up: look at promoted sites again, and change those that changed.

Misses are counted on the slow path all the time and are read every ``poll_s``:
a target that nobody guards shows at once. A change of weights among guarded
targets shows in no miss, so each site is also re-sampled in short windows,
``sample_s`` long, at an interval that doubles while nothing changes. All of
this is single stores to the arena; text is linked anew only when a re-promoted
site has been quiet for ``relink_after_s``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from optpoline.controller.config import Config
from optpoline.controller.learning import TargetFilter, begin_sample, end_sample, grow_full
from optpoline.controller.linker import Linker, Move
from optpoline.controller.promotion import demote, fit_counts, promote_again
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.patch.blocks import Block
from optpoline.promote.policy import Action

__all__ = ["Sampler"]

MISS_RATE_FLOOR_HZ = 20_000.0
"""Misses a second below which a site is not looked at early: at 20 cycles each
they cost 0.01 % of a CPU."""

MISS_RATE_GROWTH = 2.0
"""Early look when the miss rate grows by this factor over what it was when the
site was last judged fit; below it the next regular window is soon enough."""

WINDOW_GROWTH = 4
"""Waves in a sample whose slots fill up: a flipped dispatch site must be known
within one window."""


class Sampler:
    """Re-sampling of promoted sites; one a session."""

    def __init__(self, config: Config, linker: Linker, may_guard: TargetFilter) -> None:
        """Keep what is needed."""
        self._config = config
        self._linker = linker
        self._may_guard = may_guard
        self._spares: dict[int, Block] = {}
        self._last_poll_s = time.monotonic()
        self.n_sampled_s = 0.0

    def schedule(self, records: Iterable[SiteRecord], now_s: float) -> None:
        """Put newly promoted sites on the schedule."""
        for record in records:
            if record.state is SiteState.PROMOTED and record.next_sample_s == 0.0:
                record.sample_every_s = self._config.sample_every_s
                record.next_sample_s = now_s + record.sample_every_s

    def poll(self, records: Iterable[SiteRecord], now_s: float) -> list[SiteRecord]:
        """Read miss counters; return promoted sites that are due for a window."""
        elapsed_s = max(1e-6, now_s - self._last_poll_s)
        self._last_poll_s = now_s
        due: list[SiteRecord] = []
        for record in records:
            active = record.active
            if record.state is not SiteState.PROMOTED or active is None:
                continue
            addr = active.plan.miss_count_addr
            if addr is None:
                continue
            misses = record.arena.load_u64(addr)
            rate_hz = (misses - record.misses_seen) / elapsed_s
            record.misses_seen = misses
            limit_hz = max(MISS_RATE_FLOOR_HZ, MISS_RATE_GROWTH * record.miss_rate_hz)
            if rate_hz > limit_hz or now_s >= record.next_sample_s:
                due.append(record)
            record.miss_rate_hz = max(rate_hz, 0.5 * record.miss_rate_hz)
        return due

    def sample(self, due: list[SiteRecord]) -> tuple[int, int]:
        """Run one window over the due sites and act on it.

        Returns:
            (sites promoted anew, sites demoted).
        """
        begin_s = time.monotonic()
        for record in due:
            spare = self._spares.get(record.site.addr)
            if spare is not None and record.plan is not None:
                spare = spare if spare.plan.tree is record.plan.tree else None
            block = begin_sample(record, spare, time.monotonic())
            if block is not None:
                self._spares[record.site.addr] = block
        for _ in range(WINDOW_GROWTH):
            time.sleep(self._config.sample_s / WINDOW_GROWTH)
            grow_full((r for r in due if r.counting is not None), self._may_guard)
        end_s = time.monotonic()
        for record in due:
            if record.counting is not None:
                end_sample(record, end_s)
        self.n_sampled_s += end_s - begin_s
        return self._decide(due, end_s)

    def _decide(self, due: list[SiteRecord], now_s: float) -> tuple[int, int]:
        """Act on what a window counted."""
        n_again = n_demoted = 0
        for record in due:
            if record.counts is None or record.plan is None or record.window_end_s < now_s:
                continue
            counts = fit_counts(record, record.counts, self._may_guard)
            decision = self._config.policy.decide_again(
                record.plan, counts, record.window_s, record.n_confirmed
            )
            match decision.action:
                case Action.PROMOTE if decision.plan is not None:
                    n_again += promote_again(record, decision.plan, now_s)
                    record.sample_every_s = self._config.sample_every_s
                case Action.DEMOTE:
                    demote(record, now_s)
                    n_demoted += 1
                case Action.CONFIRM:
                    record.n_confirmed += 1
                    record.sample_every_s = self._config.sample_every_s
                case _:
                    record.n_confirmed = 0
                    record.sample_every_s = min(
                        self._config.sample_every_max_s, 2 * record.sample_every_s
                    )
            record.next_sample_s = now_s + record.sample_every_s
        return n_again, n_demoted

    def relink(self, records: Iterable[SiteRecord], now_s: float) -> int:
        """Link the text of changed and quiet sites to where they go by now.

        One stop for all of them, or none if there is nothing to do.
        """
        moves = [
            Move(record=record, block=record.active)
            for record in records
            if record.state in (SiteState.PROMOTED, SiteState.BASELINE)
            and record.home is not record.active
            and now_s - record.changed_s >= self._config.relink_after_s
        ]
        return self._linker.link(moves) if moves else 0
