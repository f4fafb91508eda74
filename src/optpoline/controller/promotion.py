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
from optpoline.model import BlockPlan
from optpoline.patch.blocks import Block, add_block, redirect
from optpoline.promote.policy import Action, Policy
from optpoline.promote.tree import PlannedTree
from optpoline.x86.blocks import choose_base

__all__ = ["demote", "fit_counts", "promote_again", "promote_first"]


def fit_counts(record: SiteRecord, counts: SiteCounts, may_guard: TargetFilter) -> SiteCounts:
    """Return counts with targets that must not be guarded counted as unknown."""
    kept = tuple(c for c in counts.counts if may_guard(record, c.target))
    if len(kept) == len(counts.counts):
        return counts
    lost = sum(c.hit_count for c in counts.counts) - sum(c.hit_count for c in kept)
    return replace(counts, counts=kept, n_unknown=counts.n_unknown + lost)


def add_promoted_block(record: SiteRecord, plan: PlannedTree) -> Block | None:
    """Write a site's promoted block; None if the arena has no room for it."""
    is_operand_dead = record.operand_targets.isdisjoint(plan.targets)
    try:
        return add_block(
            record.arena,
            BlockPlan(
                operand=record.site.thunk.operand,
                tree=plan.tree,
                thunk_addr=record.thunk_addr,
                miss_count_addr=record.arena.add_counters(1),
                base=choose_base(plan.targets) if is_operand_dead else None,
            ),
            site_addr=record.site.addr,
        )
    except (ArenaError, EncodeRangeError):
        return None


def _settle(record: SiteRecord, block: Block, plan: PlannedTree, now_s: float) -> None:
    """Note that ``block`` does the site's work from now on."""
    record.active = block
    record.plan = plan
    record.state = SiteState.PROMOTED
    record.misses_seen = 0
    record.changed_s = now_s
    record.n_confirmed = 0
    record.n_grown = 0


def promote_first(
    records: Sequence[SiteRecord],
    *,
    policy: Policy,
    linker: Linker,
    may_guard: TargetFilter,
    now_s: float,
) -> int:
    """Promote what is worth it after a first window; the rest gets its baseline back.

    Returns:
        How many sites were promoted.
    """
    hottest = sorted(records, key=lambda record: -(record.rate_hz or 0.0))
    moves: list[Move] = []
    n_promoted = 0
    for record in hottest:
        block = None
        if record.counts is not None and record.state is not SiteState.REFUSED:
            counts = fit_counts(record, record.counts, may_guard)
            if not record.unsafe_targets:
                decision = policy.decide_first(counts, record.window_s)
                if decision.action is Action.PROMOTE and decision.plan is not None:
                    block = add_promoted_block(record, decision.plan)
                    if block is not None:
                        _settle(record, block, decision.plan, now_s)
                        record.profile = decision.profile
                        n_promoted += 1
        moves.append(Move(record=record, block=block))
    linker.link(moves)
    return n_promoted


def promote_again(record: SiteRecord, plan: PlannedTree, now_s: float) -> bool:
    """Re-promote a site without a stop: its present block jumps to the new one.

    Returns:
        Whether there was room; if not, the site stays as it is.
    """
    block = add_promoted_block(record, plan)
    if block is None or record.home is None or record.active is None:
        return False
    old = record.active
    redirect(old, block.addr)
    if record.home is not old:
        redirect(record.home, block.addr)
    _settle(record, block, plan, now_s)
    record.n_relearned += 1
    return True


def demote(record: SiteRecord, now_s: float) -> None:
    """Lead a promoted site back to its thunk without a stop; text follows later."""
    for block in (record.active, record.home):
        if block is not None:
            redirect(block, record.thunk_addr)
    record.active = None
    record.plan = None
    record.profile = None
    record.state = SiteState.BASELINE
    record.changed_s = now_s
