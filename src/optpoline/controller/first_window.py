# SPDX-License-Identifier: Apache-2.0
"""First windows: link sites that hold their baseline to counting blocks, and let them count.

Either some sites are given, or a lookout finds them while the window lasts, or both: each
wave of sites that it has met is linked in a stop of its own (more, where they do not fit
one) and counts until the end of the window. Waves come hottest first, and a site counts its
own time only, so that rates are right whenever it came.

Many sites may be learned in turn instead: a group counts for its part of the window, and goes
back to its baseline in the stop that links the next. Sites for which all threads would have to
stand are led to their thunk by a redirection: such a stop may not be had again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from optpoline.controller.config import Config
from optpoline.controller.counting_blocks import first_block
from optpoline.controller.growing import grow_full
from optpoline.controller.hot_sites import Lookout
from optpoline.controller.learning import Empty, begin_window, end_windows
from optpoline.controller.linker import Linker, Move
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.controller.target import Target
from optpoline.controller.window_counts import is_telling_soon
from optpoline.errors import ArenaError, EncodeRangeError
from optpoline.model import Addr
from optpoline.patch.blocks import redirect
from optpoline.patch.text import needs_all_stopped

__all__ = ["GROUP_SITES", "FirstWindow"]

GROUP_SITES = 512
"""Sites that learn at the same time where they may do so in turn.

Code and counters of many learning sites do not fit the first caches: a generated program that
calls through 2,000 sites one after the other took 1.34 times as long while all of them learned,
1.8 times when its neighbours on the host used the caches too; with 50 sites, 1.11 times.
"""

MIN_LEARN_S = 0.1
"""Time left in a window that is worth linking more sites for."""

MAX_EXTRA_RATIO = 0.5
"""By how much of its length a window is longer at most, for sites that were given their last
counting block too late for it to have counted enough."""


class _Prepared(NamedTuple):
    """What is to be linked.

    Attributes:
        moves: The sites, and where they shall lead.
        new: The blocks of them that nothing has led to before.
    """

    moves: list[Move]
    new: set[Addr]


class FirstWindow:
    """Learning windows of sites that lead to their thunk; one a session.

    Args:
        config: Settings.
        target: The target.
        linker: Changes its text.
        sleep: Sleeps, or raises ``ProcessGone`` as soon as the target exits.
        after_look: Called after each look at what was counted.
        empty: Empties counting blocks that are used again.
    """

    def __init__(
        self,
        config: Config,
        target: Target,
        linker: Linker,
        *,
        sleep: Callable[[float], None],
        after_look: Callable[[], None],
        empty: Empty,
    ) -> None:
        """Keep what is needed."""
        self._config = config
        self._target = target
        self._linker = linker
        self._sleep = sleep
        self._after_look = after_look
        self._empty = empty
        self.ever_linked: dict[Addr, SiteRecord] = {}
        """The sites that lead to a block, or have led to one: all that need looking after."""
        self.waiting: list[SiteRecord] = []
        """The sites that had their turn, and hold their baseline until it is decided on them."""
        self.learning_s = 0.0
        """Seconds during which any site led to a learning block."""

    def forget(self, start: int, end: int) -> None:
        """Drop the sites of a range that was unmapped."""
        for addr in [addr for addr in self.ever_linked if start <= addr < end]:
            del self.ever_linked[addr]
        self.waiting = [r for r in self.waiting if not start <= r.site.addr < end]

    def learn(
        self,
        records: Sequence[SiteRecord],
        length_s: float,
        stop: threading.Event | None,
        *,
        in_turn: bool,
        began: Callable[[int], None],
    ) -> None:
        """Link baseline sites and let them count: all at once, or group after group.

        Args:
            records: The sites.
            length_s: How long all of it takes; see ``run``.
            stop: Ends the window early when set.
            in_turn: Whether more than ``GROUP_SITES`` count in groups. Of these all but the
                last are unlinked again, and are ``waiting``. Sites of later groups stay as
                they are where the earlier ones' blocks have used their arena up.
            began: Is told how many sites are learned, once the first are.

        Raises:
            ArenaError: if an arena has no room for the first blocks.
            ProcessGone: if the target exits meanwhile.
        """
        n_groups = 1
        if in_turn:
            n_groups = min(-(-len(records) // GROUP_SITES), round(length_s / MIN_LEARN_S))
            n_groups = max(1, n_groups)
        # Every n-th, for sites that lie together are often hot together.
        groups = [records[number::n_groups] for number in range(n_groups)]
        linked: list[SiteRecord] = []
        prepared = self._prepare(groups[0])
        for number in range(n_groups):
            linked = self._link(prepared, linked)
            begin_s = time.monotonic()
            if number == 0:
                began(len(records) - len(prepared.moves) + len(linked))
            if number + 1 < n_groups:
                prepared = self._prepare(groups[number + 1], may_skip=True)
            self.run(linked, begin_s + length_s / n_groups - time.monotonic(), stop)
            if stop is not None and stop.is_set():
                break

    def run(
        self,
        linked: list[SiteRecord],
        length_s: float,
        stop: threading.Event | None,
        lookout: Lookout | None = None,
    ) -> None:
        """Let sites count for a while.

        Args:
            linked: Sites that ``link`` has linked; those that the lookout finds come to them.
            length_s: How long; up to half as long again (``MAX_EXTRA_RATIO``) while that will
                show the shares of a site whose last block has counted too little.
            stop: Ends the window early when set.
            lookout: Finds more.

        Raises:
            ProcessGone: if the target exits meanwhile.
        """
        begin_s = time.monotonic()
        end_s = begin_s + length_s
        try:
            while (now_s := time.monotonic()) < end_s:
                if stop is not None and stop.is_set():
                    break
                pause_s = min(end_s - now_s, self._config.wave_s)
                # Who is linked at the very end has no time to be counted.
                if lookout is None or (linked and end_s - now_s < MIN_LEARN_S):
                    self._sleep(pause_s)
                else:
                    lookout.look(pause_s)
                    linked += self.link(lookout.take_wave(time.monotonic()))
                self._look(linked)
            self._go_on(linked, end_s, MAX_EXTRA_RATIO * length_s, stop)
        finally:
            now_s = time.monotonic()
            end_windows(linked, now_s)
            self.learning_s += now_s - begin_s

    def _look(self, linked: Sequence[SiteRecord]) -> None:
        """Give more slots to sites that need them."""
        grow_full(linked, self._target.may_guard, self._config.policy.schedule.max_slots)
        self._after_look()

    def _go_on(
        self,
        linked: Sequence[SiteRecord],
        begin_s: float,
        extra_s: float,
        stop: threading.Event | None,
    ) -> None:
        """Let sites go on counting whose last block came late, for a bounded time."""
        end_s = begin_s + extra_s
        while (now_s := time.monotonic()) < end_s and not (stop is not None and stop.is_set()):
            if not any(is_telling_soon(record, now_s, end_s - now_s) for record in linked):
                return
            self._sleep(min(end_s - now_s, self._config.wave_s))
            if end_s - time.monotonic() > extra_s / 2:
                self._look(linked)  # later, a bigger block would have no time to count

    def link(self, records: Sequence[SiteRecord]) -> list[SiteRecord]:
        """Link baseline sites to counting blocks; return those that are."""
        return self._link(self._prepare(records))

    def _prepare(self, records: Sequence[SiteRecord], *, may_skip: bool = False) -> _Prepared:
        """Write the counting blocks of baseline sites; nothing leads there yet.

        Args:
            records: The sites.
            may_skip: Whether sites may be left out for which there is no room.
        """
        prepared = _Prepared([], set())
        for record in records:
            is_new = record.learner is None
            try:
                record.arena.journal(record.site)
                block = first_block(record, self._config.policy.schedule.max_slots)
            except EncodeRangeError:
                continue  # what its branch loads lies out of the arena's reach
            except ArenaError:
                if not may_skip:
                    raise
                continue
            record.active = None
            prepared.moves.append(Move(record=record, block=block))
            if is_new:
                prepared.new.add(block.addr)
            self.ever_linked[record.site.addr] = record
        return prepared

    def _link(self, prepared: _Prepared, done: Sequence[SiteRecord] = ()) -> list[SiteRecord]:
        """Link sites to the blocks prepared for them; return those that are.

        Args:
            prepared: The sites, and where they shall lead.
            done: Sites that have counted, which get their baseline back with it.
        """
        moves = prepared.moves
        if not moves and not done:
            return []
        try:
            self._linker.link([*self._moves_back(done), *moves])
        finally:
            # Also of a change that failed half-way: nobody else comes back to them.
            self.waiting = [record for record in self.waiting if record.home is None]
            for record in done:
                if record.home is None and record.state is SiteState.LEARNING:
                    record.state = SiteState.BASELINE
                    self.waiting.append(record)
        linked = [move.record for move in moves if move.record.home is not None]
        for record in linked:
            record.state = SiteState.LEARNING
        begin_window(linked, time.monotonic(), self._empty, prepared.new)
        return linked

    def _moves_back(self, done: Sequence[SiteRecord]) -> list[Move]:
        """Return what gives sites that have counted their baseline back.

        Those for which all threads would have to stand count no more from now on: led to
        their thunk like this they can be promoted whoever sleeps then.
        """
        moves: list[Move] = []
        for record in done:
            if not needs_all_stopped(record.entry):
                moves.append(Move(record=record, block=None))
            elif record.home is not None:
                redirect(record.home, record.thunk_addr)
        return moves
