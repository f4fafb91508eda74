# SPDX-License-Identifier: Apache-2.0
"""What a session can be told, with the defaults and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from optpoline.controller.arguments import LEARN_S, Change, validate_change, validate_setting
from optpoline.promote.policies import DEFAULT_POLICY, policy_named
from optpoline.promote.policy import Policy, WatchSchedule

__all__ = ["Config"]

FIRST_HOT_S = 0.5
"""Length of the first window over hot sites: what it has not met comes half a second later."""

_NUMBERS = (
    "relearn_s",
    "wave_s",
    "poll_s",
    "maps_every_s",
    "relink_after_s",
    "stop_timeout_s",
    "max_stop_s",
    "reclaim_after_size",
    "reclaim_every_s",
    "reclaim_duty",
)
_NUMBERS_OR_NONE = (
    "learn_s",
    "sample_s",
    "sample_every_s",
    "sample_every_max_s",
    "overhead_ratio",
)
"""Settings of ``Config`` that are numbers."""


def _default_policy() -> Policy:
    """Return the policy of who names none."""
    return policy_named(DEFAULT_POLICY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of one session.

    Attributes:
        learn_s: Length of the first learning window, seconds; None: 1, or 0.5 where only the
            sites that run are learned because there are so many.
        relearn_s: Length of later windows over sites that were cold, seconds.
        wave_s: Time between looks at full slots within a window, seconds. A
            dispatch site with 80 targets needs four waves.
        sample_s: Longest time that a re-sampling window counts; None: the policy's.
        sample_every_s: Shortest interval between re-sampling windows of a site; None:
            the policy's.
        sample_every_max_s: Longest such interval; None: the policy's.
        overhead_ratio: What all re-sampling windows may cost, as a share of one CPU;
            None: the policy's.
        poll_s: Interval of looking at miss counters, seconds; 2.5 times that when no site has
            changed for ``promote.schedule.CALM_AFTER_S``. A flip waits for it half the
            interval on average.
        maps_every_s: Interval of looking for new or vanished modules, seconds.
        relink_after_s: How long a re-promoted site must be quiet before the block that its
            text leads to is made to do the new one's work; or, where that has no room, before
            its text is linked to the new one, which takes a stop.
        stop_timeout_s: How long threads may take to stop before all are resumed.
        max_stop_s: How long the program's threads may stand while its text is changed;
            more sites than fit are changed in several stops.
        reclaim_after_size: Bytes of blocks that nothing leads to from which on they are
            retired, to be reused after a grace period.
        reclaim_every_s: Interval of looking for such blocks, seconds.
        reclaim_duty: Share of one core that looking at threads for that may take.
        follow_fork: Restore the target's forked children at the end as well.
        shared_counters: Count in one row that all CPUs share, with locked instructions,
            instead of in a row for each CPU: to see what those are worth.
        promote_plain: Promote plain indirect branches as well that no source declares as dynamic
            calls. Processors predict most of them as well as a guard: an interpreter's loop lost
            3 to 6 % by it. They are learned and shown all the same.
        change: How a promoted site is changed. ``"swap"``: a second block is written, and
            swapped in by one store. ``"switch-off"``: the site takes its thunk for the time
            of a grace period, in which its block is rewritten; where that cannot be, it is
            swapped. Slower for that time, and no memory is taken.
        policy: Turns counts into decisions (``optpoline.promote.policies``).
    """

    learn_s: float | None = None
    relearn_s: float = 0.25
    wave_s: float = 0.025
    sample_s: float | None = None
    sample_every_s: float | None = None
    sample_every_max_s: float | None = None
    overhead_ratio: float | None = None
    poll_s: float = 0.05
    maps_every_s: float = 1.0
    relink_after_s: float = 1.0
    stop_timeout_s: float = 2.0
    max_stop_s: float = 0.005
    reclaim_after_size: int = 64 << 10
    reclaim_every_s: float = 1.0
    reclaim_duty: float = 0.01
    follow_fork: bool = False
    shared_counters: bool = False
    promote_plain: bool = False
    change: Change = "swap"
    policy: Policy = field(default_factory=_default_policy)

    def __post_init__(self) -> None:
        """Check what was set: a number that makes no sense would only show while attached.

        Raises:
            UsageError: if it is none, or too large; or if there is no such way to change sites.
        """
        for name in _NUMBERS:
            validate_setting(name, getattr(self, name))
        for name in _NUMBERS_OR_NONE:
            if getattr(self, name) is not None:
                validate_setting(name, getattr(self, name))
        validate_change(self.change)

    def first_window_s(self, *, is_hot_only: bool) -> float:
        """Return the length of a first learning window, in seconds.

        Args:
            is_hot_only: Whether only the sites that run are learned.
        """
        if self.learn_s is not None:
            return self.learn_s
        return FIRST_HOT_S if is_hot_only else LEARN_S

    @property
    def is_switched_off(self) -> bool:
        """Whether the fast path is switched off while it is changed."""
        return self.change == "switch-off"

    @property
    def schedule(self) -> WatchSchedule:
        """The policy's schedule, with what is set here."""
        base = self.policy.schedule
        sample_s = base.sample_s if self.sample_s is None else self.sample_s
        every_s = base.sample_every_s if self.sample_every_s is None else self.sample_every_s
        max_s = self.sample_every_max_s
        ratio = self.overhead_ratio
        return replace(
            base,
            learn_s=self.first_window_s(is_hot_only=False),
            sample_s=sample_s,
            min_part_s=min(base.min_part_s, sample_s),
            sample_every_s=every_s,
            sample_every_max_s=max(every_s, base.sample_every_max_s if max_s is None else max_s),
            overhead_ratio=base.overhead_ratio if ratio is None else ratio,
        )
