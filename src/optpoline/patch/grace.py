# SPDX-License-Identifier: Apache-2.0
"""Grace periods: when memory of code that nothing leads to any more may be used again.

After Tasks RCU (P. McKenney, S. Rostedt: free a trampoline only after every task has
been seen outside it) and with its words::

    retire(code)          nothing leads to it any more; somebody may still be inside
    start_poll()          a handle on a grace period that covers all retired so far
    poll(handle)          look once; tell whether that grace period is over
    synchronize(timeout)  look until it is, or time is up
    take_expired()        what may be used again by now
    cancel(code)          nobody waits for it any more

The program pays nothing: it is looked at from outside (``Observer``), as in
J. Fernandes' variant that goes and looks at each CPU instead of waiting.

The rule. A thread is *quiescent* once it was seen, after the retirement, with neither
its PC nor a PC saved by a frame on its stacks inside the code (``patch/quiescence.py``).
It stays so: nothing leads there. A grace period is over when

1. every thread of every process that maps the arena was seen quiescent, and a listing
   made *after* the last look shows no thread that was not; a thread born later comes
   from a quiescent one. A thread that stays in some of the code (a handler that blocks,
   a stale word on its stack) keeps back what the last look found it in, no more; and then
2. no word in writable memory points into the code: a context that a program keeps there
   (swapcontext, coroutines) could be resumed by any thread. Stacks are no exception: one
   may lie in another, and a thread may have gone to another since. What is pointed to is
   kept back, by block; the rest is free. A program that is seen or suspected to switch
   its stacks is searched in the same stop in which its threads are looked at, so that no
   context can move from memory to a thread and back between the two.

Until then memory is searched while the program runs. What that could miss is a saved PC
that is moved, or cleared, before the search comes by: the first ever that is there in a
look or a search. A signal frame is neither: its words stay where they are for as long as
the code that they point to can be resumed, and until other code has run on that stack. So
the search finds it, whichever threads have run it since they were looked at.

An rseq descriptor of a block lies behind its code and lives as long: ``rseq_cs`` points
there only while a thread is inside, since every way out of the block clears it. One that
does all the same, which the kernel would follow later (a forked child has those of threads
that it has not), is a word on a thread's stack or in the rest of the memory like any other:
it keeps its block back. But no PC is there, so it does not show that stacks are switched.
Before an arena is unmapped the threads that stand are asked as well, and what a child keeps
is cleared (``controller/letting_go.py``).
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from optpoline.model import Addr
from optpoline.patch.ranges import AddressRanges

__all__ = ["GracePeriods", "GraceStatistics", "Look", "Observer", "RetiredCode", "ThreadKey"]

PATIENCE = 5
"""Looks without a stop before the threads that no look could tell of are stopped for one."""

_PAUSE_S = 0.005
"""Between the looks of ``synchronize``."""

ThreadKey = tuple[int, int]
"""(pid, tid)."""


@dataclass(frozen=True, slots=True)
class RetiredCode:
    """A range of the arena's code that nothing leads to: a block, or a whole arena.

    Attributes:
        start: First address.
        end: Address after the last.
        text_end: Address after its instructions, if data lies behind them: rseq descriptors.
            Who points there keeps the code back, but is not inside it.
    """

    start: Addr
    end: Addr
    text_end: Addr | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one look at the program showed.

    Attributes:
        quiescent: Threads seen to be quiescent.
        threads: All threads, listed after that, none that lives missing. After a stop for
            all memory also those that were there and could not be told, or woke meanwhile,
            even if they are gone: what they had on their stacks may be where the search had
            been.
        holding: Threads that were looked at and are at addresses inside the code, or may
            return there, each with these addresses.
        pointed_to: Addresses inside the code found in memory by a search in the same
            stop, or None if none was made (or there was too much memory).
    """

    quiescent: frozenset[ThreadKey]
    threads: frozenset[ThreadKey]
    holding: Mapping[ThreadKey, frozenset[int]] = field(default_factory=dict)
    pointed_to: frozenset[int] | None = None


class Observer(Protocol):
    """Looks at the threads of all processes that map the arena."""

    def look(self, ranges: AddressRanges, known: Collection[ThreadKey]) -> Look:
        """Look at threads without stopping any; ``known`` need no look."""

    def look_stopped(self, ranges: AddressRanges, known: Collection[ThreadKey]) -> Look:
        """Stop the threads that run for a look at all that are not in ``known``.

        All memory is searched in the same stop if the program switches its stacks.
        """

    def search(self, ranges: AddressRanges) -> frozenset[int] | None:
        """Return addresses in ``ranges`` found in writable memory; None: too much memory.

        Threads' stacks are searched as well, and the memory of processes forked meanwhile.
        """

    def is_switching(self) -> bool:
        """Tell whether the program was ever seen, or is suspected, to switch its stacks.

        That is to run on stacks of its own making, or to keep saved PCs that no look at a
        thread accounts for. A suspicion may be dropped in ``look_stopped`` if there is too
        much memory for a search in a stop.
        """

    def suspect_switching(self) -> None:
        """Note that a thread may be on another stack than it was at the last look."""


@dataclass(slots=True)
class GraceStatistics:
    """What grace periods have done so far."""

    n_retired: int = 0
    n_expired: int = 0
    n_periods: int = 0
    n_stops: int = 0
    n_kept_back: int = 0


@dataclass(slots=True)
class _Period:
    """The grace period under way."""

    code: tuple[RetiredCode, ...]
    ranges: AddressRanges
    quiescent: set[ThreadKey] = field(default_factory=set)
    holding: dict[ThreadKey, frozenset[RetiredCode]] = field(default_factory=dict)
    """Threads that were looked at, with the code that the last look found them in."""
    n_looks: int = 0
    cancelled: set[RetiredCode] = field(default_factory=set)
    """What nobody waits for any more."""

    def code_at(self, addrs: Iterable[int]) -> frozenset[RetiredCode]:
        """Return the pieces of code that addresses are in."""
        starts = [one.start for one in self.code]
        return frozenset(self.code[bisect.bisect_right(starts, addr) - 1] for addr in addrs)


class GracePeriods:
    """The grace periods of one target.

    Args:
        observer: Looks at it.
        is_last: Whether what is retired will be unmapped rather than used again. Then a
            program that switches stacks and has too much memory for a search in a stop
            is searched twice without one. What that could miss is a context that was
            resumed inside the code and parked again within the nanoseconds that it
            takes to leave it, both times.
    """

    def __init__(self, observer: Observer, *, is_last: bool = False) -> None:
        """Begin with nothing retired."""
        self.statistics = GraceStatistics()
        self.holders: tuple[ThreadKey, ...] = ()
        """Threads that were not quiescent at the last look."""
        self.is_search_refused = False
        """Whether memory could not be searched because there is too much of it."""
        self._observer = observer
        self._is_last = is_last
        self._waiting: list[RetiredCode] = []
        self._expired: list[RetiredCode] = []
        self._period: _Period | None = None
        self._n_begun = 0
        self._n_over = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits for a grace period."""
        return self._period is None and not self._waiting

    def retire(self, code: RetiredCode) -> None:
        """Note code that nothing leads to from now on, in any process that maps it.

        It must not overlap other code that waits.
        """
        self._waiting.append(code)
        self.statistics.n_retired += 1

    def cancel(self, code: Collection[RetiredCode]) -> None:
        """Note that nobody waits any more for code that was retired; it does not expire."""
        gone = set(code)
        self._waiting = [one for one in self._waiting if one not in gone]
        self._expired = [one for one in self._expired if one not in gone]
        period = self._period
        if period is None:
            return
        period.cancelled |= gone.intersection(period.code)
        if len(period.cancelled) == len(period.code):
            self._period = None
            self._n_over = self._n_begun

    @property
    def is_switching(self) -> bool:
        """Whether the program is taken to switch its stacks: each period takes a stop then."""
        return self._observer.is_switching()

    def start_poll(self) -> int:
        """Return a handle on the grace period that covers all that is retired by now."""
        if not self._waiting:
            return self._n_begun
        return self._n_begun + 1

    def poll(self, handle: int, *, hurry: bool = False) -> bool:
        """Look at the program once, if the handle's grace period is not over.

        Args:
            handle: From ``start_poll``.
            hurry: Stop threads that run at once, not only after some looks.

        Returns:
            Whether that grace period is over.

        Raises:
            ProcessGone: if the program is.
            StopTimeout: if its threads could not be stopped.
        """
        if self._n_over >= handle:
            return True
        if self._period is None:
            self._begin()
        assert self._period is not None
        self._look(self._period, hurry=hurry)
        return self._n_over >= handle

    def synchronize(self, timeout_s: float) -> bool:
        """Wait for the grace period of all that is retired by now, or until time is up.

        What a thread stays in, or memory points to, is kept back for the next one.
        """
        handle = self.start_poll()
        end_s = time.monotonic() + timeout_s
        while not self.poll(handle, hurry=True):
            if time.monotonic() >= end_s:
                return False
            time.sleep(_PAUSE_S)
        return True

    def take_expired(self) -> tuple[RetiredCode, ...]:
        """Return the code whose grace period is over, each once."""
        expired, self._expired = tuple(self._expired), []
        return expired

    def _begin(self) -> None:
        """Begin a grace period for what waits."""
        code, self._waiting = tuple(sorted(self._waiting, key=lambda one: one.start)), []
        data = [(one.text_end, one.end) for one in code if one.text_end is not None]
        ranges = AddressRanges(((one.start, one.end) for one in code), data)
        self._period = _Period(code=code, ranges=ranges)
        self._n_begun += 1

    def _look(self, period: _Period, *, hurry: bool) -> None:
        """Look once; end the grace period if all threads are quiescent by now."""
        observer = self._observer
        look = observer.look(period.ranges, period.quiescent)
        period.n_looks += 1
        holders = self._note(period, look)
        is_due = hurry or period.n_looks > PATIENCE
        # Contexts of a program that switches stacks move: only a stop shows all at once.
        was_switching = observer.is_switching()
        if is_due and (holders or was_switching):
            known = () if was_switching else period.quiescent
            look = observer.look_stopped(period.ranges, known)
            self.statistics.n_stops += 1
            if observer.is_switching():
                period.quiescent.clear()
                period.holding.clear()
            holders = self._note(period, look)
        self.holders = tuple(sorted(holders))
        if is_due and observer.is_switching() and not was_switching:
            return  # found out half way through that stop: look at all and all memory in one
        is_unseen = any(key not in period.holding for key in holders)
        if is_unseen or (holders and period.n_looks <= PATIENCE):
            return
        if observer.is_switching():
            if not is_due:
                return
            pointed_to = look.pointed_to
            if pointed_to is None and self._is_last:
                # Too much memory for a stop: twice without one.
                for _ in range(2):
                    pointed_to = observer.search(period.ranges)
                    if pointed_to is None or pointed_to:
                        break
        else:
            pointed_to = observer.search(period.ranges)
            if observer.is_switching():
                return  # that is news: look again, all in one stop
        self._end(period, pointed_to)

    def _note(self, period: _Period, look: Look) -> frozenset[ThreadKey]:
        """Note who is quiescent; return who is not."""
        period.quiescent |= look.quiescent
        # The ids of one that is gone may be another's by the next look.
        period.quiescent &= look.threads
        for key, addrs in look.holding.items():
            code = period.code_at(addrs)
            # Nothing leads there any more: it has brought that from another stack, or its
            # own has grown over what a signal left below.
            if not code <= period.holding.get(key, code):
                self._observer.suspect_switching()
            period.holding[key] = code
        # The search comes after this listing and finds what one that is gone has parked. A
        # search in a stop came before it: what was held then counts, whoever is gone since.
        is_over = not self._observer.is_switching()
        for key in list(period.holding):
            if key in period.quiescent or (is_over and key not in look.threads):
                del period.holding[key]
        return look.threads - period.quiescent

    def _end(self, period: _Period, pointed_to: Iterable[int] | None) -> None:
        """End a grace period; keep back what memory points to."""
        self.is_search_refused = pointed_to is None
        held = frozenset(period.code) if pointed_to is None else period.code_at(pointed_to)
        held = held.union(*period.holding.values())
        wanted = [one for one in period.code if one not in period.cancelled]
        kept = [one for one in wanted if one in held]
        self._expired += [one for one in wanted if one not in held]
        self.statistics.n_expired += len(wanted) - len(kept)
        self.statistics.n_kept_back += len(kept)
        self.statistics.n_periods += 1
        self._waiting += kept
        self._period = None
        self._n_over = self._n_begun
