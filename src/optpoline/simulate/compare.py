# SPDX-License-Identifier: Apache-2.0
"""Several policies side by side on one workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optpoline.promote.cost import CostModel
from optpoline.promote.policy import Policy
from optpoline.promote.schedule import WatchSchedule
from optpoline.simulate.changes import find_changes
from optpoline.simulate.engine import replay
from optpoline.simulate.outcome import Outcome, ideal_tenures, judge, judge_tenures
from optpoline.simulate.state import EngineModel
from optpoline.simulate.workload import Workload

__all__ = ["ORACLE", "STATIC", "Comparison", "compare"]

STATIC = "(static)"
ORACLE = "(oracle)"
"""Names of the ideals; no policy is called so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What policies made of a workload.

    Attributes:
        workload: What was replayed.
        n_changes: Changes of its hot sites.
        outcomes: One for each policy, in the order asked for.
        ideals: What could be reached: one best tree a site, and one after each change.
        retpoline_cycles: Cycles of a branch that is not promoted.
    """

    workload: Workload
    n_changes: int
    outcomes: tuple[Outcome, ...]
    ideals: tuple[Outcome, ...]
    retpoline_cycles: float

    @property
    def best(self) -> Outcome:
        """The policy with the fewest cycles; the first of several."""
        return min(self.outcomes, key=lambda outcome: outcome.cycles)


def compare(
    workload: Workload,
    policies: Sequence[Policy],
    *,
    engine: EngineModel | None = None,
    model: CostModel | None = None,
    schedule: WatchSchedule | None = None,
) -> Comparison:
    """Replay a workload through policies and judge them all by one cost model.

    Args:
        workload: What the program does.
        policies: What decides, at least one.
        engine: The engine around them.
        model: Cycles of trees; what a policy itself believes is its own affair.
        schedule: Says what counting costs.
    """
    model = model or CostModel()
    counting_cycles = (schedule or WatchSchedule()).counting_cycles
    changes = find_changes(workload)
    return Comparison(
        workload=workload,
        n_changes=len(changes),
        outcomes=tuple(
            judge(workload, replay(workload, policy, engine), changes, model, counting_cycles)
            for policy in policies
        ),
        ideals=tuple(
            judge_tenures(workload, name, ideal_tenures(workload, cuts, model), changes, model)
            for name, cuts in ((STATIC, ()), (ORACLE, changes))
        ),
        retpoline_cycles=model.retpoline_cycles,
    )
