# SPDX-License-Identifier: Apache-2.0
"""What is said about samples that were taken in turn: medians and bootstrap intervals.

A *round* asks every variant once, so sample ``i`` of each variant was taken within the
same second or so. Ratios are formed inside a round, before the median, so that the
machine growing slower for a while cancels out; intervals resample whole rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Estimate",
    "geometric_mean",
    "loss",
    "median",
    "overhead",
    "recovered",
    "recovered_mean",
]

RESAMPLES = 4000
"""Bootstrap resamples: the ends of a 95 % interval then vary by about 1 % of its width."""

LEVEL = 0.95
SEED = 20_250
"""A fixed seed: the same samples always give the same interval."""

Samples = Sequence[int] | Sequence[float]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its 95 % bootstrap percentile interval.

    Attributes:
        value: The statistic of the samples themselves.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float


def median(samples: Samples) -> Estimate:
    """Median of one variant's samples, in their unit.

    >>> median([3, 1, 2]).value
    2.0
    """
    values = _as_floats(samples)
    drawn = np.median(values[_resample(len(values))], axis=1)
    return _estimate(float(np.median(values)), drawn)


def overhead(plain: Samples, other: Samples) -> Estimate:
    """Median of ``other / plain - 1``: 0.5 means that ``other`` takes half as long again.

    >>> round(overhead([10, 10], [15, 15]).value, 3)
    0.5
    """
    ratios = _as_floats(other) / _as_floats(plain, n_rounds=len(other))
    drawn = np.median(ratios[_resample(len(ratios))], axis=1)
    return _estimate(float(np.median(ratios)) - 1.0, drawn - 1.0)


def loss(before: Samples, after: Samples) -> Estimate:
    """By how much ``after`` is slower than ``before``; negative where it is faster."""
    return overhead(before, after)


def recovered(plain: Samples, retpoline: Samples, promoted: Samples) -> Estimate:
    """Share of the retpolines' cost that is gone: 1.0 means as fast as plain.

    (retpoline - promoted) / (retpoline - plain), each divided by its round's plain time
    and reduced to its median first.

    >>> round(recovered([10, 20], [20, 40], [11, 22]).value, 3)
    0.9
    """
    base = _as_floats(plain)
    slow = _as_floats(retpoline, n_rounds=len(base)) / base
    fast = _as_floats(promoted, n_rounds=len(base)) / base
    picks = _resample(len(base))
    drawn = _recovered_of(np.median(slow[picks], axis=1), np.median(fast[picks], axis=1))
    value = _recovered_of(np.median(slow, keepdims=True), np.median(fast, keepdims=True))
    return _estimate(float(value[0]), drawn)


def recovered_mean(triples: Sequence[tuple[Samples, Samples, Samples]]) -> Estimate:
    """Geometric mean of ``recovered`` over several workloads, each resampled on its own.

    Args:
        triples: (plain, retpoline, promoted) samples of each workload.

    Raises:
        ValueError: if there is no workload.
    """
    if not triples:
        raise ValueError("a mean needs at least one workload")
    rng = np.random.default_rng(SEED)
    values: list[float] = []
    logs = np.zeros(RESAMPLES)
    for plain, retpoline, promoted in triples:
        values.append(recovered(plain, retpoline, promoted).value)
        base = _as_floats(plain)
        slow = _as_floats(retpoline, n_rounds=len(base)) / base
        fast = _as_floats(promoted, n_rounds=len(base)) / base
        picks = rng.integers(0, len(base), (RESAMPLES, len(base)))
        drawn = _recovered_of(np.median(slow[picks], axis=1), np.median(fast[picks], axis=1))
        logs += np.log(np.maximum(drawn, _TINY))
    return _estimate(geometric_mean(values), np.exp(logs / len(triples)))


def geometric_mean(values: Samples) -> float:
    """Geometric mean; a value that is not positive makes it 0, the worst there is.

    >>> round(geometric_mean([1.0, 4.0]), 3)
    2.0
    """
    floats = _as_floats(values)
    if bool(np.any(floats <= 0)):
        return 0.0
    return float(np.exp(np.mean(np.log(floats))))


_TINY = 1e-9
"""Stands for a recovered share of zero or less where a logarithm is taken."""


def _recovered_of(slow: Floats, fast: Floats) -> Floats:
    """Recovered shares of times given as multiples of plain.

    Where retpolines cost nothing there is nothing to recover: the share is undefined, and
    counts as 0 so that such a workload never looks good.
    """
    cost = slow - 1.0
    return np.divide(slow - fast, cost, out=np.zeros_like(cost), where=cost != 0.0)


def _as_floats(samples: Samples, *, n_rounds: int | None = None) -> Floats:
    """Check what came in, and make an array of it."""
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError("no samples")
    if n_rounds is not None and values.size != n_rounds:
        raise ValueError(f"{values.size} samples where the other variant has {n_rounds}")
    return values


def _resample(n_rounds: int) -> NDArray[np.intp]:
    """Draw rounds with replacement, as indices of shape (RESAMPLES, n_rounds)."""
    return np.random.default_rng(SEED).integers(0, n_rounds, (RESAMPLES, n_rounds), dtype=np.intp)


def _estimate(value: float, drawn: Floats) -> Estimate:
    """Put the percentile interval around a value."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Estimate(value=value, low=float(low), high=float(high))
