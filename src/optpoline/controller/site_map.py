# SPDX-License-Identifier: Apache-2.0
"""Tell from where a thread was met, and from its stack, which sites it runs.

The time that a retpoline costs is seen in two places. A part of the samples falls inside its
thunk: of a program that did little else, 7 % on the machine this was tried on. Most fall on the
first instruction of the target, which is where an interrupt finds a thread that waited for
the return. In both places the return address of a call site is at a known place of the stack
(GCC's body, Clang's likewise)::

        call 1f                (%rsp)
    2:  pause ; lfence ; jmp 2b
    1:  mov %REG,(%rsp)       8(%rsp)      label 2 is at (%rsp)
        ret                   8(%rsp)      the target is at (%rsp)
    target:                    (%rsp)

So such a sample names a *call* site exactly. A *jump* site leaves nothing of its own there; it
is told by function: it is in the one that was called from where the return address is (a
tail call), or in the one that the target is in (a computed goto).

A sample in other code names the call site whose return address is nearest on the stack, and
the sites of the function that it is in, those close by where these are many. That is a hint
only: such sites come after those that were met branching.

Words on a stack may be stale, and a wrong name costs one site a learning window: nothing
here decides where a branch goes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.discover.functions import Span
from optpoline.model import Addr, SiteKind, tree_targets
from optpoline.process.perf import PcSample

__all__ = ["N_STACK_WORDS", "Evidence", "SiteMap", "Weights"]

Weights = dict[Addr, float]
"""Samples by address of a site, or of a thunk."""

N_STACK_WORDS = 16
"""Words of stack looked at: the frame of a small function with what it saved."""

MAX_SITES_NEAR = 64
"""Sites of one function that one sample names; a dispatch loop has a few hundred, and gets
them by many samples."""

MAX_TARGETS_FOLLOWED = 8
"""Known targets of a call site that are looked into for jumps."""


@dataclass(slots=True)
class Evidence:
    """What samples said.

    Attributes:
        n_samples: How many there were.
        n_known: Those in thunks on behalf of sites that lead to blocks, or are refused.
        branching: Those in thunks, or on the first instruction of a target, by address of
            the baseline site that they named; where several were named, each has its part.
        nearby: The same for those elsewhere.
        unnamed: Those in thunks that named no site, by thunk.
    """

    n_samples: int = 0
    n_known: int = 0
    branching: Weights = field(default_factory=lambda: defaultdict(float))
    nearby: Weights = field(default_factory=lambda: defaultdict(float))
    unnamed: Weights = field(default_factory=lambda: defaultdict(float))


class SiteMap:
    """Where the sites of a program are.

    Args:
        records: All of them.
        thunks: Where thunks are.
        function_at: Returns the function that an address is in, or None.
        callee_before: Returns where the direct call goes that ends at an address, or None
            if there is none.
    """

    def __init__(
        self,
        records: Iterable[SiteRecord],
        *,
        thunks: Iterable[Span],
        function_at: Callable[[Addr], Span | None],
        callee_before: Callable[[Addr], Addr | None],
    ) -> None:
        """Sort the sites."""
        self._records = sorted(records, key=lambda record: record.site.addr)
        self._addrs = [record.site.addr for record in self._records]
        self._by_end = {
            int(record.site.end): record
            for record in self._records
            if record.site.kind is SiteKind.CALL
        }
        self._thunks = sorted(thunks, key=lambda span: span.start)
        self._thunk_starts = [span.start for span in self._thunks]
        self._function_at = function_at
        self._callee_before = callee_before

    def record_at(self, addr: Addr) -> SiteRecord | None:
        """Return the site at an address, or None."""
        index = bisect_left(self._addrs, addr)
        found = index < len(self._addrs) and self._addrs[index] == addr
        return self._records[index] if found else None

    def jumps_through(self, thunk_addr: Addr) -> list[SiteRecord]:
        """Return the jump sites on their baseline that take a thunk, in address order."""
        return [r for r in self._records if _jumps(r, thunk_addr) and _is_baseline(r)]

    def weigh(self, samples: Iterable[PcSample]) -> Evidence:
        """Say which sites on their baseline some samples tell of."""
        evidence = Evidence()
        for sample in samples:
            evidence.n_samples += sample.count
            thunk = self._thunk_at(sample.pc)
            if thunk is not None:
                self._weigh_in_thunk(sample, thunk, evidence)
                continue
            function = self._function_at(sample.pc)
            is_landing = function is not None and sample.pc == function.start
            landed = self._name_landed(sample) if is_landing else []
            if found := [record for record in landed if _is_baseline(record)]:
                _share(evidence.branching, found, sample.count)
            else:
                near = self._name_nearby(sample, function)
                _share(evidence.nearby, [r for r in near if _is_baseline(r)], sample.count)
        return evidence

    def _weigh_in_thunk(self, sample: PcSample, thunk: Span, evidence: Evidence) -> None:
        """Note what a sample in a thunk says."""
        named = self._name_in_thunk(sample, thunk)
        if named is None:
            evidence.unnamed[thunk.start] += sample.count
        elif found := [record for record in named if _is_baseline(record)]:
            _share(evidence.branching, found, sample.count)
        else:
            evidence.n_known += sample.count

    def _thunk_at(self, addr: Addr) -> Span | None:
        """Return the thunk that an address is in, or None."""
        index = bisect_right(self._thunk_starts, addr) - 1
        return self._thunks[index] if index >= 0 and addr in self._thunks[index] else None

    def _name_in_thunk(self, sample: PcSample, thunk: Span) -> list[SiteRecord] | None:
        """Return the sites that a sample in a thunk may be of; None if that cannot be told."""
        stack = sample.stack
        # Behind its first instruction a retpoline has one word more on the stack. A thunk
        # that jumps has not; its place is looked at next.
        places = (0,) if sample.pc == thunk.start else (1, 0)
        words = [Addr(stack[place]) for place in places if place < len(stack)]
        for word in words:
            record = self._by_end.get(word)
            if record is not None:
                return self._name_by_call_site(record, thunk.start)
        found: list[SiteRecord] = []
        for word in words:
            callee = self._callee_before(word)
            if callee is not None and self._thunk_at(callee) is not None:
                return []  # a call site that no record is kept of
            where = word if callee is None else callee
            function = self._function_at(where)
            if function is not None and (callee is not None or where != function.start):
                found += self._jumps_in(function, where, thunk.start)
        return found or None

    def _name_landed(self, sample: PcSample) -> list[SiteRecord]:
        """Return the sites that may have led to the function whose start a thread is at."""
        if not sample.stack:
            return []
        word = Addr(sample.stack[0])
        record = self._by_end.get(word)
        if record is not None:
            if sample.pc in _known_targets(record):
                return [record]
            return self._name_by_call_site(record, None)
        callee = self._callee_before(word)
        function = self._function_at(callee) if callee is not None else None
        if callee is None or function is None or sample.pc in (callee, function.start):
            return []
        return self._jumps_in(function, callee, None)

    def _name_by_call_site(self, record: SiteRecord, thunk_addr: Addr | None) -> list[SiteRecord]:
        """Return a call site that a stack tells of, and how what it calls may have gone on.

        Args:
            record: The call site.
            thunk_addr: The thunk that was taken, or None if it is not known which.
        """
        found = [record] if thunk_addr in (None, record.thunk_addr) else []
        if found and _is_baseline(record) and record.known is None:
            return found
        for target in _known_targets(record):
            function = self._function_at(target)
            if function is not None:
                found += self._jumps_in(function, target, thunk_addr)
        return found

    def _jumps_in(self, function: Span, addr: Addr, thunk_addr: Addr | None) -> list[SiteRecord]:
        """Return the sites of a function that jump to a thunk, those near an address."""
        return [r for r in self._sites_near(function, addr) if _jumps(r, thunk_addr)]

    def _name_nearby(self, sample: PcSample, function: Span | None) -> Sequence[SiteRecord]:
        """Return the sites that a sample outside of thunks hints at."""
        for word in sample.stack:
            record = self._by_end.get(word)
            if record is not None:
                return (record,)
        return self._sites_near(function, sample.pc) if function is not None else ()

    def _sites_near(self, function: Span, addr: Addr) -> Sequence[SiteRecord]:
        """Return the sites of a function; where they are many, those near an address."""
        first = bisect_left(self._addrs, function.start)
        last = bisect_left(self._addrs, function.end)
        if last - first > MAX_SITES_NEAR:
            middle = bisect_left(self._addrs, addr)
            first = max(first, min(middle - MAX_SITES_NEAR // 2, last - MAX_SITES_NEAR))
            last = first + MAX_SITES_NEAR
        return self._records[first:last]


def _is_baseline(record: SiteRecord) -> bool:
    """Tell whether a site is one that could be learned."""
    return record.state is SiteState.BASELINE


def _jumps(record: SiteRecord, thunk_addr: Addr | None) -> bool:
    """Tell whether a site jumps to a thunk, to any if None."""
    return record.site.kind is not SiteKind.CALL and thunk_addr in (None, record.thunk_addr)


def _known_targets(record: SiteRecord) -> set[Addr]:
    """Return where a site is known to go."""
    targets = set(tree_targets(record.plan.tree)) if record.plan is not None else set[Addr]()
    if record.known is not None:
        targets.update(count.target for count in record.known.counts[:MAX_TARGETS_FOLLOWED])
    return targets


def _share(weights: Weights, records: Sequence[SiteRecord], count: int) -> None:
    """Give each of some sites its part of a sample."""
    for record in records:
        weights[record.site.addr] += count / len(records)
