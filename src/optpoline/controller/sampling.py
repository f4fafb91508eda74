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
from optpoline.controller.learning import (
    TargetFilter,
    begin_sample,
    end_sample,
    grow_full,
    window_counts,
)
from optpoline.controller.linker import Linker, Move
from optpoline.controller.promotion import demote, fit_counts, promote_again
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.model import Refusal
from optpoline.patch.blocks import Block
from optpoline.promote.policy import Action

__all__ = ["Sampler"]

MISS_RATE_FLOOR_HZ = 20_000.0
"""Misses a second below which a site is not looked at early: at 20 cycles each
they cost 0.01 % of a CPU."""

MISS_RATE_GROWTH = 2.0
"""Early look when the miss rate grows by this factor over what it was when the
site was last judged fit; below it the next regular window is soon enough."""

SAMPLE_PARTS = 8
"""Parts of a window, one at each poll: spread over most of a second they meet
more of a program's short phases than one piece of the same length would."""

WAVES = 4
"""Looks at full slots in each part; a flipped dispatch site must be known soon."""


class Sampler:
    """Re-sampling of promoted sites; one a session."""

    def __init__(self, config: Config, linker: Linker, may_guard: TargetFilter) -> None:
        """Keep what is needed."""
        self._config = config
        self._linker = linker
        self._may_guard = may_guard
        self._spares: dict[int, Block] = {}
        self._last_poll_s = time.monotonic()

    @property
    def spares(self) -> tuple[Block, ...]:
        """The counting blocks kept for the next window of each site."""
        return tuple(self._spares.values())

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
            if rate_hz > limit_hz or now_s >= record.next_sample_s or record.n_parts:
                due.append(record)
            record.miss_rate_hz = max(rate_hz, 0.5 * record.miss_rate_hz)
        return due

    def sample(self, due: list[SiteRecord]) -> tuple[int, int]:
        """Count for one part of a window at the due sites, and decide where it is complete.

        Returns:
            (sites promoted anew, sites demoted).
        """
        for record in due:
            self._begin(record)
        counting = [record for record in due if record.counting is not None]
        part_s = self._config.sample_s / SAMPLE_PARTS
        self._count_for(counting, part_s)
        surprised = [record for record in counting if self._is_surprised(record)]
        if surprised:
            # Not a matter of chance which part of the program ran: see it all now.
            self._count_for(surprised, self._config.sample_s - part_s)
        end_s = time.monotonic()
        n_again = n_demoted = 0
        for record in counting:
            if record.counting is None:
                continue  # refused on the way
            end_sample(record, end_s)
            record.n_parts = SAMPLE_PARTS if record in surprised else record.n_parts + 1
            if record.n_parts >= SAMPLE_PARTS:
                again, demoted = self._decide(record, end_s)
                n_again += again
                n_demoted += demoted
        return n_again, n_demoted

    def _begin(self, record: SiteRecord) -> None:
        """Redirect one site to its counting block, the one for its present tree."""
        spare = self._spares.get(record.site.addr)
        if spare is not None and not _is_for(spare, record):
            spare = None
        block = begin_sample(record, spare, time.monotonic())
        if block is not None:
            self._spares[record.site.addr] = block

    def _count_for(self, records: list[SiteRecord], seconds: float) -> None:
        """Let sites count, giving those whose slots fill up bigger blocks on the way."""
        for _ in range(WAVES):
            time.sleep(seconds / WAVES)
            grow_full(records, self._may_guard)

    def _is_surprised(self, record: SiteRecord) -> bool:
        """Tell whether this part alone shows that the site's tree is wrong."""
        policy = self._config.policy
        return record.plan is not None and policy.is_surprising(record.plan, window_counts(record))

    def _decide(self, record: SiteRecord, now_s: float) -> tuple[int, int]:
        """Act on what the parts of a window counted; return (promoted anew, demoted)."""
        window = record.sampled
        record.sampled = None
        record.n_parts = 0
        record.next_sample_s = now_s + record.sample_every_s
        if window is None or record.plan is None or record.state is not SiteState.PROMOTED:
            return 0, 0
        counts = fit_counts(record, window, self._may_guard)
        if record.unsafe_targets:
            return 0, 1
        decision = self._config.policy.decide_again(
            record.plan, record.profile, counts, record.n_confirmed
        )
        record.profile = decision.profile
        is_again = is_demoted = False
        first_s, last_s = self._config.sample_every_s, self._config.sample_every_max_s
        match decision.action:
            case Action.PROMOTE if decision.plan is not None:
                is_again = promote_again(record, decision.plan, now_s)
                record.sample_every_s = first_s
            case Action.DEMOTE:
                demote(record, now_s)
                is_demoted = True
            case Action.CONFIRM:
                record.n_confirmed += 1
                record.sample_every_s = first_s
            case _:
                record.n_confirmed = 0
                record.sample_every_s = min(last_s, 2 * record.sample_every_s)
        record.next_sample_s = now_s + record.sample_every_s
        return int(is_again), int(is_demoted)

    def relink(self, records: Iterable[SiteRecord], now_s: float) -> int:
        """Link the text of changed and quiet sites to where they go by now.

        One stop for all of them, or none if there is nothing to do.
        """
        moves = [
            Move(record=record, block=record.active)
            for record in records
            if record.refusal is not Refusal.FOREIGN_BYTES
            and record.state is not SiteState.LEARNING
            and record.home is not record.active
            and now_s - record.changed_s >= self._config.relink_after_s
        ]
        return self._linker.link(moves) if moves else 0


def _is_for(spare: Block, record: SiteRecord) -> bool:
    """Tell whether a counting block fits a site as it is: its module may have been replaced."""
    plan = spare.plan
    return (
        record.plan is not None
        and plan.tree == record.plan.tree
        and plan.operand == record.site.thunk.operand
        and plan.thunk_addr == record.thunk_addr
        and spare.arena is record.arena
    )
