# SPDX-License-Identifier: Apache-2.0
"""What LLVM promotes from a profile: at most three targets that stand out.

``ICallPromotionAnalysis::getProfitablePromotionCandidates``
(llvm/lib/Analysis/IndirectCallPromotionAnalysis.cpp) walks the targets, hottest
first, and stops at the first that takes less than ``-icp-remaining-percent-threshold``
of the calls not promoted yet, or less than ``-icp-total-percent-threshold`` of all
calls, or at ``-icp-max-prom``. A compiler decides once: sites are not looked at again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from optpoline.promote.cost import CostModel
from optpoline.promote.policies.chains import plan_chain, take_hot
from optpoline.promote.policy import Action, Decision, SiteView, WatchSchedule

__all__ = ["ONCE", "LlvmPolicy"]

ONCE = WatchSchedule(
    sample_every_s=math.inf, sample_every_max_s=math.inf, miss_rate_floor_hz=math.inf
)
"""One learning window and no other, as with a profile that a compiler is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlvmPolicy:
    """LLVM's rule, over the first window's counts.

    Attributes:
        name: ``llvm``.
        schedule: One window.
        model: For the cycles that are reported; decides nothing.
        remaining_ratio: ``-icp-remaining-percent-threshold``, 30.
        total_ratio: ``-icp-total-percent-threshold``, 5.
        max_guards: ``-icp-max-prom``, 3.
    """

    name: str = "llvm"
    schedule: WatchSchedule = ONCE
    model: CostModel = field(default_factory=CostModel)
    remaining_ratio: float = 0.30
    total_ratio: float = 0.05
    max_guards: int = 3

    def decide(self, view: SiteView) -> Decision:
        """See ``Policy``."""
        if view.current is not None:
            return Decision(action=Action.KEEP, profile=view.profile)
        hot = take_hot(
            view.window,
            max_guards=view.limit_guards(self.max_guards),
            remaining_ratio=self.remaining_ratio,
            total_ratio=self.total_ratio,
        )
        if not hot:
            return Decision(action=Action.KEEP, profile=view.window)
        plan = plan_chain(hot, view.window, self.model)
        return Decision(action=Action.PROMOTE, plan=plan, profile=view.window)

    def is_surprising(self, view: SiteView) -> bool:
        """See ``Policy``: nothing surprises who does not look."""
        return False
