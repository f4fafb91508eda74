# SPDX-License-Identifier: Apache-2.0
"""JumpSwitches (N. Amit, F. Jacobs, M. Wei, USENIX ATC 2019), their policy.

A worker retrains sites periodically: for the length of an epoch a site's slow path
notes its targets, and what was learnt is patched in. A site with several targets has
an *outline block* of guards, which is removed once the site has more targets than the
block can hold ("if there are more targets than the outline block can hold, the outline
block is completely removed", cover letter of the RFC v2, December 2018). A trained
block is changed only if an epoch shows something clearly better than it (hysteresis).

What is published are the mechanisms. Numbers that could not be had from it are ours
and marked as such below; they were chosen so that the policy does well in comparisons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from optpoline.promote.cost import CostModel
from optpoline.promote.policies.chains import plan_chain
from optpoline.promote.policy import Action, Decision, SiteView, WatchSchedule

__all__ = ["JumpSwitchPolicy"]

RETRAIN_EVERY_S = 1.0
"""Ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JumpSwitchPolicy:
    """Retrain now and then; give a site up that has too many targets.

    Attributes:
        name: ``jumpswitch``.
        schedule: A window at fixed intervals, whatever the misses say.
        model: For the cycles that are reported; decides nothing.
        max_guards: Guards that a block holds. Ours: 6.
        min_ratio: Share of a window from which a target counts as one. Ours: 0.01;
            there, each target seen in an epoch counts.
        hysteresis_ratio: Share of the branches that a retrained block must serve
            more than the present one. Ours: 0.1.
        n_confirmations: Epochs in a row that must agree on a change. Ours: 2.
        min_count: Branches below which an epoch has learnt nothing. Ours: 64.
    """

    name: str = "jumpswitch"
    schedule: WatchSchedule = field(
        default_factory=lambda: WatchSchedule(
            sample_every_s=RETRAIN_EVERY_S,
            sample_every_max_s=RETRAIN_EVERY_S,
            confirm_every_s=RETRAIN_EVERY_S,
            overhead_ratio=1.0,
            miss_rate_floor_hz=math.inf,
        )
    )
    model: CostModel = field(default_factory=CostModel)
    max_guards: int = 6
    min_ratio: float = 0.01
    hysteresis_ratio: float = 0.1
    n_confirmations: int = 2
    min_count: int = 64

    def decide(self, view: SiteView) -> Decision:
        """See ``Policy``."""
        shares = view.window.shares()
        targets = [c.target for c in view.window.counts if shares[c.target] >= self.min_ratio]
        # What found no slot went to some further target, at least one.
        n_targets = len(targets) + (view.window.n_unknown > self.min_ratio * view.window.total)
        keep = Decision(action=Action.KEEP, profile=view.profile)
        if view.window.total < self.min_count or not targets:
            return keep
        if n_targets > view.limit_guards(self.max_guards):
            return Decision(action=Action.DEMOTE) if view.current is not None else keep
        plan = plan_chain(targets, view.window, self.model)
        if view.current is not None:
            served = sum(shares.get(target, 0.0) for target in view.current.targets)
            if plan.hit_ratio - served < self.hysteresis_ratio:
                return keep
            if view.n_confirmed + 1 < self.n_confirmations:
                return Decision(action=Action.CONFIRM, plan=plan, profile=view.profile)
        return Decision(action=Action.PROMOTE, plan=plan, profile=view.window)

    def is_surprising(self, view: SiteView) -> bool:
        """See ``Policy``: it waits for the next epoch."""
        return False
