# SPDX-License-Identifier: Apache-2.0
"""Promotion: turn decisions into dense blocks and link sites to them.

All promoted blocks of one batch are written side by side, hottest first, so
that what runs together lies together; a site's text leads straight to its
block. Sites that are not worth a block go back to their baseline in the same
stop.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from optpoline.controller.deciding import (
    FirstDecider,
    first_history_of,
    history_of,
    keep_history,
)
from optpoline.controller.learning import TargetFilter
from optpoline.controller.linker import Linker, Move
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import BranchSource, SiteState
from optpoline.controller.tables import Tables
from optpoline.errors import ArenaError, EncodeRangeError
from optpoline.model import Addr, BlockPlan
from optpoline.patch.blocks import Block, add_block, redirect
from optpoline.promote.policy import Decision, Policy
from optpoline.promote.tree import PlannedTree
from optpoline.x86.blocks import choose_base

__all__ = [
    "FIRST_SLACK_RATIO",
    "NEXT_SLACK_RATIO",
    "demote",
    "plan_block",
    "promote_again",
    "promote_first",
]

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


def promote_first(
    records: Sequence[SiteRecord],
    *,
    policy: Policy,
    linker: Linker,
    may_guard: TargetFilter,
    guard_kin: Callable[[SiteRecord], Hashable],
    now_s: float,
    promote_plain: bool = False,
    slack_ratio: float = FIRST_SLACK_RATIO,
    tables: Tables | None = None,
) -> int:
    """Promote what is worth it after a first window; the rest gets its baseline back.

    Sites may be among them that were not learned, but have a table of others that were. What a
    site counted before, and was decided on by, says nothing again.

    Args:
        records: The sites.
        policy: Decides.
        linker: Changes the text.
        may_guard: Tells which targets a block may branch to.
        guard_kin: Returns what is the same for sites of which that says the same.
        now_s: CLOCK_MONOTONIC, seconds.
        promote_plain: See ``Config``.
        slack_ratio: Room behind each block, as a share of its size.
        tables: What sites know together; takes in what these counted.

    Returns:
        How many sites lead to their new blocks by now.
    """
    tables = Tables() if tables is None else tables
    for record in records:
        if record.news is not None:
            tables.note(record, record.news)
    decider = FirstDecider(policy, may_guard, guard_kin, tables, now_s)
    hottest = sorted(records, key=lambda record: -_news_hz(record))
    all_hz = sum(map(_news_hz, hottest))
    hotter_hz = 0.0
    moves: list[Move] = []
    later: list[tuple[SiteRecord, Decision]] = []
    for record in hottest:
        hotter_ratio = hotter_hz / all_hz if all_hz else 0.0
        hotter_hz += _news_hz(record)
        decision = None
        if promote_plain or not record.site.is_undeclared_plain:
            decision = decider.decide(record, hotter_ratio)
        record.is_news = False
        if decision is not None and record.source is BranchSource.TABLE:
            later.append((record, decision))
            continue
        block = None if decision is None else _promote(record, decision, slack_ratio, now_s)
        moves.append(Move(record=record, block=block))
    linker.link(moves)
    n_promoted = _count_promoted(moves)
    # Hot sites count no more by now. For these nobody waits: they have hardly run.
    moves = [
        Move(record=record, block=_promote(record, decision, slack_ratio, now_s))
        for record, decision in later
    ]
    linker.link(moves)
    return n_promoted + _count_promoted(moves)


def _news_hz(record: SiteRecord) -> float:
    """Return a site's branches a second in a window that nothing was decided by yet."""
    return record.rate_hz or 0.0 if record.is_news else 0.0


def _count_promoted(moves: Sequence[Move]) -> int:
    """Return how many sites were led to the blocks that they were to have, by text or head."""
    return sum(
        move.block is not None
        and move.record.active is move.block
        and move.record.home is not None
        and move.record.state is SiteState.PROMOTED
        for move in moves
    )


def _promote(
    record: SiteRecord, decision: Decision, slack_ratio: float, now_s: float
) -> Block | None:
    """Write the block of one site that is to be promoted; None if there is no room."""
    try:
        # Nothing, for a site that has had a block.
        record.arena.journal(record.site)
        record.make_thunk()
    except (ArenaError, EncodeRangeError):
        return None
    block = None
    if decision.plan is not None:
        block = add_promoted_block(record, decision.plan, slack_ratio)
    if block is not None:
        _settle(record, block)
        record.source = record.source or BranchSource.SITE
        keep_history(record, first_history_of(record).after(decision, now_s))
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
    record.source = BranchSource.SITE  # its table would promote it again
    record.next_sample_s = 0.0
    keep_history(record, history_of(record).after(decision, now_s))
