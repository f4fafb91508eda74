# SPDX-License-Identifier: Apache-2.0
"""How memory and the controller's time grow with sites and CPUs.

Sizes follow from the layout of counter rows. Times are measured here and now, on
what the controller does for each site, with numpy on memory of the same shape:

* *poll*: the miss cells of all promoted sites are copied, subtracted and compared;
* *read*: the cells of a counting block are read from all rows and summed;
* *decide*: the policy is asked.

Beyond ``MAX_MEASURED_SITES`` a poll is scaled up in proportion. Every site is taken
to be promoted, which is the worst case: of 20,000 sites of a program some hundred are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from optpoline.learn.counting import FIRST_OPEN_SLOTS, SiteCounts, n_cells
from optpoline.model import CELL_SIZE, Addr, Count, Guard, Miss
from optpoline.promote.cost import CostModel
from optpoline.promote.policy import Policy, SiteHistory
from optpoline.promote.schedule import next_interval, poll_interval, stretch_factor
from optpoline.promote.tree import stake_cycles
from optpoline.simulate.sizes import counting_block_size, promoted_block_size
from optpoline.simulate.state import EngineModel
from optpoline.simulate.windows import SAMPLE_OPEN_SLOTS

__all__ = ["CPU_COUNTS", "SITE_COUNTS", "Measured", "Projection", "measure", "project", "row_size"]

SITE_COUNTS = (1_000, 10_000, 100_000, 1_000_000)
CPU_COUNTS = (1, 16, 64, 256)

MIN_ROW_SIZE = 512 << 10
ROW_SIZE_PER_SITE = 384
"""Bytes, as in ``patch/geometry.py``."""

MISS_CELL_SPACING = 16
"""Bytes from one promoted site's miss cell to the next, in the measurement."""

MAX_MEASURED_SITES = 100_000
MEASURED_ROWS = 17
N_REPEATS = 7

SITE_RATE_HZ = 1e5
"""Branches a second of a site whose windows are projected."""

CALM_S = 60.0
"""How long nothing has changed in the projection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the controller's work takes here and now.

    Attributes:
        poll_s: (sites, seconds of one poll over them), ascending.
        read_cell_s: Reading and summing one cell of one row.
        decide_s: Asking the policy about one site.
    """

    poll_s: tuple[tuple[int, float], ...]
    read_cell_s: float
    decide_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """What so many sites on so many CPUs take.

    Attributes:
        n_sites: Sites, all promoted.
        n_cpus: CPUs.
        reserved_size: Bytes of address space of all counter rows.
        table_size: Bytes of them that are ever written, if each site counts on each CPU.
        code_size: Bytes of blocks: the first counting block of each site, its promoted one,
            and the counting block of its present tree.
        poll_ratio: Controller seconds a second for polls.
        window_ratio: The same for windows: reading cells and asking the policy.
        windows_hz: Windows a second of all sites.
    """

    n_sites: int
    n_cpus: int
    reserved_size: int
    table_size: int
    code_size: int
    poll_ratio: float
    window_ratio: float
    windows_hz: float


def row_size(n_sites: int) -> int:
    """Return the bytes of one counter row.

    >>> row_size(1), row_size(1000)
    (524288, 524288)
    """
    return 1 << (max(MIN_ROW_SIZE, ROW_SIZE_PER_SITE * n_sites) - 1).bit_length()


def measure(policy: Policy, clock: Callable[[], float] = time.perf_counter) -> Measured:
    """Measure what the controller's work takes on this machine.

    Args:
        policy: Who is asked.
        clock: Seconds that only go forward.
    """
    sizes = [n for n in SITE_COUNTS if n <= MAX_MEASURED_SITES]
    return Measured(
        poll_s=tuple((n, _measure_poll(n, clock)) for n in sizes),
        read_cell_s=_measure_read(clock),
        decide_s=_measure_decide(policy, clock),
    )


def _typical(action: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return the median time of an action."""
    taken: list[float] = []
    for _ in range(N_REPEATS):
        begin_s = clock()
        action()
        taken.append(clock() - begin_s)
    return median(taken)


def _measure_poll(n_sites: int, clock: Callable[[], float]) -> float:
    """Return the seconds of one poll over so many sites."""
    # Sites that are promoted together have adjacent cells; later ones lie among others.
    span = bytes(MISS_CELL_SPACING * n_sites)
    cells = np.arange(n_sites, dtype=np.int64) * (MISS_CELL_SPACING // CELL_SIZE)
    seen = np.zeros(n_sites, np.uint64)
    judged = np.zeros(n_sites)
    due = np.full(n_sites, np.inf)

    def poll() -> None:
        now = np.frombuffer(bytearray(span), np.uint64)[cells]
        rate = (now - seen) / 0.1
        np.flatnonzero((rate > np.maximum(2e4, 2.0 * judged)) | (due <= 1.0))
        np.maximum(np.minimum(judged, rate), 0.81 * judged)

    return _typical(poll, clock)


def _measure_read(clock: Callable[[], float]) -> float:
    """Return the seconds for reading and summing one cell of one row, for a block each."""
    n_block = n_cells(2, SAMPLE_OPEN_SLOTS)
    n_blocks = 500
    rows = np.zeros((MEASURED_ROWS, n_block * n_blocks), np.uint64)

    def read() -> None:
        for number in range(n_blocks):
            columns: list[list[int]] = rows[:, number * n_block : (number + 1) * n_block].tolist()
            for row in columns:
                sum(row)

    return _typical(read, clock) / (n_blocks * n_block * MEASURED_ROWS)


def _measure_decide(policy: Policy, clock: Callable[[], float]) -> float:
    """Return the seconds for asking a policy about a promoted site of two targets."""
    window = SiteCounts(
        counts=(
            Count(target=Addr(0x401000), hit_count=7000),
            Count(target=Addr(0x402000), hit_count=3000),
        ),
        n_unknown=0,
    )
    decision = policy.decide(SiteHistory().view(window, window_s=0.02, now_s=0.0))
    history = SiteHistory().after(decision, 0.0)

    def decide() -> None:
        for _ in range(100):
            policy.decide(history.view(window, window_s=0.02, now_s=9.0))

    return _typical(decide, clock) / 100


def project(
    policy: Policy,
    measured: Measured,
    site_counts: Sequence[int] = SITE_COUNTS,
    cpu_counts: Sequence[int] = CPU_COUNTS,
    engine: EngineModel | None = None,
) -> list[Projection]:
    """Return what each number of sites takes on each number of CPUs."""
    engine = engine or EngineModel()
    return [
        _project_one(policy, measured, n_sites, n_cpus, engine)
        for n_sites in site_counts
        for n_cpus in cpu_counts
    ]


def _project_one(
    policy: Policy, measured: Measured, n_sites: int, n_cpus: int, engine: EngineModel
) -> Projection:
    """Return what so many sites on so many CPUs take."""
    schedule = policy.schedule
    n_rows = 1 + n_cpus
    cells = n_cells(0, FIRST_OPEN_SLOTS) + 1 + n_cells(2, SAMPLE_OPEN_SLOTS)
    interval_s = next_interval(
        schedule,
        rate_hz=SITE_RATE_HZ,
        stake_cycles=_two_way_stake(),
        since_change_s=CALM_S,
    )
    windows_hz = 0.0
    if math.isfinite(interval_s):
        # The same for all sites, so one stands for them.
        stretch = stretch_factor(schedule, [(SITE_RATE_HZ, interval_s / n_sites)])
        windows_hz = n_sites / (interval_s * stretch)
    window_s = n_cells(2, SAMPLE_OPEN_SLOTS) * n_rows * measured.read_cell_s + measured.decide_s
    return Projection(
        n_sites=n_sites,
        n_cpus=n_cpus,
        reserved_size=row_size(n_sites) * n_rows,
        # Rows have room for so much; who finds none is not looked at again.
        table_size=min(row_size(n_sites), cells * CELL_SIZE * n_sites) * n_rows,
        code_size=n_sites
        * (
            counting_block_size(0, FIRST_OPEN_SLOTS)
            + promoted_block_size(2)
            + counting_block_size(2, SAMPLE_OPEN_SLOTS)
        ),
        poll_ratio=_poll_s(measured, n_sites) / poll_interval(engine.poll_s, math.inf),
        window_ratio=windows_hz * window_s,
        windows_hz=windows_hz,
    )


def _two_way_stake() -> float:
    """Return what is at stake at a site of two targets."""
    tree = Guard(Addr(1), None, Guard(Addr(2), None, Miss()))
    return stake_cycles(tree, CostModel())


def _poll_s(measured: Measured, n_sites: int) -> float:
    """Return the seconds of one poll, scaled up where it was not measured."""
    for n_measured, seconds in measured.poll_s:
        if n_sites <= n_measured:
            return seconds
    n_most, seconds = measured.poll_s[-1]
    return seconds * n_sites / n_most
