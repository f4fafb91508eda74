# SPDX-License-Identifier: Apache-2.0
"""What a recorded program did: sequences of (site, target), in bursts.

Sites and targets are tables; a *pair* is one site with one target of it, and a
sequence names pairs by their number. A *burst* is a piece of the program's run
without a hole, its branches in the order in which all threads took them. Time
is told by *marks*: so many branches of the burst had been made at that moment.

A trace is what was seen, not what was there: what is known to be missing
(overwritten before it was read, targets not known when recording began) is
counted beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optpoline.errors import OptpolineError
from optpoline.model import Table

__all__ = ["Burst", "Trace", "TraceError", "TracePair", "TraceSite", "TraceTarget"]


class TraceError(OptpolineError):
    """A file is no trace, is damaged, or is of a version that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSite:
    """One site.

    Attributes:
        module: Path of its module.
        address: In the process that was recorded.
        offset: Address minus the module's load bias.
        function: ``name+0x12``, or None.
        kind: "call", "jump" or "cond_jump".
        rate_hz: Branches a second when it was counted, before it was traced; None if unknown.
            Tracing slows a program down, counting does so less.
        table: The table of dynamic calls that it is of, or None.
        max_guards: Guards that its source allows at most, 0 for any number.
        is_plain: Whether its baseline is a plain indirect branch, not a retpoline.
    """

    module: str
    address: int
    offset: int
    function: str | None
    kind: str
    rate_hz: float | None = None
    table: Table | None = None
    max_guards: int = 0
    is_plain: bool = False

    @property
    def name(self) -> str:
        """How people know it."""
        return self.function or f"{self.module.rsplit('/', 1)[-1]}+{self.offset:#x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceTarget:
    """One target.

    Attributes:
        address: In the process that was recorded.
        symbol: ``name`` or ``name+0x12``, or None.
    """

    address: int
    symbol: str | None


@dataclass(frozen=True, slots=True)
class TracePair:
    """One site and one target of it, as numbers in the tables."""

    site: int
    target: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Burst:
    """One piece of the run without a hole.

    Attributes:
        start_ns: CLOCK_MONOTONIC when it began.
        end_ns: And when it ended.
        pairs: Pair numbers in the order of execution: u32[n].
        marks: i64[n_marks, 2], ascending: (branches made, CLOCK_MONOTONIC).
        n_dropped: Branches of it that were overwritten before they were read. The ones kept
            follow each other but for that hole.
        n_unknown: Branches meanwhile to targets that no pair stands for.
    """

    start_ns: int
    end_ns: int
    pairs: NDArray[np.uint32]
    marks: NDArray[np.int64]
    n_dropped: int = 0
    n_unknown: int = 0

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.end_ns - self.start_ns) / 1e9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Everything a trace file holds.

    Attributes:
        program: What was recorded, for people.
        sites: Its sites.
        targets: All targets of all sites.
        pairs: What the numbers in bursts mean.
        bursts: In the order of time.
        notes: Sentences worth telling.
    """

    program: str
    sites: tuple[TraceSite, ...]
    targets: tuple[TraceTarget, ...]
    pairs: tuple[TracePair, ...]
    bursts: tuple[Burst, ...]
    notes: tuple[str, ...] = ()

    @property
    def n_branches(self) -> int:
        """Branches recorded."""
        return sum(len(burst.pairs) for burst in self.bursts)

    @property
    def n_dropped(self) -> int:
        """Branches overwritten before they were read."""
        return sum(burst.n_dropped for burst in self.bursts)

    @property
    def n_unknown(self) -> int:
        """Branches to targets that no pair stands for."""
        return sum(burst.n_unknown for burst in self.bursts)

    @property
    def seconds(self) -> float:
        """From the first burst's begin to the last one's end."""
        if not self.bursts:
            return 0.0
        return (self.bursts[-1].end_ns - self.bursts[0].start_ns) / 1e9
