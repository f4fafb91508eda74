# SPDX-License-Identifier: Apache-2.0
"""From counts to decisions: what a site's block should be after a window.

A policy is a pure function of counts; it knows no clock, no block and no
address of ours, so that policies can be replayed against recorded counts and
compared. ``CostPolicy`` is the default: it promotes where the cost model says
cycles are saved, and changes its mind only where that saves clearly more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from optpoline.learn.counting import SiteCounts, blend
from optpoline.promote.cost import CostModel
from optpoline.promote.tree import PlannedTree, plan_tree, tree_cost

__all__ = ["Action", "CostPolicy", "Decision", "Policy"]


class Action(Enum):
    """What to do with a site after a window."""

    PROMOTE = "promote"
    """Build a block from the plan: the first one, or a better one."""
    CONFIRM = "confirm"
    """A better plan exists by a narrow margin: look again soon."""
    KEEP = "keep"
    """Leave it as it is."""
    DEMOTE = "demote"
    """Back to the thunk: nothing dominates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """An action, and what it rests on.

    Attributes:
        action: What to do.
        plan: The tree it is about, where there is one.
        profile: What is known of the site's targets by now, the window included.
    """

    action: Action
    plan: PlannedTree | None = None
    profile: SiteCounts | None = None


class Policy(Protocol):
    """When to promote, re-promote and demote."""

    def decide_first(self, counts: SiteCounts, window_s: float) -> Decision:
        """Decide about a site that leads to its thunk (PROMOTE or KEEP)."""

    def decide_again(
        self,
        current: PlannedTree,
        profile: SiteCounts | None,
        window: SiteCounts,
        n_confirmed: int,
    ) -> Decision:
        """Decide about a promoted site.

        Args:
            current: The tree it has.
            profile: What was known before, or None.
            window: What the last window counted.
            n_confirmed: CONFIRMs before, in a row.
        """

    def is_surprising(self, current: PlannedTree, window: SiteCounts) -> bool:
        """Tell whether a window alone shows that the tree is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostPolicy:
    """Promote what saves cycles; change what saves clearly more, twice in a row.

    Attributes:
        model: Cycles of everything.
        min_count: Branches below which a window says nothing about weights:
            shares are then known to about one part in sixteen (1/sqrt(n)).
        clear_gain_cycles: Cost per branch of unguarded targets that makes a window
            surprising and is acted on at once; a flipped target costs a whole
            retpoline, far above it.
        narrow_gain_cycles: Gain per branch below which nothing is done.
        narrow_gain_ratio: The same as a share of the present cost; hysteresis
            against trees that differ only in the noise of the window.
        n_confirmations: Windows in a row that must agree on a narrow gain.
        calm_ratio: Weight of a window in the profile. Programs have phases far
            shorter than the time between windows (an interpreter's inner loops):
            one window of 20 ms is a poor picture of what comes next.
        surprised_ratio: The same for a window that shows unguarded targets; the
            old ones keep some weight, so that phases in turn settle on both.
    """

    model: CostModel = field(default_factory=CostModel)
    min_count: int = 256
    clear_gain_cycles: float = 3.0
    narrow_gain_cycles: float = 0.3
    narrow_gain_ratio: float = 0.1
    n_confirmations: int = 2
    calm_ratio: float = 0.2
    surprised_ratio: float = 0.5

    def decide_first(self, counts: SiteCounts, window_s: float) -> Decision:
        """See ``Policy``."""
        plan = plan_tree(counts.counts, counts.n_unknown, self.model)
        saved = self.model.retpoline_cycles - plan.cycles
        rate_hz = counts.total / window_s if window_s > 0 else 0.0
        if plan.targets and self.model.worthwhile(saved_cycles=saved, rate_hz=rate_hz):
            return Decision(action=Action.PROMOTE, plan=plan, profile=blend(None, counts, 1.0))
        return Decision(action=Action.KEEP)

    def is_surprising(self, current: PlannedTree, window: SiteCounts) -> bool:
        """See ``Policy``: unguarded targets cost more than a clear gain."""
        if window.total < self.min_count:
            return False
        shares = window.shares()
        guarded = sum(shares.get(target, 0.0) for target in current.targets)
        return (1.0 - guarded) * self.model.retpoline_cycles >= self.clear_gain_cycles

    def decide_again(
        self,
        current: PlannedTree,
        profile: SiteCounts | None,
        window: SiteCounts,
        n_confirmed: int,
    ) -> Decision:
        """See ``Policy``."""
        if window.total < self.min_count:
            return Decision(action=Action.KEEP, profile=profile)
        is_surprised = self.is_surprising(current, window)
        ratio = self.surprised_ratio if is_surprised else self.calm_ratio
        known = blend(profile, window, ratio)
        now_cycles = tree_cost(current.tree, known.shares(), self.model)
        best = plan_tree(known.counts, known.n_unknown, self.model)
        if min(now_cycles, best.cycles) >= self.model.retpoline_cycles:
            return Decision(action=Action.DEMOTE, profile=known)
        gain = now_cycles - best.cycles
        if gain < max(self.narrow_gain_cycles, self.narrow_gain_ratio * now_cycles):
            return Decision(action=Action.KEEP, profile=known)
        if is_surprised or n_confirmed + 1 >= self.n_confirmations:
            return Decision(action=Action.PROMOTE, plan=best, profile=known)
        return Decision(action=Action.CONFIRM, plan=best, profile=known)
