# SPDX-License-Identifier: Apache-2.0
"""From a recorded trace to a workload.

A burst is a sample of what the program did from its begin to the begin of the
next one. It is cut into pieces as long as a slice, and these are repeated until
the next burst: short phases stay what they are, and long ones last as long as
they did. Only a burst itself took longer than it would have: tracing slows a program
down. How fast the program branches is taken from the counts made before
tracing; bursts keep their rates relative to each
other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from optpoline.simulate.trace import Burst, Trace, TraceError
from optpoline.simulate.workload import SLICE_S, Workload, WorkloadSite

__all__ = ["workload_of_trace"]

MAX_SLICES = 1 << 26
"""Two days; a number of each takes 512 MiB."""

MAX_CELLS = 1 << 26
"""Pieces times pairs: 512 MiB. Longer traces are cut into fewer, longer pieces."""


def workload_of_trace(trace: Trace, name: str, slice_s: float = SLICE_S) -> Workload:
    """Return a trace as a workload.

    Args:
        trace: At least one branch.
        name: For people.
        slice_s: Length of a slice in seconds.

    Raises:
        TraceError: if there is nothing in it, or if it cannot be from one recording.
    """
    bursts = [burst for burst in trace.bursts if len(burst.pairs)]
    if not bursts:
        raise TraceError(f"{name} holds no branch", hint="record for longer, or a busy program")
    stretch = _stretch(trace, bursts)
    n_slices_of = _n_slices(bursts, slice_s, stretch)
    begins_ns = [burst.start_ns for burst in bursts]
    if begins_ns != sorted(begins_ns) or sum(n_slices_of) > MAX_SLICES:
        raise TraceError(f"{name} lasts too long, or not at all", hint="record it again")
    order, rank = _order_pairs(trace)
    most_pieces = max(1, MAX_CELLS // len(order) // len(bursts))
    contents: list[NDArray[np.float64]] = []
    slices: list[NDArray[np.int64]] = []
    factors: list[NDArray[np.float64]] = []
    n_rows = 0
    for burst, n_slices in zip(bursts, n_slices_of, strict=True):
        real_s = _real_s(burst, stretch)
        n_pieces = min(most_pieces, max(1, round(real_s / slice_s)))
        rows = _pieces(burst, rank, n_pieces)
        # Each piece stands for one slice at the burst's own rate.
        rows *= slice_s / (real_s / n_pieces)
        contents.append(rows)
        slices.append(n_rows + np.arange(n_slices) % n_pieces)
        factors.append(np.ones(n_slices))
        n_rows += n_pieces
    return Workload(
        name=name,
        sites=tuple(
            WorkloadSite(
                name=site.name,
                kind=site.kind,
                table=site.table,
                max_guards=site.max_guards,
                is_plain=site.is_plain,
            )
            for site in trace.sites
        ),
        pair_sites=np.array([trace.pairs[i].site for i in order], np.int64),
        pair_targets=np.array(
            [trace.targets[trace.pairs[i].target].address for i in order], np.int64
        ),
        contents=np.concatenate(contents),
        slices=np.concatenate(slices),
        factors=np.concatenate(factors),
        slice_s=slice_s,
        notes=_notes(trace),
    )


def _n_slices(bursts: list[Burst], slice_s: float, stretch: float) -> list[int]:
    """Return how many slices each burst stands for: until the next one begins."""
    nexts_ns = [*(burst.start_ns for burst in bursts[1:]), *(one.end_ns for one in bursts[-1:])]
    counts: list[int] = []
    for burst, next_ns in zip(bursts, nexts_ns, strict=True):
        pause_s = max(0, next_ns - burst.end_ns) / 1e9
        counts.append(max(1, round((_real_s(burst, stretch) + pause_s) / slice_s)))
    return counts


def _real_s(burst: Burst, stretch: float) -> float:
    """Return how long a burst would have lasted without tracing."""
    return max(1e-9, burst.seconds) / stretch


def _order_pairs(trace: Trace) -> tuple[list[int], NDArray[np.int64]]:
    """Return the pairs in the order of sites, and where each pair is in it."""
    order = sorted(range(len(trace.pairs)), key=lambda i: (trace.pairs[i].site, i))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return order, rank


def _stretch(trace: Trace, bursts: list[Burst]) -> float:
    """Return how many times slower the program was while it was traced; 1 if unknown."""
    rates = [site.rate_hz for site in trace.sites if site.rate_hz is not None]
    seconds = sum(burst.seconds for burst in bursts)
    n_made = sum(len(burst.pairs) + burst.n_dropped + burst.n_unknown for burst in bursts)
    if not rates or not sum(rates) or not seconds:
        return 1.0
    return max(1.0, sum(rates) / (n_made / seconds))


def _pieces(burst: Burst, rank: NDArray[np.int64], n_pieces: int) -> NDArray[np.float64]:
    """Return how often each pair is taken in each of ``n_pieces`` equal parts of a burst.

    Branches that were lost are made up by those that were not.
    """
    n_pairs = len(rank)
    made = np.arange(len(burst.pairs))
    if len(burst.marks):
        # Between marks the rate is taken as constant.
        when = np.interp(
            made,
            np.concatenate(([0], burst.marks[:, 0], [len(burst.pairs)])),
            np.concatenate(([burst.start_ns], burst.marks[:, 1], [burst.end_ns])) - burst.start_ns,
        )
        length = max(1, burst.end_ns - burst.start_ns)
    else:
        when, length = made, len(burst.pairs)
    piece = np.clip((when * n_pieces / length).astype(np.int64), 0, n_pieces - 1)
    flat = np.bincount(piece * n_pairs + rank[burst.pairs], minlength=n_pieces * n_pairs)
    lost = burst.n_dropped / len(burst.pairs)
    counts: NDArray[np.float64] = flat.reshape(n_pieces, n_pairs) * np.float64(1.0 + lost)
    return counts


def _notes(trace: Trace) -> tuple[str, ...]:
    """Return what is missing in the trace."""
    notes = list(trace.notes)
    n_all = trace.n_branches + trace.n_dropped + trace.n_unknown
    if trace.n_dropped:
        notes.append(
            f"{trace.n_dropped:,} branches ({trace.n_dropped / n_all:.1%}) were overwritten "
            "before they were read; the others stand for them"
        )
    if trace.n_unknown:
        notes.append(
            f"{trace.n_unknown:,} branches ({trace.n_unknown / n_all:.1%}) went to targets "
            "that were not known when recording began; they are left out"
        )
    return tuple(notes)
