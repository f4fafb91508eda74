# SPDX-License-Identifier: Apache-2.0
"""What BOLT promotes from a profile: the hottest sites, and few targets of each.

``IndirectCallPromotion::canPromoteCallsite`` (bolt/lib/Passes/IndirectCallPromotion.cpp):
of the sites that together take ``-icp-top-callsites`` percent of all indirect
branches, targets are taken, hottest first, while each takes at least
``-icp-calls-total-percent-threshold`` of the calls and
``-icp-calls-remaining-percent-threshold`` of those not promoted yet (two other
thresholds for jump tables: ``-icp-jt-*``), at most ``-indirect-call-promotion-topn``.
BOLT counts only branches whose target it has a symbol for; here, those whose target
was counted. Misprediction counts, which it may use as well, need hardware branch
records; by default (threshold 0) it does not. It decides once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from optpoline.model import SiteKind
from optpoline.promote.cost import CostModel
from optpoline.promote.policies.chains import plan_chain, take_hot
from optpoline.promote.policies.llvm import ONCE
from optpoline.promote.policy import Action, Decision, SiteView, WatchSchedule

__all__ = ["BoltPolicy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BoltPolicy:
    """BOLT's rule, over the first window's counts.

    A tail call is a jump to the processor and a call to BOLT. What a site's
    instruction says is all that is known here: jumps are taken for jump tables.

    Attributes:
        name: ``bolt``.
        schedule: One window.
        model: For the cycles that are reported; decides nothing.
        calls_remaining_ratio: ``-icp-calls-remaining-percent-threshold``, 50.
        calls_total_ratio: ``-icp-calls-total-percent-threshold``, 30.
        jumps_remaining_ratio: ``-icp-jt-remaining-percent-threshold``, 30.
        jumps_total_ratio: ``-icp-jt-total-percent-threshold``, 5.
        max_guards: ``-indirect-call-promotion-topn``, 3.
        top_sites_ratio: ``-icp-top-callsites``, 99: share of all branches that the
            promoted sites cover.
    """

    name: str = "bolt"
    schedule: WatchSchedule = ONCE
    model: CostModel = field(default_factory=CostModel)
    calls_remaining_ratio: float = 0.50
    calls_total_ratio: float = 0.30
    jumps_remaining_ratio: float = 0.30
    jumps_total_ratio: float = 0.05
    max_guards: int = 3
    top_sites_ratio: float = 0.99

    def decide(self, view: SiteView) -> Decision:
        """See ``Policy``."""
        if view.current is not None:
            return Decision(action=Action.KEEP, profile=view.profile)
        is_call = view.kind is SiteKind.CALL
        hot = take_hot(
            replace(view.window, n_unknown=0),
            max_guards=view.limit_guards(self.max_guards),
            remaining_ratio=self.calls_remaining_ratio if is_call else self.jumps_remaining_ratio,
            total_ratio=self.calls_total_ratio if is_call else self.jumps_total_ratio,
        )
        if not hot or view.hotter_ratio >= self.top_sites_ratio:
            return Decision(action=Action.KEEP, profile=view.window)
        plan = plan_chain(hot, view.window, self.model)
        return Decision(action=Action.PROMOTE, plan=plan, profile=view.window)

    def is_surprising(self, view: SiteView) -> bool:
        """See ``Policy``: nothing surprises who does not look."""
        return False
