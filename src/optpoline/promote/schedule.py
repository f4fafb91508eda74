# SPDX-License-Identifier: Apache-2.0
"""When a promoted site is looked at again, for how long, and what that may cost.

A *window* is a time during which a site counts its targets. While it does, each
branch costs some cycles more, and the controller has work to do; so windows are
short, and their *duty cycle* is bounded: all sites together may cost
``overhead_ratio`` of one CPU on average, however many and however hot they are.

How often a site is looked at follows from what may be lost meanwhile. Let a
window cost ``c`` CPU seconds, let the site lose at most ``s`` of a CPU while its
tree is out of date (its *stake*), and let its workload change every ``p``
seconds. With windows ``t`` apart a change is noticed ``t / 2`` late on average,
so looking costs ``c / t`` and not looking costs ``s * t / (2 * p)``: the sum is
least at ``t = sqrt(2 * c * p / s)``. ``p`` is not known; a site that has been calm
for a while is taken to stay so about as long again, and one that has changed lately
to do so again as soon. So the intervals of a steady site grow with the square root of
time, and a site with a single guard, where only misses could show anything, has no
stake and is hardly looked at.

Pure functions of numbers: the controller and the simulator use the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from optpoline.promote.cost import CPU_HZ

__all__ = [
    "WatchSchedule",
    "forgotten_ratio",
    "look_interval",
    "next_interval",
    "poll_interval",
    "stretch_factor",
    "unseen_interval",
]


MAX_SLOTS = 128
"""Most slots that a policy may ask for: no tree tells more targets apart, and every site
is given them at once."""


CALM_AFTER_S = 6.0
"""Time without a change of any site after which polls are rarer: a poll takes the
controller 0.3 to 0.5 ms, with its caches cold, and settled means hardly any work."""

CALM_POLL_RATIO = 2.5
"""By how much the time between polls is longer then: a site that goes elsewhere is noticed after
an eighth of a second at the latest."""

KEPT_PER_S = 0.12
"""What is left after a second of a site's judged miss rate when it no longer misses: a level
of misses that was found to be no reason for a change is taken for normal for so long."""


def poll_interval(poll_s: float, since_change_s: float) -> float:
    """Return the time to the next poll, in seconds.

    Args:
        poll_s: While sites change.
        since_change_s: Since any site was promoted, promoted anew or demoted.

    >>> poll_interval(0.05, 3.0), poll_interval(0.05, 30.0)
    (0.05, 0.125)
    """
    return poll_s if since_change_s < CALM_AFTER_S else CALM_POLL_RATIO * poll_s


def look_interval(n_calm: int, *, every_s: float, n_calm_looks: int, max_s: float) -> float:
    """Return the time to the next look at what runs on thunks, in seconds.

    Args:
        n_calm: Looks in a row, one or more, that were followed by no window.
        every_s: Time between the first of them.
        n_calm_looks: Looks after which it doubles, each time.
        max_s: The most that it comes to.

    >>> [look_interval(n, every_s=1.0, n_calm_looks=4, max_s=8.0) for n in (1, 4, 5, 9, 99)]
    [1.0, 1.0, 2.0, 4.0, 8.0]
    """
    n_doubled = min((n_calm - 1) // n_calm_looks, 32)
    return min(max_s, every_s * 2.0**n_doubled)


def forgotten_ratio(elapsed_s: float) -> float:
    """Return what is left of a judged miss rate after some time without as many misses.

    >>> round(forgotten_ratio(0.5) ** 2, 2)
    0.12
    """
    return float(KEPT_PER_S**elapsed_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSchedule:
    """When windows are, and how long.

    Attributes:
        learn_s: Length of a site's first window.
        sample_s: Longest time that a later window counts, all its parts together.
        n_parts: Parts of a later window, one at each poll: spread over time they meet
            more of a program's short phases than one piece of the same length.
        min_part_s: Shortest part; a controller in Python cannot time shorter ones.
        enough_count: Branches after which a window has counted enough: shares are known
            to 0.5 % then (1/(2*sqrt(n)) at one half).
        sample_every_s: Shortest interval between windows of a site.
        sample_every_max_s: Longest; the bound on overhead may stretch even that.
            ``inf`` in both: a site is never looked at again.
        confirm_every_s: Interval after a decision that wants a second window.
        change_every_s: How often the workload of a site nobody knows is taken to change.
        n_followed_changes: Changes up to which a site that has had so many lately is taken
            to change that much more often. One with more never settles: it is not
            followed any more, and is looked at as one that nobody knows.
        overhead_ratio: What all later windows may cost on average, as a share of one
            CPU, the program's and the controller's work together.
        counting_cycles: What a counted branch costs more than a guarded one. Measured: 0.5
            to 0.9 ns of CPU time, 1.6 to 2.6 cycles, per branch counted in its CPU's row.
        window_cost_s: What a window costs whatever it counts: the controller's work
            on its parts, and the program's instruction cache misses in the counting block.
        change_cost_s: What promoting a site anew costs, in CPU seconds of the controller:
            counting until its targets are known, planning and writing the block. Measured: 10 ms.
        miss_rate_floor_hz: Misses a second below which a site is not looked at early:
            at 20 cycles each they cost 0.01 % of a CPU. ``inf``: never early.
        miss_growth: Early look when the miss rate has grown by this factor since the
            site was last judged; below it the next regular window is soon enough.
        max_slots: Most unknown targets that a counting block tells apart, first come
            first served, the rest in one catch-all count (``MAX_SLOTS`` at most); 0:
            tables grow as needed.
    """

    learn_s: float = 1.0
    sample_s: float = 0.020
    n_parts: int = 4
    min_part_s: float = 0.0005
    enough_count: int = 10_000
    sample_every_s: float = 0.25
    sample_every_max_s: float = 60.0
    confirm_every_s: float = 0.0
    change_every_s: float = 5.0
    n_followed_changes: int = 4
    overhead_ratio: float = 0.01
    counting_cycles: float = 3.0
    window_cost_s: float = 0.001
    change_cost_s: float = 0.01
    miss_rate_floor_hz: float = 20_000.0
    miss_growth: float = 2.0
    max_slots: int = 0

    def __post_init__(self) -> None:
        """Refuse what no clock could follow."""
        if not 0.0 <= self.sample_every_s <= self.sample_every_max_s:
            raise ValueError("sample_every_s must be between 0 and sample_every_max_s")
        if self.n_parts < 1 or not 0.0 < self.min_part_s <= self.sample_s:
            raise ValueError("a window has at least one part, from min_part_s to sample_s long")
        if self.overhead_ratio <= 0.0:
            raise ValueError("overhead_ratio must be above 0")
        if self.max_slots > MAX_SLOTS:
            raise ValueError(f"max_slots must be {MAX_SLOTS} or less")

    @property
    def is_watching(self) -> bool:
        """Whether promoted sites are ever looked at again without a miss."""
        return math.isfinite(self.sample_every_s)

    def part_s(self, rate_hz: float) -> float:
        """Return how long a part of a window should count at a site of that rate."""
        longest = self.sample_s / self.n_parts
        if rate_hz <= 0.0:
            return longest
        shortest = min(longest, self.min_part_s)
        return min(longest, max(shortest, self.enough_count / self.n_parts / rate_hz))

    def window_cpu_s(self, rate_hz: float) -> float:
        """Return what one window of a site costs, in CPU seconds."""
        counted = rate_hz * self.n_parts * self.part_s(rate_hz)
        return self.window_cost_s + counted * self.counting_cycles / CPU_HZ


def next_interval(
    schedule: WatchSchedule,
    *,
    rate_hz: float,
    stake_cycles: float,
    since_change_s: float,
    n_changes: int = 0,
    stretch: float = 1.0,
    wants_confirmation: bool = False,
    hold_s: float = 0.0,
) -> float:
    """Return when a promoted site is looked at next, in seconds from its last window.

    Args:
        schedule: The policy's.
        rate_hz: Branches a second of the site.
        stake_cycles: What its tree may cost more per branch than the best one,
            should the weights of its targets change (``stake_cycles`` of promote/tree).
        since_change_s: How long the site has been as it is.
        n_changes: Its changes lately, those not lived down.
        stretch: ``stretch_factor`` of all sites.
        wants_confirmation: Whether the last decision was CONFIRM.
        hold_s: How long no change would be made anyway.
    """
    if not schedule.is_watching:
        return math.inf
    if wants_confirmation:
        return schedule.confirm_every_s
    stake = stake_cycles * rate_hz / CPU_HZ
    best_s = math.inf
    if stake > 0.0:
        hurry = 1 + n_changes if n_changes < schedule.n_followed_changes else 1
        calm_s = schedule.change_every_s / hurry + max(0.0, since_change_s)
        best_s = math.sqrt(2.0 * schedule.window_cpu_s(rate_hz) * calm_s / stake)
    interval_s = min(schedule.sample_every_max_s, max(schedule.sample_every_s, best_s))
    return max(hold_s, interval_s * max(1.0, stretch))


def unseen_interval(schedule: WatchSchedule, n_sites: int) -> float:
    """Return when a site is looked at that has its tree from others and never ran, in seconds.

    All of these together have as many windows as one site at rest, however many there
    are: nothing is at stake until they run, and if they miss that shows without looking.
    A first window has a block written as well, which costs more than the window.

    Args:
        schedule: The policy's.
        n_sites: How many such sites there are.

    >>> unseen_interval(WatchSchedule(), 1), unseen_interval(WatchSchedule(), 2000)
    (60.0, 120000.0)
    """
    return max(1, n_sites) * schedule.sample_every_max_s


def stretch_factor(schedule: WatchSchedule, sites: Iterable[tuple[float, float]]) -> float:
    """Return by how much all intervals must be longer to stay within the overhead.

    Args:
        schedule: The policy's.
        sites: (rate_hz, interval_s without stretching) of each promoted site.

    >>> schedule = WatchSchedule(window_cost_s=0.001, overhead_ratio=0.01)
    >>> round(stretch_factor(schedule, [(0.0, 1.0)] * 40), 3)
    4.0
    """
    cost_ratio = sum(
        schedule.window_cpu_s(rate_hz) / interval_s
        for rate_hz, interval_s in sites
        if interval_s > 0.0
    )
    return max(1.0, cost_ratio / schedule.overhead_ratio)
