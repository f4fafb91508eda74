# SPDX-License-Identifier: Apache-2.0
"""From a trace to a workload: what happened when, at the program's own rate."""

from __future__ import annotations

import numpy as np
import pytest

from optpoline.simulate.from_trace import workload_of_trace
from optpoline.simulate.trace import (
    Burst,
    Trace,
    TraceError,
    TracePair,
    TraceSite,
    TraceTarget,
)
from optpoline.simulate.workload import Workload

MS = 1_000_000


def make_trace(*bursts: Burst, rate_hz: float | None = None) -> Trace:
    """Return a trace of two sites: site 1 with target 100, site 0 with 100 and 200."""
    sites = tuple(
        TraceSite(module="m", address=n, offset=n, function=None, kind="call", rate_hz=rate_hz)
        for n in range(2)
    )
    return Trace(
        program="p",
        sites=sites,
        targets=(
            TraceTarget(address=100, symbol=None),
            TraceTarget(address=200, symbol=None),
        ),
        pairs=(TracePair(1, 0), TracePair(0, 0), TracePair(0, 1)),
        bursts=bursts,
    )


def make_burst(
    start_ms: int, end_ms: int, pairs: list[int], marks: tuple[tuple[int, int], ...] = ()
) -> Burst:
    """Return a burst; marks are (branches made, millisecond)."""
    return Burst(
        start_ns=start_ms * MS,
        end_ns=end_ms * MS,
        pairs=np.array(pairs, np.uint32),
        marks=np.array([(n, ms * MS) for n, ms in marks], np.int64).reshape(-1, 2),
    )


def taken(workload: Workload, start_ms: float, end_ms: float) -> list[float]:
    """Return how often each pair is taken, in the workload's order: site 0 first."""
    return [
        float(n)
        for site in range(2)
        for n in workload.site_counts(site, start_ms / 1e3, end_ms / 1e3)
    ]


def test_pairs_are_in_the_order_of_sites() -> None:
    workload = workload_of_trace(make_trace(make_burst(0, 10, [0, 1, 1, 2, 2, 2])), "t")
    assert list(workload.pair_sites) == [0, 0, 1]
    assert list(workload.pair_targets) == [100, 200, 100]
    assert taken(workload, 0, 10) == [2, 3, 1]
    assert workload.seconds == pytest.approx(0.01)


def test_order_within_a_burst_is_kept_by_slice() -> None:
    burst = make_burst(0, 10, [0] * 8 + [1] * 8)
    workload = workload_of_trace(make_trace(burst), "t", slice_s=0.005)
    assert taken(workload, 0, 5) == [0, 0, 8]
    assert taken(workload, 5, 10) == [8, 0, 0]


def test_marks_tell_the_time() -> None:
    # Eight branches in the first millisecond, eight in the next nine.
    burst = make_burst(0, 10, [0] * 8 + [1] * 8, ((8, 1),))
    workload = workload_of_trace(make_trace(burst), "t", slice_s=0.001)
    assert taken(workload, 0, 1) == [0, 0, 8]
    assert sum(taken(workload, 1, 10)) == 8


def test_burst_stands_for_the_time_until_the_next() -> None:
    trace = make_trace(make_burst(0, 10, [0] * 100), make_burst(50, 60, [1] * 200))
    workload = workload_of_trace(trace, "t")
    assert workload.seconds == pytest.approx(0.06)
    assert taken(workload, 0, 50) == pytest.approx([0, 0, 500])
    assert taken(workload, 50, 60) == pytest.approx([200, 0, 0])


def test_speed_is_what_it_was_before_tracing() -> None:
    # 60 branches in 30 ms while traced, 2 sites x 3000 a second before: three times faster.
    trace = make_trace(make_burst(0, 30, [0] * 30 + [1] * 30), rate_hz=3000.0)
    workload = workload_of_trace(trace, "t")
    assert workload.seconds == pytest.approx(0.01)
    assert taken(workload, 0, 5) == pytest.approx([0, 0, 30])
    assert taken(workload, 5, 10) == pytest.approx([30, 0, 0])


def test_bursts_without_a_pause_last_as_long_as_the_program_would_have_taken() -> None:
    # Traced at a third of its speed, and 10 ms at full speed in between.
    trace = make_trace(
        make_burst(0, 30, [0] * 30 + [1] * 30), make_burst(40, 70, [2] * 60), rate_hz=3000.0
    )
    workload = workload_of_trace(trace, "t")
    assert workload.seconds == pytest.approx(0.03)
    # What a burst showed goes on until the next one.
    assert taken(workload, 0, 20) == pytest.approx([60, 0, 60])
    assert taken(workload, 20, 30) == pytest.approx([0, 60, 0])


def test_what_was_dropped_is_made_up_and_told() -> None:
    burst = Burst(
        start_ns=0,
        end_ns=10 * MS,
        pairs=np.zeros(10, np.uint32),
        marks=np.zeros((0, 2), np.int64),
        n_dropped=30,
        n_unknown=10,
    )
    workload = workload_of_trace(make_trace(burst), "t")
    assert sum(taken(workload, 0, 10)) == pytest.approx(40)
    assert [note.split()[0] for note in workload.notes] == ["30", "10"]
    assert "60.0%" in workload.notes[0]


def test_empty_bursts_are_left_out() -> None:
    workload = workload_of_trace(make_trace(make_burst(0, 10, []), make_burst(20, 30, [0])), "t")
    assert workload.seconds == pytest.approx(0.01)


def test_nothing_in_it() -> None:
    with pytest.raises(TraceError, match="t holds no branch"):
        workload_of_trace(make_trace(), "t")


@pytest.mark.parametrize("starts_ms", [(0, 1 << 40), (50, 20)])
def test_no_recording_has_such_times(starts_ms: tuple[int, int]) -> None:
    bursts = [make_burst(start_ms, start_ms + 10, [0]) for start_ms in starts_ms]
    with pytest.raises(TraceError, match="lasts too long, or not at all"):
        workload_of_trace(make_trace(*bursts), "t")
