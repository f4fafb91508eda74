# SPDX-License-Identifier: Apache-2.0
"""The default: the cheapest tree by a cost model, and reluctance to change it.

What a window shows is judged in cycles a branch by the cost model, for the
present tree and for the best one:

* *Unguarded targets* cost a whole retpoline each. A window in which they cost more
  than ``clear_gain_cycles`` is a surprise and acted on at once: a flip.
* *Other weights* of guarded targets cost a few cycles. Programs have phases far
  shorter than the time between windows, so one window proves little: a narrow gain
  must show in ``n_confirmations`` windows in a row, or in the profile, which is an
  exponential average of windows.
* A gain below ``narrow_gain_cycles`` and ``narrow_gain_ratio`` is noise: 50/50 or
  34/33/33 stay as they are, whatever the last window says of their order.
* *A site that never settles* has changed ``n_free_changes`` times without being calm
  for a while in between (``CALM_S``). From then on single windows count no more, only
  the profile, whose tree covers all phases in turn; and each further change has to
  wait twice as long as the one before, up to ``hold_max_s``. No longer, though, than is
  reasonable by what waiting costs: misses wait until they would have paid for a change,
  other weights ``hold_paybacks`` times as long.

A profile keeps what was known when it takes in a surprise, at a lower weight: a
phase that returns finds its targets guarded still.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from optpoline.learn.counting import SiteCounts, blend
from optpoline.promote.cost import CostModel
from optpoline.promote.policy import Action, Decision, SiteView, WatchSchedule
from optpoline.promote.tree import PlannedTree, plan_tree, quick_cost, tree_cost

__all__ = ["AdaptivePolicy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptivePolicy:
    """Promote what saves cycles; change what saves clearly more.

    Attributes:
        name: ``adaptive``.
        schedule: When it looks.
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
        calm_ratio: Weight of a window in the profile.
        followed_ratio: The same for a window that is acted on alone: the new weights
            order the tree, the old ones keep their guards for six such changes
            (0.2^5 is about what a guard must save, ``min_gain_cycles``).
        n_free_changes: Re-promotions, not lived down, from which on a site counts as one
            that never settles. Phases of 5 s need one or two each and live down two.
        hold_first_s: How long such a site is left alone; doubled with each change.
        hold_max_s: The most that comes to.
        hold_paybacks: The most that comes to for weights, in times that the gain takes to
            pay for a change (``change_cost_s`` of the schedule). The gain is what the profile
            expects, and of a site that never settles most of it does not last.
    """

    name: str = "adaptive"
    schedule: WatchSchedule = field(default_factory=WatchSchedule)
    model: CostModel = field(default_factory=CostModel)
    min_count: int = 256
    clear_gain_cycles: float = 3.0
    narrow_gain_cycles: float = 0.3
    narrow_gain_ratio: float = 0.1
    n_confirmations: int = 2
    calm_ratio: float = 0.2
    followed_ratio: float = 0.8
    n_free_changes: int = 4
    hold_first_s: float = 1.0
    hold_max_s: float = 600.0
    hold_paybacks: float = 20.0

    def decide(self, view: SiteView) -> Decision:
        """See ``Policy``."""
        policy = self
        if view.is_plain or view.max_guards:  # hardly any: most need no model of their own
            policy = replace(self, model=self._model_for(view))
        if view.current is None:
            return policy._decide_first(view)
        if view.window.total < self.min_count:
            return Decision(action=Action.KEEP, profile=view.profile)
        if policy.is_surprising(view):
            return policy._decide_surprised(view, view.current)
        return policy._decide_calm(view, view.current)

    def is_surprising(self, view: SiteView) -> bool:
        """See ``Policy``: unguarded targets cost more than a clear gain."""
        if view.current is None or view.window.total < self.min_count:
            return False
        shares = view.window.shares()
        guarded = sum(shares.get(target, 0.0) for target in view.current.targets)
        # What no tree of so few guards could have served is no surprise.
        best = sum(sorted(shares.values())[-view.max_guards :]) if view.max_guards else 1.0
        return (best - guarded) * self._missed_cycles(view) >= self.clear_gain_cycles

    def _missed_cycles(self, view: SiteView) -> float:
        """Return what a miss costs at a site."""
        return self.model.plain_cycles if view.is_plain else self.model.retpoline_cycles

    def _model_for(self, view: SiteView) -> CostModel:
        """Return what things cost at a site: its misses, and how many guards it may have."""
        return replace(
            self.model,
            retpoline_cycles=self._missed_cycles(view),
            max_targets=view.limit_guards(self.model.max_targets),
        )

    def hold_s(self, n_changes: int) -> float:
        """Return how long a site with so many changes is left alone after the last one."""
        n_over = n_changes - self.n_free_changes
        return min(self.hold_max_s, self.hold_first_s * 2.0 ** min(n_over, 32)) * (n_over >= 0)

    def _decide_first(self, view: SiteView) -> Decision:
        """Promote a site on its thunk if that saves enough of a CPU."""
        counts = view.window
        plan = plan_tree(counts.counts, counts.n_unknown, self.model)
        saved = self.model.retpoline_cycles - plan.cycles
        rate_hz = counts.total / view.window_s if view.window_s > 0 else 0.0
        if plan.targets and self.model.worthwhile(saved_cycles=saved, rate_hz=rate_hz):
            return Decision(action=Action.PROMOTE, plan=plan, profile=blend(None, counts, 1.0))
        return Decision(action=Action.KEEP)

    def _decide_surprised(self, view: SiteView, current: PlannedTree) -> Decision:
        """Decide about a site whose window was full of unguarded targets."""
        is_restless = view.n_changes >= self.n_free_changes
        ratio = self.calm_ratio if is_restless else self.followed_ratio
        known = blend(view.profile, view.window, ratio)
        left_s = self._hold_s(view, current, view.window, known, 1.0) - view.since_change_s
        if left_s > 0.0:
            return Decision(action=Action.HOLD, profile=known, hold_s=left_s)
        return self._plan(current, known)

    def _decide_calm(self, view: SiteView, current: PlannedTree) -> Decision:
        """Decide about a site whose targets have their guards, by weights alone."""
        is_restless = view.n_changes >= self.n_free_changes
        known = blend(view.profile, view.window, self.calm_ratio)
        is_known_better = self._is_better(current, known)
        is_window_better = self._is_better(current, view.window)
        if is_window_better and not is_known_better and is_restless:
            # Good for the moment only: such moments have come and gone before.
            return Decision(action=Action.HOLD, profile=known)
        if not is_window_better and not is_known_better:
            return Decision(action=Action.KEEP, profile=known)
        hold_s = self._hold_s(view, current, known, known, self.hold_paybacks)
        if view.since_change_s < hold_s:
            # Windows go on: the profile learns, and misses are none of this.
            return Decision(action=Action.HOLD, profile=known)
        if view.n_confirmed + 1 < self.n_confirmations:
            return Decision(action=Action.CONFIRM, profile=known)
        if is_window_better and not is_restless:
            known = blend(view.profile, view.window, self.followed_ratio)
        return self._plan(current, known)

    def _hold_s(
        self,
        view: SiteView,
        current: PlannedTree,
        seen: SiteCounts,
        known: SiteCounts,
        n_paybacks: float,
    ) -> float:
        """Return how long after its last change a site is left alone.

        Who waits until waiting has cost as much as a change loses twice the least possible,
        whatever comes: the old question of when to buy what one rents.

        Args:
            view: The site.
            current: Its tree.
            seen: Counts that the present tree's cost is judged by.
            known: Counts that the next tree's is.
            n_paybacks: Longest wait, in times that the difference takes to pay for a change.
        """
        hold_s = self.hold_s(view.n_changes)
        if hold_s <= 0.0:
            return 0.0
        other = quick_cost(known.counts, known.n_unknown, self.model)
        lost = max(0.0, self._cost(current, seen) - other)
        rate_hz = view.window.total / view.window_s if view.window_s > 0.0 else 0.0
        # A site's changes take no more of a CPU than all windows may.
        lost_ratio = min(lost * rate_hz / self.model.cpu_hz, self.schedule.overhead_ratio)
        if lost_ratio <= 0.0:
            return hold_s
        return min(hold_s, n_paybacks * self.schedule.change_cost_s / lost_ratio)

    def _plan(self, current: PlannedTree, known: SiteCounts) -> Decision:
        """Promote anew or demote, if what is known makes that a gain."""
        best = plan_tree(known.counts, known.n_unknown, self.model)
        now_cycles = self._cost(current, known)
        if min(now_cycles, best.cycles) >= self.model.retpoline_cycles:
            return Decision(action=Action.DEMOTE, profile=known)
        if not self._is_gain(now_cycles, best.cycles):
            return Decision(action=Action.KEEP, profile=known)
        return Decision(action=Action.PROMOTE, plan=best, profile=known)

    def _cost(self, current: PlannedTree, counts: SiteCounts) -> float:
        """Return what the present tree costs per branch at these counts."""
        return tree_cost(current.tree, counts.shares(), self.model)

    def _is_better(self, current: PlannedTree, counts: SiteCounts) -> bool:
        """Tell whether another tree would be clearly better, or none at all."""
        now_cycles = self._cost(current, counts)
        other = quick_cost(counts.counts, counts.n_unknown, self.model)
        if min(now_cycles, other) >= self.model.retpoline_cycles:
            return True
        return self._is_gain(now_cycles, other)

    def _is_gain(self, now_cycles: float, other_cycles: float) -> bool:
        """Tell whether a difference is worth a change."""
        least = max(self.narrow_gain_cycles, self.narrow_gain_ratio * now_cycles)
        return now_cycles - other_cycles >= least
