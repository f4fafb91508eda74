# SPDX-License-Identifier: Apache-2.0
"""What a counting block of the engine would have seen of a workload.

A window has *stages*, one for each counting block of it: a block has guards for
the targets known when it was made, and open slots for others; whoever finds no
slot is counted together. At each wave a block whose slots were too few gets a
successor. Slots go to those that come first: targets are drawn at random, by
their share, until all slots are taken.

The rules are the engine's own (``learn.counting.next_open_slots``); its constants
that lie in the controller are repeated here, and a test holds them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optpoline.learn.counting import SiteCounts, next_open_slots, spread_unknown
from optpoline.model import Addr, Count
from optpoline.simulate.workload import Workload

__all__ = [
    "MAX_COUNTED_TARGETS",
    "MIN_WINDOW_COUNT",
    "SAMPLE_OPEN_SLOTS",
    "Stage",
    "Window",
    "observe",
    "run_window",
]

SAMPLE_OPEN_SLOTS = 8
MIN_WINDOW_COUNT = 256
MAX_COUNTED_TARGETS = 128
"""As in ``learning``, ``window_counts`` and ``growing`` of ``controller/``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One counting block of a window.

    Attributes:
        start_s: When it was entered.
        end_s: When its successor was, or the window ended.
        known: Targets that it had guards for, with what was known of their counts.
        n_open: Slots for others.
    """

    start_s: float
    end_s: float
    known: tuple[Count, ...]
    n_open: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One window of one site.

    Attributes:
        counts: What tells the shares of its targets best.
        window_s: How long that took.
        total: All branches counted.
        stages: Its blocks, one after the other.
    """

    counts: SiteCounts
    window_s: float
    total: int
    stages: tuple[Stage, ...]


def observe(
    taken: NDArray[np.float64],
    targets: NDArray[np.int64],
    known: Sequence[Addr],
    n_open: int,
    rng: np.random.Generator,
) -> SiteCounts:
    """Return what one block counts.

    Args:
        taken: How often each target is taken.
        targets: Their addresses.
        known: Targets that the block has guards for.
        n_open: Slots for others.
        rng: Decides who comes first.
    """
    numbers = np.rint(taken).astype(np.int64)
    is_known = np.isin(targets, np.array(known, np.int64))
    rest = np.flatnonzero(~is_known & (numbers > 0))
    if len(rest) > n_open:
        # The first arrivals of Poisson processes are ordered by exponential(1) / rate.
        arrival = rng.exponential(size=len(rest)) / numbers[rest]
        rest = rest[np.argsort(arrival)[:n_open]]
    seen = np.concatenate((np.flatnonzero(is_known & (numbers > 0)), rest))
    counts = [Count(target=Addr(int(targets[i])), hit_count=int(numbers[i])) for i in seen]
    counts.sort(key=lambda count: (-count.hit_count, count.target))
    return SiteCounts(counts=tuple(counts), n_unknown=int(numbers.sum() - numbers[seen].sum()))


def run_window(
    workload: Workload,
    site: int,
    start_s: float,
    end_s: float,
    *,
    known: tuple[Count, ...],
    n_open: int,
    max_slots: int,
    wave_s: float,
    rng: np.random.Generator,
) -> Window:
    """Let a site count for a while.

    Args:
        workload: What it does.
        site: Which.
        start_s: Begin of the window.
        end_s: End.
        known: Targets that its block has guards for.
        n_open: Slots of the first block.
        max_slots: Slots of every block, which then gets no successor; 0: as many as needed.
        wave_s: Time between looks at full slots.
        rng: Decides who comes first.
    """
    targets = workload.pair_targets[workload.pairs_of(site)]
    stages: list[Stage] = []
    earlier: list[SiteCounts] = []
    begin_s = start_s
    n_open = max_slots or n_open

    def look(until_s: float) -> SiteCounts:
        taken = workload.site_counts(site, begin_s, until_s)
        return observe(taken, targets, [count.target for count in known], n_open, rng)

    now_s = start_s
    # Who needs no successor at the end needed none before, but for a short phase.
    while not max_slots and len(known) < MAX_COUNTED_TARGETS and next_open_slots(look(end_s)):
        now_s += wave_s
        if now_s >= end_s:
            break
        latest = look(now_s)
        n_more = next_open_slots(latest)
        if n_more:
            stages.append(Stage(start_s=begin_s, end_s=now_s, known=known, n_open=n_open))
            earlier.append(latest)
            known, n_open, begin_s = latest.counts[:MAX_COUNTED_TARGETS], n_more, now_s
    latest = look(end_s)
    stages.append(Stage(start_s=begin_s, end_s=end_s, known=known, n_open=n_open))
    telling = latest
    is_telling = not earlier or latest.total >= MIN_WINDOW_COUNT
    for counts in reversed(() if is_telling else earlier):
        telling = spread_unknown(counts, telling)
    return Window(
        counts=telling,
        window_s=end_s - (begin_s if is_telling else start_s),
        total=latest.total + sum(counts.total for counts in earlier),
        stages=tuple(stages),
    )
