# SPDX-License-Identifier: Apache-2.0
"""When text is linked anew, and how long it is waited with after tries in vain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import pytest

from optpoline.controller.linker import Linker, Move
from optpoline.controller.records import SiteRecord
from optpoline.controller.relinking import MAX_RELINK_WAITS, Relinker
from optpoline.controller.summary import SiteState
from optpoline.errors import StopTimeout
from optpoline.model import Addr, BlockPlan, Guard, Miss, Refusal
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block, add_block
from optpoline.patch.text import needs_all_stopped
from tests.unit.controller.lone_arena import THUNK, make_arena, make_record, make_site

AFTER_S = 1.0
BEGIN_S = 100.0
STEP_S = 0.25
CROSSING_OFF = 61
TREE = Guard(Addr(0x4F00_2000), None, Miss())


class FakeLinker:
    """Links what may be linked.

    Attributes:
        is_blocked: Whether somebody sleeps who must not be woken.
        error: Raised by each try, if set.
        tries: When each was made, in steps, and with which sites.
    """

    def __init__(self) -> None:
        """Try nothing yet."""
        self.is_blocked = False
        self.error: StopTimeout | None = None
        self.tries: list[tuple[float, list[Addr]]] = []
        self.now_s = BEGIN_S

    def link(self, moves: Sequence[Move], *, may_delay: bool = False) -> int:
        """Move the sites."""
        assert not may_delay
        self.tries.append((self.now_s - BEGIN_S, [move.record.site.addr for move in moves]))
        if self.error is not None:
            raise self.error
        n_left = 0
        for move in moves:
            if self.is_blocked and needs_all_stopped(move.record.entry):
                n_left += 1
            else:
                move.record.home = move.block
        return len(moves) - n_left


class Walk:
    """A relinker, its sites and its time."""

    def __init__(self, *records: SiteRecord) -> None:
        """Begin with sites that have just changed."""
        self.linker = FakeLinker()
        self.records = records
        self.relinker = Relinker(cast(Linker, self.linker), AFTER_S)

    def walk(self, until_s: float) -> int:
        """Take steps up to a time; return how many sites moved."""
        n_moved = 0
        while self.linker.now_s < BEGIN_S + until_s:
            self.linker.now_s += STEP_S
            n_moved += self.relinker.step(self.records, self.linker.now_s, lambda _: False)
        return n_moved

    @property
    def times_s(self) -> list[float]:
        """When tries were made, since the begin."""
        return [when_s for when_s, _ in self.linker.tries]


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Return an arena."""
    made = make_arena(n_sites=4)
    yield made
    made.close()


def write(arena: Arena) -> Block:
    """Write a block."""
    miss_addr = arena.add_counters(1)
    plan = BlockPlan(operand="rax", tree=TREE, thunk_addr=THUNK.addr, miss_count_addr=miss_addr)
    return add_block(arena, plan, site_addr=make_site().addr)


def promoted_anew(arena: Arena, number: int = 0, *, is_crossing: bool) -> SiteRecord:
    """Return a site that goes on from its home to another block since just now."""
    site = make_site(number)
    off = CROSSING_OFF if is_crossing else 0
    addr = Addr(site.addr // 64 * 64 + 64 * number + off)
    site = replace(site, addr=addr, disp_addr=Addr(addr + 1))
    record = make_record(arena, site, SiteState.PROMOTED)
    record.home, record.active = write(arena), write(arena)
    record.changed_s = BEGIN_S
    assert needs_all_stopped(record.entry) == is_crossing
    return record


def test_a_sleeper_in_the_way_is_looked_for_less_and_less_often(arena: Arena) -> None:
    crossing = promoted_anew(arena, is_crossing=True)
    walk = Walk(crossing)
    walk.linker.is_blocked = True
    assert walk.walk(300.0) == 0
    # The first when it was quiet; from then on twice the last pause, at most 64 times the first.
    assert walk.times_s == [1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 127.0, 191.0, 255.0]
    assert crossing.n_relinked == 0
    walk.linker.is_blocked = False
    assert walk.walk(300.0 + MAX_RELINK_WAITS * AFTER_S) == 1
    assert crossing.n_relinked == 1
    assert crossing.home is crossing.active


def test_demoted_site_with_a_sleeper_in_the_way(arena: Arena) -> None:
    crossing = promoted_anew(arena, is_crossing=True)
    crossing.active, crossing.state = None, SiteState.BASELINE
    walk = Walk(crossing)
    walk.linker.is_blocked = True
    walk.walk(10.0)
    assert walk.times_s == [1.0, 3.0, 7.0]


def test_other_sites_do_not_wait_for_the_sleeper(arena: Arena) -> None:
    crossing = promoted_anew(arena, 0, is_crossing=True)
    late, other = (
        promoted_anew(arena, 1, is_crossing=True),
        promoted_anew(arena, 2, is_crossing=False),
    )
    other.changed_s += 1.0
    late.changed_s += 2.5
    walk = Walk(crossing, late, other)
    walk.linker.is_blocked = True
    assert walk.walk(10.0) == 1
    first, second, third = crossing.site.addr, late.site.addr, other.site.addr
    # The two that the sleeper is in the way of are tried together, however they came.
    assert walk.linker.tries == [
        (1.0, [first]),
        (2.0, [third]),
        (3.0, [first]),
        (7.0, [first, second]),
    ]
    assert [record.n_relinked for record in walk.records] == [0, 0, 1]


def test_patience_ends_with_a_try_that_was_not_in_vain(arena: Arena) -> None:
    crossing = promoted_anew(arena, is_crossing=True)
    walk = Walk(crossing)
    walk.linker.is_blocked = True
    walk.walk(3.0)
    walk.linker.is_blocked = False
    assert walk.walk(7.0) == 1
    crossing.active, crossing.changed_s = write(arena), BEGIN_S + 7.0
    walk.linker.is_blocked = True
    walk.walk(16.0)
    # It was linked anew once, so it has to be quiet twice as long.
    assert walk.times_s == [1.0, 3.0, 7.0, 9.0, 11.0, 15.0]


def test_threads_that_cannot_be_stopped_are_left_alone_for_a_while(arena: Arena) -> None:
    record = promoted_anew(arena, is_crossing=False)
    walk = Walk(record)
    walk.linker.error = StopTimeout(1, (1,))
    while len(walk.linker.tries) < 4:
        try:
            walk.walk(20.0)
        except StopTimeout:
            continue
    assert walk.times_s == [1.0, 3.0, 7.0, 15.0]
    assert record.n_relinked == 0
    walk.linker.error = None
    assert walk.walk(31.0) == 1
    assert record.n_relinked == 1


def test_sites_that_are_lost_to_another_patcher_keep_nobody_waiting(arena: Arena) -> None:
    crossing = promoted_anew(arena, is_crossing=True)
    walk = Walk(crossing)
    walk.linker.is_blocked = True
    walk.walk(1.0)
    crossing.state, crossing.refusal = SiteState.REFUSED, Refusal.FOREIGN_BYTES
    assert walk.walk(10.0) == 0
    assert walk.times_s == [1.0]
