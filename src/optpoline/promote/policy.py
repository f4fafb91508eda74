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

from optpoline.learn.counting import SiteCounts
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
    """An action, and the tree it is about where there is one."""

    action: Action
    plan: PlannedTree | None = None


class Policy(Protocol):
    """When to promote, re-promote and demote."""

    def decide_first(self, counts: SiteCounts, window_s: float) -> Decision:
        """Decide about a site that leads to its thunk (PROMOTE or KEEP)."""

    def decide_again(
        self, current: PlannedTree, counts: SiteCounts, window_s: float, n_confirmed: int
    ) -> Decision:
        """Decide about a promoted site; ``n_confirmed`` CONFIRMs came before in a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostPolicy:
    """Promote what saves cycles; change what saves clearly more, twice in a row.

    Attributes:
        model: Cycles of everything.
        min_count: Branches below which a window says nothing about weights:
            shares are then known to about one part in sixteen (1/sqrt(n)).
        clear_gain_cycles: Gain per branch that is acted on at once; a flipped
            target costs a whole retpoline, far above it.
        narrow_gain_cycles: Gain per branch below which nothing is done.
        narrow_gain_ratio: The same as a share of the present cost; hysteresis
            against trees that differ only in the noise of the window.
        n_confirmations: Windows in a row that must agree on a narrow gain.
    """

    model: CostModel = field(default_factory=CostModel)
    min_count: int = 256
    clear_gain_cycles: float = 3.0
    narrow_gain_cycles: float = 0.3
    narrow_gain_ratio: float = 0.1
    n_confirmations: int = 2

    def decide_first(self, counts: SiteCounts, window_s: float) -> Decision:
        """See ``Policy``."""
        plan = plan_tree(counts.counts, counts.n_unknown, self.model)
        saved = self.model.retpoline_cycles - plan.cycles
        rate_hz = counts.total / window_s if window_s > 0 else 0.0
        if plan.targets and self.model.worthwhile(saved_cycles=saved, rate_hz=rate_hz):
            return Decision(action=Action.PROMOTE, plan=plan)
        return Decision(action=Action.KEEP)

    def decide_again(
        self, current: PlannedTree, counts: SiteCounts, window_s: float, n_confirmed: int
    ) -> Decision:
        """See ``Policy``."""
        if counts.total < self.min_count:
            return Decision(action=Action.KEEP)
        now_cycles = tree_cost(current.tree, counts.shares(), self.model)
        best = plan_tree(counts.counts, counts.n_unknown, self.model)
        if min(now_cycles, best.cycles) >= self.model.retpoline_cycles:
            return Decision(action=Action.DEMOTE)
        gain = now_cycles - best.cycles
        if gain < max(self.narrow_gain_cycles, self.narrow_gain_ratio * now_cycles):
            return Decision(action=Action.KEEP)
        if gain >= self.clear_gain_cycles or n_confirmed + 1 >= self.n_confirmations:
            return Decision(action=Action.PROMOTE, plan=best)
        return Decision(action=Action.CONFIRM, plan=best)
