# SPDX-License-Identifier: Apache-2.0
"""Settings and a policy with which sites are promoted anew as often as they are looked at."""

from __future__ import annotations

import optpoline
from optpoline.controller.arguments import Change
from optpoline.promote.cost import CostModel
from optpoline.promote.policies.adaptive import AdaptivePolicy
from optpoline.promote.policy import Action, Decision, SiteView
from optpoline.promote.tree import plan_tree

__all__ = ["EAGER", "Fickle", "fickle_config"]

EAGER = optpoline.Config(
    sample_s=0.008,
    sample_every_s=0.02,
    sample_every_max_s=0.05,
    overhead_ratio=100.0,
    poll_s=0.01,
    reclaim_duty=1.0,
    policy=AdaptivePolicy(
        n_confirmations=1, calm_ratio=1.0, followed_ratio=1.0, n_free_changes=1_000_000
    ),
)
"""With the policy that is the default, which changes its mind as often as it can."""

_N_FEW = 2


class Fickle(AdaptivePolicy):
    """Guards two targets, then all that were met, then two, and so on."""

    def decide(self, view: SiteView) -> Decision:
        """Promote it anew, if anything was counted."""
        counts = view.window.counts
        if view.current is None or not counts:
            return super().decide(view)
        kept = counts if len(view.current.targets) <= _N_FEW else counts[:_N_FEW]
        n_misses = view.window.total - sum(count.hit_count for count in kept)
        plan = plan_tree(kept, n_misses, CostModel())
        return Decision(action=Action.PROMOTE, plan=plan, profile=view.window)


def fickle_config(change: Change, *, sample_every_s: float = 0.02) -> optpoline.Config:
    """Return settings with which sites are promoted anew as often as they are looked at."""
    return optpoline.Config(
        learn_s=0.1,
        sample_s=0.004,
        sample_every_s=sample_every_s,
        sample_every_max_s=max(0.05, sample_every_s),
        overhead_ratio=100.0,
        poll_s=0.01,
        relink_after_s=0.05,
        reclaim_duty=1.0,
        change=change,
        policy=Fickle(),
    )
