# SPDX-License-Identifier: Apache-2.0
"""The bars that a release has to clear, and whether a measurement cleared its bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench import statistics
from bench.build import Variant
from bench.programs.cxx import n_classes
from bench.statistics import Estimate
from bench.workload import PROMOTED, Measured

__all__ = ["Verdict", "group_mean", "judge_group", "judge_workload", "peer_mean"]

_LUA_MEAN = 0.97
_LUA_EACH = 0.93
_REAL = 0.90
_OVERHEAD = 0.10
_LOSS = 0.01
_CXX = 0.95
_CXX_CLASSES = 4
_NOISY = 0.2
"""Width of an interval of recovered shares beyond which nothing is claimed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was asked of a measurement, and whether it was met.

    Attributes:
        bar: What had to be reached, in words, or "" where it is only reported.
        is_met: Whether it was; None where it is only reported.
        is_noisy: Whether the interval is too wide to tell; met or not means little then.
    """

    bar: str
    is_met: bool | None
    is_noisy: bool = False

    @property
    def word(self) -> str:
        """Say it in a word."""
        if self.is_met is None:
            return "reported"
        if self.is_noisy:
            return "too noisy"
        return "met" if self.is_met else "MISSED"


_REPORTED = Verdict(bar="", is_met=None)


def judge_workload(row: Measured) -> Verdict:
    """Hold a workload against the bar of its group."""
    if PROMOTED not in row.samples:
        return _REPORTED
    match row.group:
        case "lua":
            return _at_least(_LUA_EACH, row.recovered)
        case "sqlite" | "redis" if row.overhead.value >= _OVERHEAD:
            return _at_least(_REAL, row.recovered)
        case "sqlite" | "redis":
            return Verdict(bar="a loss of more than 1 % is excluded", is_met=row.loss.high <= _LOSS)
        case "cxx" if n_classes(row.name) <= _CXX_CLASSES:
            return _at_least(_CXX, row.recovered)
        case _:
            return _REPORTED


def judge_group(group: str, rows: Sequence[Measured]) -> Verdict:
    """Hold the geometric mean of a group against its bar; only Lua has one."""
    mean = group_mean(rows)
    if group != "lua" or mean is None:
        return _REPORTED
    return _at_least(_LUA_MEAN, mean)


def group_mean(rows: Sequence[Measured]) -> Estimate | None:
    """Geometric mean of what promotion recovered; None where nothing was promoted."""
    return _mean(rows, PROMOTED)


def peer_mean(rows: Sequence[Measured]) -> Estimate | None:
    """Geometric mean of what ``-fprofile-use`` recovers; None where it was not built."""
    return _mean(rows, Variant.PGO.value)


def _at_least(bar: float, recovered: Estimate) -> Verdict:
    """Hold a recovered share against the least that it may be."""
    return Verdict(
        bar=f"at least {100 * bar:.0f} % recovered",
        is_met=recovered.value >= bar,
        is_noisy=recovered.high - recovered.low > _NOISY,
    )


def _mean(rows: Sequence[Measured], variant: str) -> Estimate | None:
    """Geometric mean of what one variant recovered, over the workloads that have it."""
    triples = [
        (row.of(Variant.PLAIN), row.of(Variant.RETPOLINE), row.samples[variant])
        for row in rows
        if variant in row.samples
    ]
    return statistics.recovered_mean(triples) if triples else None
