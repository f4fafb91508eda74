# SPDX-License-Identifier: Apache-2.0
"""E. Cree's dynamic_call (Linux RFC v2, 2019), as published.

A site counts the hits of its two branches, those of four *candidates*, first come
first served, and what finds no place among them. After more than 1000 candidate hits
the counts of all CPUs are summed, and if the best target has more than 250, the best
two take the branches, whether they had them before or not; the counts start anew in
any case. After more than 1000 catch-all misses the candidates are dropped "for a
fresh set" (``dynamic_call_update`` and ``__DYNAMIC_CALL_STATS``; all three numbers
are called arbitrary there).

Weak spots, kept:

* No hysteresis: three targets at a third each change places for ever, one of them
  always on the thunk.
* First come first served: four rare candidates keep out a hot fifth until 1000 misses.
* Counts do not age: between two updates a phase that is over counts as much as the
  present one.
* Hits are counted on the fast path; here in windows at a high duty cycle instead.

The published code could also give both branches to one callee, which was counted as a
candidate while its branch was switched off. That cannot happen here: a counting block
knows the site's targets, so they are never candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from optpoline.learn.counting import SiteCounts
from optpoline.model import Addr, Count
from optpoline.promote.cost import CostModel
from optpoline.promote.policies.chains import plan_chain
from optpoline.promote.policy import Action, Decision, SiteView, WatchSchedule

__all__ = ["CreePolicy"]

N_CANDIDATES = 4
"""``DYNAMIC_CALL_CANDIDATES``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreePolicy:
    """Best two of four, at fixed counts.

    Attributes:
        name: ``cree``.
        schedule: Windows one after the other: it never stops counting.
        model: For the cycles that are reported; decides nothing.
        n_candidates: Callees tracked besides the branches, 4.
        n_branches: ``DYNAMIC_CALL_BRANCHES``, 2.
        update_hits: Candidate hits above which the branches are chosen anew, 1000.
        min_hits: Hits that the best must have more than, 250.
        drop_misses: Catch-all misses above which the candidates are dropped, 1000.
    """

    name: str = "cree"
    schedule: WatchSchedule = field(
        default_factory=lambda: WatchSchedule(
            sample_every_s=0.1,
            sample_every_max_s=0.1,
            overhead_ratio=1.0,
            max_slots=N_CANDIDATES,
        )
    )
    model: CostModel = field(default_factory=CostModel)
    n_candidates: int = N_CANDIDATES
    n_branches: int = 2
    update_hits: int = 1000
    min_hits: int = 250
    drop_misses: int = 1000

    def decide(self, view: SiteView) -> Decision:
        """See ``Policy``; the profile is the sum of what was counted since the last update."""
        branches = view.current.targets if view.current is not None else ()
        hits, misses = self._sum(view, branches)
        candidate_hits = sum(n for target, n in hits.items() if target not in branches)
        ranked = sorted(hits.items(), key=lambda item: (-item[1], item[0]))
        if candidate_hits > self.update_hits:
            if ranked[0][1] > self.min_hits:
                best = ranked[: view.limit_guards(self.n_branches)]
                return self._update(view, [target for target, _ in best])
            return Decision(action=Action.KEEP)
        if misses > self.drop_misses:
            ranked = [(target, n) for target, n in ranked if target in branches]
            misses = 0
        kept = tuple(Count(target=target, hit_count=n) for target, n in ranked)
        return Decision(action=Action.KEEP, profile=SiteCounts(counts=kept, n_unknown=misses))

    def is_surprising(self, view: SiteView) -> bool:
        """See ``Policy``: it counts all the time and knows no surprise."""
        return False

    def _sum(self, view: SiteView, branches: tuple[Addr, ...]) -> tuple[dict[Addr, int], int]:
        """Return (hits by target, catch-all misses) since the last update."""
        before = view.profile.counts if view.profile is not None else ()
        hits = {count.target: count.hit_count for count in before}
        misses = view.window.n_unknown + (view.profile.n_unknown if view.profile else 0)
        n_free = self.n_candidates - sum(1 for target in hits if target not in branches)
        for count in view.window.counts:
            target = count.target
            if target not in hits and target not in branches:
                if n_free <= 0:
                    misses += count.hit_count
                    continue
                n_free -= 1
            hits[target] = hits.get(target, 0) + count.hit_count
        return hits, misses

    def _update(self, view: SiteView, targets: list[Addr]) -> Decision:
        """Give the branches to the best; the counts were for the old ones."""
        plan = plan_chain(targets, view.window, self.model)
        if view.current is not None and view.current.targets == plan.targets:
            return Decision(action=Action.KEEP)
        return Decision(action=Action.PROMOTE, plan=plan)
