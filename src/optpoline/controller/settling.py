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

A site that cannot be settled (its home has no room, or is a counting block, or somebody stays
inside) is left to ``Sampler.relink``, which takes a stop. So is every site of a program that
switches its stacks: there a grace period takes a stop as well, a longer one, in which memory
is searched, and does not end at all where there is much of that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from optpoline.controller.config import Config
from optpoline.controller.reclaim import Reclaimer
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.model import Addr
from optpoline.patch.blocks import Block, point_back, redirection_of, rewrite
from optpoline.patch.grace import RetiredCode

__all__ = ["Settler"]

LOOK_EVERY_S = 0.25
"""Time between looks for sites that are to be settled; those of one look share grace periods."""

SEEN_S = 0.02
"""Time from writing code to leading there. A CPU that runs the program is interrupted by its
timer 100 times a second and more, and what it has decoded ahead does not outlive that."""

PATIENCE_S = 30.0
"""How long a grace period may take until the site is no longer waited for. Looks may take
``Config.reclaim_duty`` of a core, and some programs need several."""

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
        source: The block whose work home was written to do, once step 2 is done.
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
        self._next_look_s = 0.0
        self._n_writes_left = 0
        self._given_up: list[Addr] = []
        self.n_settled = 0
        """Sites settled so far."""

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
        if self._given_up:
            # Else it would be looked for on and on.
            self._reclaimer.cancel_left(self._given_up)
            self._given_up.clear()
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
            and _leads(record, home)
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

    def _write(self, one: _Settling, active: Block, now_s: float) -> None:
        """Step 2: write what the site does by now."""
        written = rewrite(one.home, active)
        if written is None:
            self._give_up(one)
            return
        one.record.home = one.home = written
        one.source, one.since_s = active, now_s

    def _go_on(self, one: _Settling, now_s: float) -> None:
        """Step 4, if it is time, and what is written is still what the site does."""
        record, active = one.record, one.record.active
        if active is None or not _leads(record, one.home):
            del self._settling[record.site.addr]
        elif one.source is None and one.is_left:
            if self._n_writes_left > 0:
                self._n_writes_left -= 1
                self._write(one, active, now_s)
        elif one.source is None:
            has_room = one.home.arena.has_room_at(one.home.addr, active.size)
            is_over = now_s - one.since_s >= PATIENCE_S or self._reclaimer.is_switching
            if is_over or not has_room:
                self._give_up(one)
        elif one.source is not active:
            del self._settling[record.site.addr]  # promoted anew since: begin again
        elif now_s - one.since_s >= SEEN_S:
            point_back(one.home)
            record.active = one.home
            self.n_settled += 1
            del self._settling[record.site.addr]

    def _give_up(self, one: _Settling) -> None:
        """Do not try again to settle a site where its text leads, for what it does now."""
        del self._settling[one.record.site.addr]
        if not one.is_left:
            self._given_up.append(_body_of(one.home))
        if one.record.active is not None:
            self._refused[one.record.site.addr] = one.record.active


def _leads(record: SiteRecord, home: Block) -> bool:
    """Tell whether a site's text leads to ``home``, a promoted block that leads on to another."""
    active = record.active
    return (
        record.state is SiteState.PROMOTED
        and record.home is home
        and active is not None
        and active is not home
        and record.counting is None
        and _is_promoted(home)
        and _is_promoted(active)
        and active.arena is home.arena is record.arena
        and redirection_of(home.arena, home.addr) == active.addr
    )


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
