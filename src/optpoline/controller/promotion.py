# SPDX-License-Identifier: Apache-2.0
"""Promotion: turn decisions into dense blocks and link sites to them.

All promoted blocks of one batch are written side by side, hottest first, so
that what runs together lies together; a site's text leads straight to its
block. Sites that are not worth a block go back to their baseline in the same
stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from optpoline.controller.learning import TargetFilter
from optpoline.controller.linker import Linker, Move
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.errors import ArenaError, EncodeRangeError
from optpoline.learn.counting import SiteCounts
from optpoline.model import Addr, BlockPlan
from optpoline.patch.blocks import Block, add_block, redirect
from optpoline.promote.policy import Action, Decision, Policy, SiteHistory, SiteView
from optpoline.promote.tree import PlannedTree
from optpoline.x86.blocks import choose_base

__all__ = [
    "FIRST_SLACK_RATIO",
    "NEXT_SLACK_RATIO",
    "demote",
    "fit_counts",
    "history_of",
    "keep_history",
    "plan_block",
    "promote_again",
    "promote_first",
    "view_of",
]


def fit_counts(record: SiteRecord, counts: SiteCounts, may_guard: TargetFilter) -> SiteCounts:
    """Return counts with targets that must not be guarded counted as unknown."""
    kept = tuple(c for c in counts.counts if may_guard(record, c.target))
    if len(kept) == len(counts.counts):
        return counts
    lost = sum(c.hit_count for c in counts.counts) - sum(c.hit_count for c in kept)
    return replace(counts, counts=kept, n_unknown=counts.n_unknown + lost)


FIRST_SLACK_RATIO = 0.125
"""Room behind a first promoted block, as a share of its size: a later one of the site shall fit
there (``controller/settling.py``). That of one guard has none: small blocks lie packed."""

NEXT_SLACK_RATIO = 1.5
"""The same of later ones: the site has changed before. Of all where a site can only be changed
in its place (``controller/switching_off.py``)."""


def plan_block(record: SiteRecord, plan: PlannedTree, miss_count_addr: Addr | None) -> BlockPlan:
    """Return what a site's promoted block does.

    Args:
        record: The site.
        plan: Its tree.
        miss_count_addr: The cell that its misses are counted in.
    """
    is_operand_dead = record.operand_targets.isdisjoint(plan.targets)
    return BlockPlan(
        operand=record.site.thunk.operand,
        tree=plan.tree,
        thunk_addr=record.thunk_addr,
        miss_count_addr=miss_count_addr,
        base=choose_base(plan.targets) if is_operand_dead else None,
        load=record.site.load,
    )


def add_promoted_block(record: SiteRecord, plan: PlannedTree, slack_ratio: float) -> Block | None:
    """Write a site's promoted block; None if the arena has no room for it."""
    try:
        return add_block(
            record.arena,
            plan_block(record, plan, record.arena.add_counters(1)),
            site_addr=record.site.addr,
            slack_ratio=slack_ratio,
        )
    except (ArenaError, EncodeRangeError):
        return None


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


def promote_first(
    records: Sequence[SiteRecord],
    *,
    policy: Policy,
    linker: Linker,
    may_guard: TargetFilter,
    now_s: float,
    promote_plain: bool = False,
    slack_ratio: float = FIRST_SLACK_RATIO,
) -> int:
    """Promote what is worth it after a first window; the rest gets its baseline back.

    Args:
        records: The sites.
        policy: Decides.
        linker: Changes the text.
        may_guard: Tells which targets a block may branch to.
        now_s: CLOCK_MONOTONIC, seconds.
        promote_plain: See ``Config``.
        slack_ratio: Room behind each block, as a share of its size.

    Returns:
        How many sites were promoted.
    """
    hottest = sorted(records, key=lambda record: -(record.rate_hz or 0.0))
    all_hz = sum(record.rate_hz or 0.0 for record in hottest)
    hotter_hz = 0.0
    moves: list[Move] = []
    n_promoted = 0
    for record in hottest:
        hotter_ratio = hotter_hz / all_hz if all_hz else 0.0
        block = None
        if promote_plain or not record.site.is_undeclared_plain:
            block = _promote_one(record, policy, may_guard, hotter_ratio, slack_ratio, now_s)
        n_promoted += block is not None
        moves.append(Move(record=record, block=block))
        hotter_hz += record.rate_hz or 0.0
    linker.link(moves)
    return n_promoted


def _promote_one(
    record: SiteRecord,
    policy: Policy,
    may_guard: TargetFilter,
    hotter_ratio: float,
    slack_ratio: float,
    now_s: float,
) -> Block | None:
    """Write the block of one site if its first window says so."""
    if record.counts is None or record.state is SiteState.REFUSED:
        return None
    counts = fit_counts(record, record.counts, may_guard)
    if record.unsafe_targets:
        return None
    history = history_of(record)
    if history.current is not None or history.profile is not None:
        history = replace(history, current=None, profile=None)
    decision = policy.decide(
        view_of(
            record,
            history,
            counts,
            window_s=record.window_s,
            now_s=now_s,
            hotter_ratio=hotter_ratio,
        )
    )
    if decision.action is not Action.PROMOTE or decision.plan is None:
        return None
    block = add_promoted_block(record, decision.plan, slack_ratio)
    if block is not None:
        _settle(record, block)
        keep_history(record, history.after(decision, now_s))
    return block


def _settle(record: SiteRecord, block: Block) -> None:
    """Note that ``block`` does the site's work from now on."""
    record.active = block
    record.state = SiteState.PROMOTED
    record.n_grown = 0


def promote_again(record: SiteRecord, decision: Decision, now_s: float) -> bool:
    """Re-promote a site without a stop: its present block jumps to the new one.

    Returns:
        Whether there was room; if not, the site stays as it is.
    """
    block = (
        None
        if decision.plan is None
        else add_promoted_block(record, decision.plan, NEXT_SLACK_RATIO)
    )
    if block is None or record.home is None or record.active is None:
        record.profile = decision.profile
        record.n_confirmed = 0
        return False
    old = record.active
    redirect(old, block.addr)
    if record.home is not old:
        redirect(record.home, block.addr)
    _settle(record, block)
    keep_history(record, history_of(record).after(decision, now_s))
    record.n_relearned += 1
    return True


def demote(record: SiteRecord, decision: Decision, now_s: float) -> None:
    """Lead a promoted site back to its thunk without a stop; text follows later."""
    for block in (record.active, record.home):
        if block is not None:
            redirect(block, record.thunk_addr)
    record.active = None
    record.state = SiteState.BASELINE
    record.next_sample_s = 0.0
    keep_history(record, history_of(record).after(decision, now_s))
