# SPDX-License-Identifier: Apache-2.0
"""Reclaim the memory of blocks that nothing leads to any more.

Which those are is found as a garbage collector finds them: from the roots (where the
text of the target and of its children leads, and the blocks that a site's record may
use again) through redirected heads. The rest is retired, and freed after a grace
period. Nothing of this touches the program's fast path, and most of it not even its
threads: see ``patch/grace.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from optpoline.controller.address_space import target_space
from optpoline.controller.children import Children, led_to
from optpoline.controller.config import Config
from optpoline.controller.observer import ThreadObserver
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import ReclaimSummary
from optpoline.controller.target import Target
from optpoline.errors import Unsettled
from optpoline.model import Addr
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block, redirection_of
from optpoline.patch.grace import GracePeriods, RetiredCode
from optpoline.patch.layout import BlockKind, BlockState

__all__ = ["Reclaimer"]


MAX_INTERVALS = 64
"""Sweeps come at intervals that double up to so many of the first while few blocks are
written: what is garbage by then grows only as text is linked anew."""

WRITTEN_SHARE = 0.25
"""Share of ``reclaim_after_size`` that must have been written since the last sweep for the
next to come at the shortest interval: so much garbage grows no faster than blocks do."""


@dataclass(frozen=True, slots=True)
class _Retired:
    """A retired block."""

    arena: Arena
    addr: Addr
    site_addr: Addr


class Reclaimer:
    """Reclaims the blocks of one session.

    Args:
        config: Settings.
        target: The target.
        children: Its forked children.
        before_free: Called with a site and a block of it whose memory is about to be freed.
    """

    def __init__(
        self,
        config: Config,
        target: Target,
        children: Children,
        before_free: Callable[[Addr, Addr], None] | None = None,
    ) -> None:
        """Begin with nothing retired."""
        self._config = config
        self._target = target
        self._children = children
        self._before_free = before_free
        self._space = target_space(target)
        self._grace = GracePeriods(
            ThreadObserver(
                lambda: (self._space, *children.find()),
                stop_budget_s=config.max_stop_s / 2,
                samples=True,
            )
        )
        self._retired: dict[Addr, _Retired] = {}
        self._expired: list[RetiredCode] = []
        self._awaited: dict[Addr, RetiredCode] = {}
        self._left: list[Addr] = []
        self._handle = 0
        self._put_size_seen = 0
        self._interval_s = 0.0
        self._last_sweep_s = 0.0
        self._next_sweep_s = 0.0
        self._not_before_s = 0.0
        self._n_bytes = 0
        self._n_retired = 0
        self._n_freed = 0

    def step(self, records: Collection[SiteRecord], spares: Iterable[Block], now_s: float) -> None:
        """Retire what has become garbage, look at the threads, free what may be freed.

        Target state: running; a thread that never sleeps is stopped for an instant.

        Raises:
            ProcessGone: if the target is gone.
            StopTimeout: if threads do not stop.
        """
        if now_s < self._not_before_s or not self._is_due(now_s):
            return
        begin_s, begin_cpu_s = time.monotonic(), time.process_time()
        try:
            self._do_step(records, tuple(spares), now_s)
        except Unsettled:
            # What their text leads to cannot be told now, nor which threads there are.
            self._next_sweep_s = min(self._next_sweep_s, now_s + self._config.reclaim_every_s)
        # Of the processor, of this thread and those that stop others; a caller may have more.
        took_s = min(time.monotonic() - begin_s, time.process_time() - begin_cpu_s)
        self._not_before_s = now_s + took_s / self._config.reclaim_duty

    def _is_due(self, now_s: float) -> bool:
        """Tell whether there may be anything to do; ten times a second mostly not."""
        is_waiting = not self._grace.is_idle or bool(self._expired)
        return is_waiting or now_s >= self._next_sweep_s or self._is_worth_a_sweep()

    def _is_worth_a_sweep(self) -> bool:
        """Tell whether so much was written that it should not wait for a rare sweep."""
        written = sum(arena.put_size for arena in self._target.arenas) - self._put_size_seen
        return written >= max(1.0, WRITTEN_SHARE * self._config.reclaim_after_size)

    def _do_step(
        self, records: Collection[SiteRecord], spares: Sequence[Block], now_s: float
    ) -> None:
        """Take one step; ``Unsettled`` puts the rest of it off."""
        if self._children.unreadable:
            self._children.find()
        if self._children.unreadable:
            return  # what their text leads to cannot be told
        if self._grace.is_idle or now_s >= self._next_sweep_s:
            self._sweep(records, spares, now_s)
        self._free(records, spares)
        if not self._grace.is_idle:
            is_over = self._grace.poll(self._handle)
            # Each sweep moves the handle on: an earlier grace period may be over all the same.
            self._free(records, spares)
            if is_over:
                self._handle = self._grace.start_poll()

    def await_left(self, code: RetiredCode) -> None:
        """Begin a grace period for code that nobody enters any more, and that is not to be freed.

        That is a block's behind its head, which leads elsewhere.
        """
        if code.start not in self._awaited:
            self._awaited[code.start] = code
            self._grace.retire(code)
            self._handle = self._grace.start_poll()

    def cancel_left(self, starts: Iterable[Addr]) -> None:
        """Wait no more for such code, told by where it starts; ``take_left`` tells of none."""
        gone = set(starts)
        self._left = [start for start in self._left if start not in gone]
        awaited = [self._awaited.pop(start, None) for start in gone]
        self._grace.cancel([code for code in awaited if code is not None])

    @property
    def is_switching(self) -> bool:
        """Whether grace periods take stops: the program is taken to switch its stacks."""
        return self._grace.is_switching

    def take_left(self) -> tuple[Addr, ...]:
        """Return where such code starts whose grace period is over, each once."""
        left, self._left = tuple(self._left), []
        return left

    def summary(self) -> ReclaimSummary:
        """Say what was reclaimed so far, and what holds the rest up."""
        statistics = self._grace.statistics
        return ReclaimSummary(
            blocks_retired=self._n_retired,
            blocks_reclaimed=self._n_freed,
            blocks_reused=sum(arena.n_reused for arena in self._target.arenas),
            grace_periods=statistics.n_periods,
            bytes_poisoned=self._n_bytes,
            holders=tuple(tid for _, tid in self._grace.holders),
            is_search_refused=self._grace.is_search_refused,
        )

    def _sweep(
        self, records: Collection[SiteRecord], spares: Sequence[Block], now_s: float
    ) -> None:
        """Retire the live blocks that nothing leads to, once they are worth a grace period."""
        every_s = self._config.reclaim_every_s
        if self._is_worth_a_sweep():
            self._put_size_seen = sum(arena.put_size for arena in self._target.arenas)
            self._interval_s = every_s
            self._next_sweep_s = min(self._next_sweep_s, self._last_sweep_s + every_s)
        if now_s < self._next_sweep_s:
            return
        self._last_sweep_s = now_s
        self._next_sweep_s = now_s + self._interval_s
        self._interval_s = min(MAX_INTERVALS * every_s, 2 * self._interval_s)
        used = self._find_used(records, spares)
        if self._children.unreadable:
            return  # what their text leads to cannot be told
        garbage = [
            (arena, block)
            for arena in self._target.arenas
            for block in arena.blocks
            if block.state is BlockState.LIVE
            and block.kind is not BlockKind.THUNK
            and block.addr not in used
            and Addr(block.addr + 1) not in self._awaited
        ]
        if sum(block.size for _, block in garbage) < self._config.reclaim_after_size:
            return
        for arena, block in garbage:
            # Who is still at its first byte must not go on to another block, which may be
            # freed before this one is: it does its own work again. One that leads to its
            # thunk stays so: its site may have been refused, because flags are read there.
            ahead = redirection_of(arena, block.addr)
            is_other = ahead is not None and self._arena_of(ahead) is not None
            if is_other and ahead is not None and not arena.is_thunk(ahead):
                arena.store_u64(block.addr, int.from_bytes(block.head, "little"))
            arena.retire_block(block.addr)
            self._n_retired += 1
            self._retired[block.addr] = _Retired(arena, block.addr, Addr(block.site_addr))
            text_end = Addr(block.addr + block.text_size)
            self._grace.retire(RetiredCode(block.addr, block.end, text_end))
        self._handle = self._grace.start_poll()

    def _find_used(self, records: Collection[SiteRecord], spares: Sequence[Block]) -> set[Addr]:
        """Return the blocks that anything leads to, or may lead to again.

        Raises:
            Unsettled: if processes are started faster than they can be looked at.
        """
        todo = [block.addr for block in spares]
        for record in records:
            blocks = (record.home, record.active, record.counting, record.learner)
            todo += [block.addr for block in blocks if block is not None]
            todo += [block.addr for block, _ in record.earlier]
        entries = [entry for arena in self._target.arenas for entry in arena.journalled]
        # The text itself has the last word: a change of it may have failed, or a record been
        # dropped because its module looked gone.
        todo += led_to(self._target.memory, entries)
        todo += self._children.led_to(entries)
        used: set[Addr] = set()
        while todo:
            addr = todo.pop()
            arena = self._arena_of(addr)
            if arena is None or addr in used:
                continue
            used.add(addr)
            ahead = redirection_of(arena, addr)
            if ahead is not None:
                todo.append(ahead)
        return used

    def _arena_of(self, addr: Addr) -> Arena | None:
        """Return the arena in whose code an address is, or None."""
        arenas = self._target.arenas
        return next((a for a in arenas if a.code_start <= addr < a.code_end), None)

    def _free(self, records: Collection[SiteRecord], spares: Sequence[Block]) -> None:
        """Free the blocks whose grace period is over, if still nothing leads to them.

        A child that was being forked while the text changed, or that was not seen at the
        sweep, may have come with text of before. What that leads to is used again as it is.
        """
        for code in self._grace.take_expired():
            if code.start in self._awaited:
                del self._awaited[code.start]
                self._left.append(code.start)
            else:
                self._expired.append(code)
        if not self._expired:
            return
        used = self._find_used(records, spares)
        if self._children.unreadable:
            return  # what their text leads to cannot be told
        while self._expired:
            retired = self._retired.pop(self._expired.pop().start)
            if retired.addr in used:
                retired.arena.revive_block(retired.addr)
                continue
            if self._before_free is not None:
                self._before_free(retired.site_addr, retired.addr)
            self._n_bytes += retired.arena.free_block(retired.addr)
            self._n_freed += 1
