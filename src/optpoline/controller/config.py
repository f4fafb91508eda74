# SPDX-License-Identifier: Apache-2.0
"""What a session can be told, with the defaults and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field

from optpoline.promote.policy import CostPolicy, Policy

__all__ = ["Config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of one session.

    Attributes:
        learn_s: Length of the first learning window, seconds.
        relearn_s: Length of later windows over sites that were cold, seconds.
        wave_s: Time between looks at full slots within a window, seconds. A
            dispatch site with 80 targets needs four waves.
        sample_s: Length of one re-sampling window, seconds.
        sample_every_s: First interval between re-sampling windows of a site.
        sample_every_max_s: Longest interval; a site that does not change backs
            off to it by doubling, so that watching costs less than 0.1 %.
        poll_s: Interval of looking at miss counters, seconds.
        maps_every_s: Interval of looking for new or vanished modules, seconds.
        relink_after_s: How long a re-promoted site must be quiet before its
            text is linked to its new block, which takes a stop.
        stop_timeout_s: How long threads may take to stop before all are resumed.
        max_stop_s: How long the program's threads may stand while its text is changed;
            more sites than fit are changed in several stops.
        reclaim_after_size: Bytes of blocks that nothing leads to from which on they are
            retired, to be reused after a grace period.
        reclaim_every_s: Interval of looking for such blocks, seconds.
        reclaim_duty: Share of one core that looking at threads for that may take.
        follow_fork: Restore the target's forked children at the end as well.
        policy: Turns counts into decisions.
    """

    learn_s: float = 1.0
    relearn_s: float = 0.25
    wave_s: float = 0.025
    sample_s: float = 0.020
    sample_every_s: float = 1.0
    sample_every_max_s: float = 16.0
    poll_s: float = 0.1
    maps_every_s: float = 1.0
    relink_after_s: float = 1.0
    stop_timeout_s: float = 2.0
    max_stop_s: float = 0.005
    reclaim_after_size: int = 64 << 10
    reclaim_every_s: float = 1.0
    reclaim_duty: float = 0.01
    follow_fork: bool = False
    policy: Policy = field(default_factory=CostPolicy)
