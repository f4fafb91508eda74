# SPDX-License-Identifier: Apache-2.0
"""Settle sites that were promoted anew: without a stop, and without a jump on their way.

A re-promotion is one store: the head of the *home* block, where the text leads, becomes a jump
to a new block. Once the site has been quiet for a while its home does the new block's work::

    1. wait for a grace period of home's bytes behind the head       nobody is inside
    2. write the new block's code there, as it is at that address    head still jumps
    3. wait                                                          every CPU sees 2
    4. put the new head there, in one store                          nothing jumps any more

So a text that leads to a home with room is never linked again. Whoever stands at home's first
byte may stay: it holds a whole instruction at every instant, and both of them are right. Before
step 2 home's old bytes are int3, as is other memory that is used again. A site that is promoted
anew in between begins again; nothing is written but between two looks at whether that is so.

Sites whose fast path is switched off to be changed (``controller/switching_off.py``) take the
same steps, at once: their home leads to the thunk meanwhile, and there is no other block whose
work it is to do. As they are slow until then they are not waited for that long: one that
somebody stays inside gets its old tree back, and the new one by a swap.

A site that cannot be settled (its home has no room, or is a counting block, or somebody stays
inside) is left to ``Relinker``, which takes a stop. So is every site of a program that
switches its stacks: there a grace period takes a stop as well, a longer one, in which memory
is searched, and does not end at all where there is much of that.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from optpoline.controller.config import Config
from optpoline.controller.promotion import promote_again
from optpoline.controller.reclaim import Reclaimer
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.controller.switching_off import put_back, switch_off, switch_on
from optpoline.model import Addr
from optpoline.patch.blocks import Block, point_back, redirection_of, rewrite
from optpoline.patch.grace import RetiredCode
from optpoline.promote.policy import Decision

__all__ = ["Settler"]

LOOK_EVERY_S = 0.25
"""Time between looks for sites that are to be settled; those of one look share grace periods."""

SEEN_S = 0.02
"""Time from writing code to leading there. A CPU that runs the program is interrupted by its
timer 100 times a second and more, and what it has decoded ahead does not outlive that."""

PATIENCE_S = 30.0
"""How long a grace period may take until the site is no longer waited for. Looks may take
``Config.reclaim_duty`` of a core, and some programs need several."""

OFF_PATIENCE_S = 2.0
"""The same of a site whose fast path is switched off, and that is as slow as without us."""

OFF_PAUSE_S = 0.005
"""Time between steps while any is: the shortest way takes a look, ``SEEN_S``, and two steps."""

SWITCHING = "the program switches its stacks, so that a grace period takes a stop"
STAYED = "somebody stayed inside the block"
"""Why a site is promoted anew by a swap instead; others are ``switching_off``'s."""

MAX_WRITES = 48
"""Homes that are written in one step, some 0.1 ms of Python each. The rest waits for the next:
nobody comes in meanwhile, and flips of other sites are not kept waiting."""


@dataclass(slots=True)
class _Settling:
    """A site that is being settled.

    Attributes:
        record: The site.
        home: Where its text leads; the block as it was written last.
        since_s: When the present step began.
        is_left: Whether step 1 is done. It stays so: only step 4 lets anybody in again.
        source: The block whose work home was written to do, once step 2 is done; where there
            is no such block, home as it was to be.
    """

    record: SiteRecord
    home: Block
    since_s: float
    is_left: bool = False
    source: Block | None = None


class Settler:
    """Settles the sites of one session.

    Args:
        config: Settings.
        reclaimer: Waits for grace periods.
    """

    def __init__(self, config: Config, reclaimer: Reclaimer) -> None:
        """Begin with no site."""
        self._config = config
        self._reclaimer = reclaimer
        self._settling: dict[Addr, _Settling] = {}
        self._refused: dict[Addr, Block] = {}
        self._held: set[Addr] = set()
        self._changed: list[SiteRecord] = []
        self._reasons: dict[str, None] = {}
        self._next_look_s = 0.0
        self._n_writes_left = 0
        self._given_up: list[Addr] = []
        self.n_settled = 0
        """Sites settled so far."""

    def change(self, record: SiteRecord, decision: Decision, now_s: float) -> bool:
        """Promote a site anew with its fast path switched off meanwhile; or by a swap.

        Target state: running.

        Returns:
            Whether it was promoted anew, which was a swap; else ``take_changed`` tells when.
        """
        reason: str | None = STAYED
        if self._reclaimer.is_switching:
            reason = SWITCHING
        elif record.site.addr not in self._held:
            reason = switch_off(record, decision)
        if reason is None:
            self._begin(record, now_s)
            return False
        self._reasons[reason] = None
        return promote_again(record, decision, now_s)

    def take_changed(self) -> tuple[SiteRecord, ...]:
        """Return the sites that were switched on again, or promoted by a swap, each once."""
        changed, self._changed = tuple(self._changed), []
        return changed

    def take_reasons(self) -> tuple[str, ...]:
        """Return why sites that were to be switched off were not, or in vain, each once."""
        reasons, self._reasons = tuple(self._reasons), {}
        return reasons

    @property
    def is_any_off(self) -> bool:
        """Whether the fast path of a site is switched off: what takes long should wait."""
        return any(one.record.off is not None for one in self._settling.values())

    def end(self) -> bool:
        """Leave no site switched off: nobody may be there to switch it on for long.

        Returns:
            Whether one was: it does what it did before, or the new if that was written.
        """
        off = [one for one in self._settling.values() if one.record.off is not None]
        if any(one.source is not None for one in off):
            time.sleep(SEEN_S)
        for one in off:
            if one.source is not None:
                self._finish(one, time.monotonic())
                continue
            put_back(one.record)
            self._drop(one)
        self._cancel()
        return bool(off)

    def forget(self, start: Addr, end: Addr) -> None:
        """Drop the sites of a module that was unmapped: their homes are garbage."""
        for one in [one for addr, one in self._settling.items() if start <= addr < end]:
            self._drop(one)
        self._cancel()
        self._held = {addr for addr in self._held if not start <= addr < end}

    def is_settling(self, record: SiteRecord) -> bool:
        """Tell whether a site may be settled before long."""
        return record.site.addr in self._settling or self._may_begin(record)

    def step(self, records: Iterable[SiteRecord], now_s: float) -> int:
        """Go on with every site, and begin with those that have been quiet long enough.

        Target state: running.

        Returns:
            How many sites were settled.
        """
        n_before = self.n_settled
        self._note_left(self._reclaimer.take_left())
        self._n_writes_left = MAX_WRITES
        for one in tuple(self._settling.values()):
            self._go_on(one, now_s)
        self._cancel()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + min(LOOK_EVERY_S, self._config.relink_after_s)
            self._find(records, now_s)
        return self.n_settled - n_before

    def _find(self, records: Iterable[SiteRecord], now_s: float) -> None:
        """Begin with the sites that have been quiet long enough."""
        for record in records:
            if record.home is record.active:
                continue  # all but a few of thousands
            is_quiet = now_s - record.changed_s >= self._config.relink_after_s
            if is_quiet and record.site.addr not in self._settling and self._may_begin(record):
                self._begin(record, now_s)

    def _may_begin(self, record: SiteRecord) -> bool:
        """Tell whether a site has to be settled, and can be as far as is known."""
        home, active = record.home, record.active
        return (
            home is not None
            and active is not None
            and _source_of(record, home) is active
            and self._refused.get(record.site.addr) is not active
            and not self._reclaimer.is_switching
            and home.arena.has_room_at(home.addr, active.size)
        )

    def _begin(self, record: SiteRecord, now_s: float) -> None:
        """Step 1: wait until nobody is in home but at its first byte."""
        home = record.home
        assert home is not None
        self._settling[record.site.addr] = _Settling(record=record, home=home, since_s=now_s)
        self._reclaimer.await_left(RetiredCode(_body_of(home), Addr(home.addr + home.size)))

    def _note_left(self, starts: Collection[Addr]) -> None:
        """Note in which homes nobody is any more; thousands may come at a time."""
        if not starts:
            return
        by_start = {_body_of(one.home): one for one in self._settling.values()}
        for start in starts:
            one = by_start.get(start)
            if one is not None:  # else it was given up meanwhile
                one.is_left = True

    def _write(self, one: _Settling, source: Block, now_s: float) -> None:
        """Step 2: write what the site does by now, or shall."""
        written = rewrite(one.home, source.plan, _ahead_of(one.record, source))
        if written is None:
            self._give_up(one, now_s)
            return
        one.record.home = one.home = written
        one.source, one.since_s = source, now_s

    def _go_on(self, one: _Settling, now_s: float) -> None:
        """Step 4, if it is time, and what is written is still what the site does."""
        record = one.record
        source = _source_of(record, one.home)
        if source is None:
            self._drop(one)
        elif one.source is None and one.is_left:
            if self._n_writes_left > 0:
                self._n_writes_left -= 1
                self._write(one, source, now_s)
        elif one.source is None:
            has_room = one.home.arena.has_room_at(one.home.addr, source.size)
            patience_s = PATIENCE_S if record.off is None else OFF_PATIENCE_S
            is_over = now_s - one.since_s >= patience_s or self._reclaimer.is_switching
            if is_over or not has_room:
                self._give_up(one, now_s)
        elif one.source is not source:
            del self._settling[record.site.addr]  # promoted anew since: begin again
        elif now_s - one.since_s >= SEEN_S:
            self._finish(one, now_s)

    def _finish(self, one: _Settling, now_s: float) -> None:
        """Step 4: let home do its work."""
        record = one.record
        if record.off is not None:
            switch_on(record, one.home, now_s)
            self._changed.append(record)
        else:
            point_back(one.home)
            record.active = one.home
        self.n_settled += 1
        del self._settling[record.site.addr]

    def _give_up(self, one: _Settling, now_s: float) -> None:
        """Do not try again to settle a site where its text leads, for what it does now."""
        record = one.record
        self._drop(one)
        if record.off is not None:
            self._held.add(record.site.addr)
            self._reasons[SWITCHING if self._reclaimer.is_switching else STAYED] = None
            promote_again(record, put_back(record), now_s)
            self._changed.append(record)
        elif record.active is not None:
            self._refused[record.site.addr] = record.active

    def _drop(self, one: _Settling) -> None:
        """Wait no more for who is in a site's home, once ``_cancel`` is called."""
        del self._settling[one.record.site.addr]
        if not one.is_left:
            self._given_up.append(_body_of(one.home))

    def _cancel(self) -> None:
        """End the waits that were given up.

        Else they would be looked for on and on. And what is seen for one of them says nothing
        once somebody may enter that home: a later wait for it must not end by that.
        """
        if self._given_up:
            self._reclaimer.cancel_left(self._given_up)
            self._given_up.clear()


def _source_of(record: SiteRecord, home: Block) -> Block | None:
    """Return the block whose work ``home`` is to do, where a site's text leads.

    Returns:
        The promoted block that home leads on to; or, if home leads to the thunk because the
        fast path is switched off, home as it is to be. None if nothing is to be done.
    """
    source = record.active if record.off is None else record.off.coming
    is_source = (
        source is not None
        and source is not home
        and record.state is SiteState.PROMOTED
        and record.home is home
        and record.counting is None
        and _is_promoted(home)
        and _is_promoted(source)
        and source.arena is home.arena is record.arena
        and redirection_of(home.arena, home.addr) == _ahead_of(record, source)
    )
    return source if is_source else None


def _ahead_of(record: SiteRecord, source: Block) -> Addr:
    """Return where a site's home leads until it does the work of ``source``."""
    return source.addr if record.off is None else record.thunk_addr


def _is_promoted(block: Block) -> bool:
    """Tell whether a block counts nothing but misses."""
    plan = block.plan
    return plan.rows is None and plan.trace is None and plan.miss_count_addr is not None


def _body_of(home: Block) -> Addr:
    """Return where what nobody enters begins: behind the first byte.

    A thread between two instructions of the head that was, which are longer than the jump, is
    behind it; one at the first byte has not begun.
    """
    return Addr(home.addr + 1)
