# SPDX-License-Identifier: Apache-2.0
"""Replay a workload through a policy, with a model of the engine around it.

The engine here does what a session does, at the same moments: a first window,
then polls; at each poll it reads misses, lets sites that are due count, carries
decisions out, and where time is spent in thunks it opens another learning window.
The policy is asked through the same interface, and the schedule, the slots of
counting blocks and the history of a site are the same code.

What the model leaves out: stops, the time that writing blocks takes, grace
periods, and how promotion speeds the program up: a workload makes so many branches
a second, whatever they cost. One CPU is taken to be busy.
"""

from __future__ import annotations

from optpoline.promote.policy import Policy
from optpoline.simulate.learning import Learner
from optpoline.simulate.sampling import Sampler
from optpoline.simulate.state import EngineModel, Replay, ReplayState
from optpoline.simulate.workload import Workload

__all__ = ["replay"]


def replay(workload: Workload, policy: Policy, engine: EngineModel | None = None) -> Replay:
    """Return what a policy does with a workload.

    Deterministic: the same arguments give the same result.

    Args:
        workload: What the program does.
        policy: What decides.
        engine: The engine around it.
    """
    state = ReplayState(workload, policy, engine or EngineModel())
    learner, sampler = Learner(state), Sampler(state)
    end_s = workload.seconds
    now_s = min(end_s, policy.schedule.learn_s)
    learner.learn_first(now_s)
    sampler.schedule(now_s)
    while (now_s := sampler.next_poll_s(now_s)) < end_s:
        now_s = sampler.poll(now_s)
        promoted, now_s = learner.learn_again(now_s)
        if promoted:
            sampler.schedule(now_s)
    for site in state.sites:
        state.end_tenure(site, end_s)
    return state.replay
