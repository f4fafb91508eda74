# SPDX-License-Identifier: Apache-2.0
"""Row ``calls``: threads under signals, while blocks are retired and reused all the time.

Sixteen threads branch through changing pointers and check every result
(``torture/targets/calls.c``); signal handlers leave program counters inside blocks for
long, on stacks that nobody is on. A session with short intervals re-promotes every site
again and again. Memory of retired blocks is full of int3 until it is reused: a thread that
comes back too late dies of SIGTRAP, and one that meets another block gives a wrong result.
"""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass, field

import optpoline
from optpoline.promote.policies.adaptive import AdaptivePolicy
from torture.build import build_target
from torture.errors import TortureError
from torture.footprint import Footprint
from torture.program import NICE, Program, TargetDied
from torture.row import Figure, Outcome, Scale

__all__ = ["ROW", "churn_config"]

_THREADS = 16
_SIGNALS_HZ = 1000
_FEWEST_SIGNALS_HZ = 900
_BRANCHES = 10**9
_BLOCKS = 10_000
_GRACE_PERIODS = 200
_SESSIONS = 6
_SLICE_S = 0.5
_PATIENCE = 4.0
"""A run may take so many times what it should; then its figures are what they are."""

_ENDS = (optpoline.DetachOutcome.CLEAN, optpoline.DetachOutcome.ARENA_LEFT)
"""A thread that a handler keeps in a block keeps the arena mapped as well; by rights."""


def churn_config() -> optpoline.Config:
    """Return settings that make a session change its mind as often as it can."""
    policy = AdaptivePolicy(
        min_count=32,
        clear_gain_cycles=1.0,
        narrow_gain_cycles=0.05,
        narrow_gain_ratio=0.0,
        n_confirmations=1,
        calm_ratio=1.0,
        followed_ratio=1.0,
        n_free_changes=1_000_000,
    )
    return optpoline.Config(
        learn_s=0.3,
        relearn_s=0.1,
        sample_s=0.016,
        sample_every_s=0.02,
        sample_every_max_s=0.05,
        overhead_ratio=100.0,
        poll_s=0.01,
        relink_after_s=0.3,
        reclaim_after_size=4096,
        reclaim_every_s=0.05,
        reclaim_duty=1.0,
        policy=policy,
    )


@dataclass(slots=True, kw_only=True)
class _Sum:
    """What the sessions of a run came to, added up."""

    counts: dict[str, int] = field(default_factory=dict)
    retired: int = 0
    reclaimed: int = 0
    reused: int = 0
    grace_periods: int = 0
    poisoned: int = 0
    relearned: int = 0
    stops: int = 0
    stop_ms_max: float = 0.0
    outcomes: list[optpoline.DetachOutcome] = field(default_factory=list)
    death: TargetDied | None = None
    changed: list[str] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)

    def add(self, summary: optpoline.Summary) -> None:
        """Add a session."""
        self.retired += summary.reclaim.blocks_retired
        self.reclaimed += summary.reclaim.blocks_reclaimed
        self.reused += summary.reclaim.blocks_reused
        self.grace_periods += summary.reclaim.grace_periods
        self.poisoned += summary.reclaim.bytes_poisoned
        self.relearned += summary.relearned
        self.stops += summary.stops
        self.stop_ms_max = max(self.stop_ms_max, summary.stop_ms_max)
        self.notes.update(summary.notes)
        if summary.reclaim.is_search_refused:
            self.notes.add("nothing is reused: there is too much memory to search for contexts")
        if summary.reclaim.blocks_reclaimed == 0 and summary.reclaim.holders:
            holders = ", ".join(map(str, summary.reclaim.holders))
            self.notes.add(f"nothing was reclaimed in a session: threads {holders} held it up")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Need:
    """What a run has to reach, as a whole or up to some session."""

    branches: int
    blocks: int
    grace_periods: int

    @classmethod
    def of(cls, scale: Scale) -> _Need:
        """Scale the bars."""
        return cls(
            branches=scale.of(_BRANCHES),
            blocks=scale.of(_BLOCKS),
            grace_periods=scale.of(_GRACE_PERIODS),
        )

    def part(self, share: float) -> _Need:
        """Return what is to be reached by the time that this share is done."""
        return _Need(
            branches=math.ceil(self.branches * share),
            blocks=math.ceil(self.blocks * share),
            grace_periods=math.ceil(self.grace_periods * share),
        )

    def is_reached(self, total: _Sum, summary: optpoline.Summary) -> bool:
        """Tell whether the sessions before and the present one reach it."""
        now = summary.reclaim
        return (
            total.counts.get("branches", 0) >= self.branches
            and min(total.reclaimed + now.blocks_reclaimed, total.reused + now.blocks_reused)
            >= self.blocks
            and total.grace_periods + now.grace_periods >= self.grace_periods
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CallsRow:
    """See the module."""

    name: str = "calls"
    about: str = "16 threads call through changing pointers under 1,000 signals/s"
    quick_s: float = 20.0
    full_s: float = 300.0

    def run(self, scale: Scale) -> Outcome:
        """See ``Row``."""
        begin_s = time.monotonic()
        need = _Need.of(scale)
        program = str(build_target("calls", "-Wl,-z,now"))
        total = _Sum()
        with Program(
            [program, str(_THREADS), str(_SIGNALS_HZ), str(scale.seed)], nice=NICE
        ) as target:
            ready_s = time.monotonic()
            before = Footprint.of(target.pid)
            limit_s = ready_s + _PATIENCE * self.full_s * max(scale.share, 0.05)
            n_sessions = scale.of(_SESSIONS, least=2)
            try:
                for number in range(1, n_sessions + 1):
                    _run_session(target, total, need.part(number / n_sessions), limit_s)
                    total.changed += _changed_text(before, Footprint.of(target.pid))
                total.counts = target.ask_numbers("counts")
                target_s = time.monotonic() - ready_s
                target.finish()
            except TargetDied as death:
                total.death = death
                target_s = time.monotonic() - ready_s
        return Outcome(
            row=self.name,
            scale=f"{n_sessions} sessions, {need.branches:,} of {_BRANCHES:,} branches, "
            f"{need.blocks:,} of {_BLOCKS:,} blocks",
            figures=tuple(_figures(total, need, target_s)),
            notes=tuple(_notes(total)),
            seconds=time.monotonic() - begin_s,
        )


def _run_session(target: Program, total: _Sum, need: _Need, limit_s: float) -> None:
    """Attach, change everything until enough was reclaimed, let go.

    Raises:
        TargetDied: if the target did.
        TortureError: if optpoline failed.
    """
    latest: optpoline.Summary | None = None
    try:
        with optpoline.attach(target.pid, config=churn_config()) as session:
            session.learn()
            session.promote()
            while time.monotonic() < limit_s:
                session.watch(_SLICE_S)
                total.counts = target.ask_numbers("counts")
                latest = session.summary()
                if need.is_reached(total, latest):
                    break
            result = session.detach()
            latest = session.summary()
        total.outcomes.append(result.outcome)
        total.notes.update(result.notes)
    except optpoline.OptpolineError as error:
        # If it is because the target died, that is what there is to tell.
        target.ask("counts")
        raise TortureError(f"optpoline gave up: {error}") from error
    finally:
        if latest is not None:
            total.add(latest)


def _changed_text(before: Footprint, after: Footprint) -> list[str]:
    """Say which text is not as it was."""
    return [
        f"text of {path} at {start:#x} is not as it was"
        for (start, end, path), digest in before.text.items()
        if after.text.get((start, end, path)) != digest
    ]


def _figures(total: _Sum, need: _Need, target_s: float) -> list[Figure]:
    """Hold what was reached against the bars."""
    counts = total.counts
    wrong, branches = counts.get("wrong", 0), counts.get("branches", 0)
    signals_hz = counts.get("sent", 0) / target_s
    recycled = min(total.reclaimed, total.reused)
    n_trapped = int(total.death is not None and total.death.signal == signal.SIGTRAP)
    bad_ends = [outcome.value for outcome in total.outcomes if outcome not in _ENDS]
    figures = [
        _zero("wrong results", wrong),
        _at_least("indirect branches", branches, need.branches),
        _at_least("blocks retired and reused", recycled, need.blocks),
        _at_least("grace periods", total.grace_periods, need.grace_periods),
        _zero("poisoned memory executed", n_trapped),
        Figure(
            name="reuse of poisoned memory",
            value=f"{total.reused:,} of {total.reclaimed:,} blocks, {total.poisoned:,} bytes",
            bar="> 0",
            is_met=total.reused > 0 and total.poisoned > 0,
        ),
        _zero("target failures", int(total.death is not None)),
        _zero("text changed after detach", len(total.changed)),
        _zero("sessions not let go", len(bad_ends)),
        _at_least("signals per second", int(signals_hz), _FEWEST_SIGNALS_HZ),
    ]
    kinds = ("blocked", "jumps", "switches", "alt_stack")
    return figures + [_at_least(f"handlers: {kind}", counts.get(kind, 0), 1) for kind in kinds]


def _zero(name: str, value: int) -> Figure:
    """Return a figure that has to be 0."""
    return Figure(name=name, value=f"{value:,}", bar="0", is_met=value == 0)


def _at_least(name: str, value: int, bar: int) -> Figure:
    """Return a figure that has to reach a number."""
    return Figure(name=name, value=f"{value:,}", bar=f"≥ {bar:,}", is_met=value >= bar)


def _notes(total: _Sum) -> list[str]:
    """Tell what the figures do not."""
    ends = ", ".join(outcome.value for outcome in total.outcomes) or "none"
    notes = [
        f"{total.relearned:,} re-promotions, {total.retired:,} blocks retired, "
        f"{total.stops} stops, the longest {total.stop_ms_max:.1f} ms, on {os.cpu_count()} CPUs",
        f"sessions ended: {ends}",
    ]
    if total.death is not None:
        notes.append(str(total.death))
    return notes + sorted(set(total.changed)) + sorted(total.notes)


ROW = CallsRow()
