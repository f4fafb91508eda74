# SPDX-License-Identifier: Apache-2.0
"""Keep up: look at promoted sites again, and change those that changed.

Misses are counted on the slow path all the time and are read every ``poll_s``
(``controller/misses.py``): a target that nobody guards shows at once, and the site
counts until it is known. A change of weights among guarded targets shows in no miss,
so each site is also re-sampled in short windows, in parts, one at a poll. How often
is the schedule's affair (``promote/schedule.py``), which bounds what all of it costs.

All of this is single stores to the arena. A site whose fast path
is switched off while it is changed (``controller/switching_off.py``) is not watched meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from optpoline.controller.config import Config
from optpoline.controller.deciding import fit_counts, history_of, keep_history, view_of
from optpoline.controller.growing import grow_full
from optpoline.controller.learning import TargetFilter, begin_sample, end_sample
from optpoline.controller.misses import MissWatch
from optpoline.controller.promotion import demote, promote_again
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import BranchSource, SiteState
from optpoline.controller.tables import Tables
from optpoline.controller.window_counts import is_last_block_telling, telling_counts, window_counts
from optpoline.learn.counting import UNKNOWN_SHARE_TO_GROW, SiteCounts
from optpoline.learn.pooling import ENOUGH_COUNT
from optpoline.patch.blocks import Block
from optpoline.promote.cost import CostModel
from optpoline.promote.policy import Action, Decision
from optpoline.promote.schedule import (
    next_interval,
    poll_interval,
    stretch_factor,
    unseen_interval,
)
from optpoline.promote.tree import stake_cycles

__all__ = ["Sampler"]

LOOK_S = 0.002
"""Time between looks at sites that count until they are known: at full slots, and whether
it is enough. A flipped dispatch site needs four looks, and 200 ms is all that a flip may take."""

MAX_DUE = 48
"""Sites that count at a poll because their time has come; some 0.2 ms of Python each. The
rest waits for the next poll, first come first served. Sites that miss do not wait."""

WORK_SHARE = 0.25
"""Share of what windows may cost (``overhead_ratio``) that may be the controller's own time, as
it is measured: a window of an interpreter's dispatch, 21 targets, takes 6 ms of it."""

WORK_SAVED_S = 0.1
"""CPU time that is saved up at most while there is less to do, and there is at first: sites are
looked at more often when they are new."""

REVIEW_EVERY_S = 2.0
"""Time between looks at all promoted sites: who is there, and what their windows cost."""

GOLDEN_RATIO = 0.618033988749895
"""Its multiples, whole parts left out, lie evenly in 0..1 however many there are."""

_STAKE_MODEL = CostModel()


PromoteAgain = Callable[[SiteRecord, Decision, float], bool]
"""Promotes a site anew; tells whether that is done. If not, ``Sampler.settled`` is called then."""


class Sampler:
    """Re-sampling of promoted sites; one a session.

    Args:
        config: Settings.
        may_guard: Tells which targets a block may branch to.
        tables: What sites know together.
        change: How sites are promoted anew.
    """

    def __init__(
        self,
        config: Config,
        may_guard: TargetFilter,
        tables: Tables,
        change: PromoteAgain = promote_again,
    ) -> None:
        """Keep what is needed."""
        self._config = config
        self._change = change
        self._schedule = config.schedule
        self._may_guard = may_guard
        self._tables = tables
        self._n_unseen = 0
        """Sites that were promoted by their tables, and have not run enough since."""
        self._spares: dict[int, Block] = {}
        self._watch = MissWatch()
        self._stretch = 1.0
        self._missing: set[int] = set()
        self._last_poll_s = time.monotonic()
        self._work_left_s = WORK_SAVED_S
        self._next_review_s = 0.0
        self._changed_s = time.monotonic()
        """When any site was promoted, promoted anew or demoted last."""

    @property
    def spares(self) -> tuple[Block, ...]:
        """The counting blocks kept for the next window of each site."""
        return tuple(self._spares.values())

    @property
    def stretch(self) -> float:
        """By what the intervals are longer than they would be without a bound on overhead."""
        return self._stretch

    def schedule(self, records: Collection[SiteRecord], now_s: float) -> None:
        """Put newly promoted sites on the schedule, spread over their first interval."""
        new = [
            (number, record)
            for number, record in enumerate(records)
            if record.state is SiteState.PROMOTED and record.next_sample_s == 0.0
        ]
        self._n_unseen = sum(_is_unseen(record) for record in records)
        for _, record in new:
            record.sample_every_s = self._interval_s(record, now_s)
            self._changed_s = now_s
        # The bound on overhead holds for their first interval as well.
        self._stretch = self._stretch_of(records)
        for number, record in new:
            share = 1.0 - number * GOLDEN_RATIO % 1.0
            record.next_sample_s = now_s + share * self._stretch * record.sample_every_s
        self._review(records, now_s)

    def _interval_s(
        self, record: SiteRecord, now_s: float, *, action: Action = Action.KEEP, hold_s: float = 0.0
    ) -> float:
        """Return a site's next interval, before stretching."""
        if _is_unseen(record):
            return unseen_interval(self._schedule, self._n_unseen)
        stake = 0.0 if record.plan is None else stake_cycles(record.plan.tree, _STAKE_MODEL)
        return next_interval(
            self._schedule,
            rate_hz=record.rate_hz or 0.0,
            stake_cycles=stake,
            since_change_s=now_s - record.changed_s,
            n_changes=record.n_changes,
            wants_confirmation=action is Action.CONFIRM,
            hold_s=hold_s,
        )

    def _review(self, records: Iterable[SiteRecord], now_s: float) -> None:
        """Take in which sites are promoted, and what looking at them costs."""
        self._watch.use(records)
        self._next_review_s = now_s + REVIEW_EVERY_S
        self._stretch = self._stretch_of(self._watch.records)

    def _stretch_of(self, records: Iterable[SiteRecord]) -> float:
        """Return by what intervals are to be longer, so that all windows cost what they may."""
        return stretch_factor(
            self._schedule,
            (
                (record.rate_hz or 0.0, record.sample_every_s)
                for record in records
                if record.state is SiteState.PROMOTED
            ),
        )

    def pause_s(self, now_s: float) -> float:
        """Return the time to the next poll."""
        return poll_interval(self._config.poll_s, now_s - self._changed_s)

    def jump_misses_hz(self) -> float:
        """Return how often all promoted jump sites together missed at the last poll, a second."""
        return self._watch.jump_misses_hz()

    def poll(self, records: Collection[SiteRecord], now_s: float) -> list[SiteRecord]:
        """Read miss counters; return promoted sites that are due for a window."""
        if now_s >= self._next_review_s:
            self._review(records, now_s)
        elapsed_s = max(1e-6, now_s - self._last_poll_s)
        self._last_poll_s = now_s
        schedule = self._schedule
        earned_s = elapsed_s * WORK_SHARE * schedule.overhead_ratio
        self._work_left_s = min(WORK_SAVED_S, self._work_left_s + earned_s)
        # Misses cost more than looking at them does; all else can wait.
        missing, due = self._watch.find_due(
            now_s,
            elapsed_s,
            schedule.miss_rate_floor_hz,
            schedule.miss_growth,
            by_clock=self._work_left_s > 0.0,
        )
        self._missing = {id(record) for record in missing}
        return [*missing, *due[:MAX_DUE]]

    def sample(self, due: list[SiteRecord]) -> tuple[int, int]:
        """Count at the due sites, and decide where a window is complete.

        A site that misses counts until it is known; others count for one part.

        Returns:
            (sites promoted anew, sites demoted).
        """
        begin_s = time.thread_time()
        try:
            return self._sample(due)
        finally:
            worked_s = time.thread_time() - begin_s
            self._work_left_s = max(-WORK_SAVED_S, self._work_left_s - worked_s)

    def _sample(self, due: list[SiteRecord]) -> tuple[int, int]:
        """Do what ``sample`` says."""
        for record in due:
            self._begin(record)
        counting = [record for record in due if record.counting is not None]
        surprised = [record for record in counting if id(record) in self._missing]
        calm = [record for record in counting if id(record) not in self._missing]
        surprised += self._count_parts(calm)
        if surprised:
            # Not a matter of chance which part of the program ran: see it all now.
            self._count_until_known(surprised)
            now_s = time.monotonic()
            for record in surprised:
                # What earlier parts of the window counted was before the surprise.
                record.sampled = None
                record.n_parts = self._schedule.n_parts
                if record.counting is not None:
                    end_sample(record, now_s)
        n_again = n_demoted = 0
        judged = [record for record in counting if record.n_parts >= self._schedule.n_parts]
        for record in judged:
            again, demoted = self._decide(record, time.monotonic())
            n_again += again
            n_demoted += demoted
        self._watch.judged(judged)
        if n_again or n_demoted or any(record.off is not None for record in judged):
            self._changed_s = time.monotonic()
            self._watch.use(self._watch.records)
        return n_again, n_demoted

    def _begin(self, record: SiteRecord) -> None:
        """Redirect one site to its counting block, the one for its present tree."""
        spare = self._spares.get(record.site.addr)
        if spare is not None and not _is_for(spare, record):
            spare = None
        block = begin_sample(record, spare, time.monotonic(), self._schedule.max_slots)
        if block is not None:
            self._spares[record.site.addr] = block
        else:
            # No room for it: not at the next poll again.
            record.next_sample_s = time.monotonic() + self._schedule.sample_every_max_s
            self._watch.judged([record])

    def _count_parts(self, records: Sequence[SiteRecord]) -> list[SiteRecord]:
        """Let sites count for a part each; return those that are surprised, still counting."""
        begin_s = time.monotonic()
        part_s = self._schedule.part_s
        ends = [(begin_s + part_s(record.rate_hz or 0.0), record) for record in records]
        ends.sort(key=lambda end: end[0])
        surprised: list[SiteRecord] = []
        for end_s, record in ends:
            _sleep_until(end_s)
            if record.counting is None:
                continue  # refused on the way
            if self._is_surprised(record):
                surprised.append(record)
                continue
            end_sample(record, time.monotonic())
            record.n_parts += 1
        return surprised

    def _count_until_known(self, records: Sequence[SiteRecord]) -> None:
        """Let sites count until their targets are known, for a window's length at most."""
        end_s = time.monotonic() + self._schedule.sample_s
        while (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(LOOK_S, left_s))
            grow_full(records, self._may_guard, self._schedule.max_slots)
            if all(self._is_known(record) for record in records):
                return

    def _is_known(self, record: SiteRecord) -> bool:
        """Tell whether a site has counted enough, and nearly all of it by target."""
        if record.counting is None:
            return True
        if not is_last_block_telling(record):
            return False
        counts, _ = telling_counts(record, time.monotonic())
        return (
            counts.total >= self._schedule.enough_count
            and counts.n_unknown <= UNKNOWN_SHARE_TO_GROW * counts.total
        )

    def _is_surprised(self, record: SiteRecord) -> bool:
        """Tell whether this part alone shows that the site's tree is wrong."""
        view = view_of(
            record,
            history_of(record),
            window_counts(record),
            window_s=self._schedule.sample_s,
            now_s=time.monotonic(),
        )
        return self._config.policy.is_surprising(view)

    def _decide(self, record: SiteRecord, now_s: float) -> tuple[int, int]:
        """Act on what a window counted; return (promoted anew, demoted)."""
        window = record.sampled
        record.sampled = None
        record.n_parts = 0
        record.next_sample_s = now_s + self._schedule.sample_every_max_s
        if window is None or record.plan is None or record.state is not SiteState.PROMOTED:
            return 0, 0
        counts = fit_counts(record, window, self._may_guard)
        if record.unsafe_targets:
            return 0, 1
        return self._act(record, counts, now_s)

    def _act(self, record: SiteRecord, counts: SiteCounts, now_s: float) -> tuple[int, int]:
        """Ask the policy and do what it says; return (promoted anew, demoted)."""
        history = history_of(record)
        if record.source is BranchSource.TABLE and counts.total >= ENOUGH_COUNT:
            # From now on it is known by what it does itself.
            record.source = BranchSource.SITE
            history = replace(history, profile=None)
        if record.source is BranchSource.SITE:
            self._tables.note(record, counts)
        window_s = counts.total / record.rate_hz if record.rate_hz else self._schedule.sample_s
        view = view_of(record, history, counts, window_s=window_s, now_s=now_s)
        decision = self._config.policy.decide(view)
        is_again = is_demoted = False
        match decision.action:
            case Action.PROMOTE:
                is_again = self._change(record, decision, now_s)
            case Action.DEMOTE:
                demote(record, decision, now_s)
                is_demoted = True
            case _:
                keep_history(record, history.after(decision, now_s))
        self._plan_next(record, decision, now_s)
        return int(is_again), int(is_demoted)

    def _plan_next(self, record: SiteRecord, decision: Decision, now_s: float) -> None:
        """Say when a site is looked at again that was decided about."""
        record.hold_until_s = now_s + decision.hold_s
        action = decision.action
        record.sample_every_s = self._interval_s(
            record, now_s, action=action, hold_s=decision.hold_s
        )
        stretch = 1.0 if action is Action.CONFIRM else self._stretch
        record.next_sample_s = now_s + stretch * record.sample_every_s

    def settled(
        self, records: Iterable[SiteRecord], changed: Iterable[SiteRecord], now_s: float
    ) -> None:
        """Take in that sites do what they did in other blocks by now, or something new.

        Args:
            records: The sites.
            changed: Those that were promoted anew.
            now_s: CLOCK_MONOTONIC, seconds.
        """
        for record in changed:
            self._plan_next(record, Decision(action=Action.PROMOTE), now_s)
            self._changed_s = now_s
        self._watch.use(records)


def _is_unseen(record: SiteRecord) -> bool:
    """Tell whether a promoted site has its table's tree, and has not run enough since."""
    return record.state is SiteState.PROMOTED and record.source is BranchSource.TABLE


def _sleep_until(end_s: float) -> None:
    """Sleep until a time of CLOCK_MONOTONIC."""
    left_s = end_s - time.monotonic()
    if left_s > 0:
        time.sleep(left_s)


def _is_for(spare: Block, record: SiteRecord) -> bool:
    """Tell whether a counting block fits a site as it is: its module may have been replaced."""
    plan = spare.plan
    return (
        record.plan is not None
        and plan.tree == record.plan.tree
        and plan.operand == record.site.thunk.operand
        and plan.load == record.site.load
        and plan.thunk_addr == record.thunk_addr
        and spare.arena is record.arena
    )
