# SPDX-License-Identifier: Apache-2.0
"""A site is changed with its fast path switched off: the steps, and each way out of them."""

from __future__ import annotations

from typing import cast

import pytest

from optpoline.controller.config import Config
from optpoline.controller.reclaim import Reclaimer
from optpoline.controller.records import SiteRecord
from optpoline.controller.settling import (
    LOOK_EVERY_S,
    OFF_PATIENCE_S,
    SEEN_S,
    STAYED,
    SWITCHING,
    Settler,
)
from optpoline.controller.summary import SiteState
from optpoline.controller.switching_off import NO_ROOM, NOT_AT_HOME
from optpoline.model import Addr, Refusal
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block, redirect, redirection_of
from optpoline.patch.layout import BlockState
from optpoline.promote.policy import Action, Decision
from optpoline.promote.tree import PlannedTree
from tests.unit.controller.lone_arena import THUNK, make_record
from tests.unit.controller.test_settling import (
    FEW,
    MANY,
    SITE,
    FakeReclaimer,
    Watched,
    arena,
    code_of,
    judge,
    write,
)

__all__ = ["arena"]

PLAN = PlannedTree(tree=MANY, targets=(), hit_ratio=1.0, cycles=2.0)
OLD_PLAN = PlannedTree(tree=FEW, targets=(), hit_ratio=1.0, cycles=2.0)
DECISION = Decision(action=Action.PROMOTE, plan=PLAN)


class Walk:
    """A promoted site, a settler that changes it, and its time."""

    def __init__(self, arena: Arena, slack_ratio: float = 3.0) -> None:
        """Begin with a site whose text leads straight to its block."""
        self.record = make_record(arena, SITE, SiteState.PROMOTED)
        self.record.home = self.record.active = self.old = write(arena, FEW, slack_ratio)
        self.record.plan = OLD_PLAN
        self.reclaimer = FakeReclaimer()
        self.settler = Settler(Config(change="switch-off"), cast(Reclaimer, self.reclaimer))
        self.now_s = 10.0

    @property
    def home(self) -> Block:
        """Where its text leads."""
        assert self.record.home is not None
        return self.record.home

    def change(self) -> bool:
        """Promote it anew."""
        return self.settler.change(self.record, DECISION, self.now_s)

    def step(self, seconds: float = LOOK_EVERY_S) -> int:
        """Let time pass and take a step."""
        self.now_s += seconds
        return self.settler.step([self.record], self.now_s)

    def ahead(self) -> Addr | None:
        """Return where home's head leads."""
        return redirection_of(self.home.arena, self.home.addr)


def bytes_of(block: Block) -> bytes:
    """Return what the arena has where a block is."""
    return block.arena.read(block.addr, block.size)


def is_off(record: SiteRecord) -> bool:
    """Tell whether a site's fast path is switched off."""
    return record.off is not None


def test_steps(arena: Arena) -> None:
    walk = Walk(arena)
    old_body = bytes_of(walk.home)[8:]
    free_size, n_put = arena.free_code_size, arena.n_put
    assert walk.change() is False
    assert walk.ahead() == THUNK.addr
    assert walk.record.active is None
    assert walk.record.plan is OLD_PLAN  # what it goes by until the new one is at work
    assert walk.settler.is_any_off
    assert [code.start for code in walk.reclaimer.awaited] == [walk.home.addr + 1]
    assert walk.step() == 0
    assert bytes_of(walk.old)[8:] == old_body
    walk.reclaimer.end()
    assert walk.step(0.001) == 0
    assert bytes_of(walk.old)[8:] != old_body
    assert walk.ahead() == THUNK.addr
    assert walk.step(SEEN_S / 2) == 0
    assert walk.step(SEEN_S) == 1
    record = walk.record
    assert walk.settler.take_changed() == (record,)
    assert walk.settler.take_changed() == ()
    assert record.home is record.active is not None
    assert (record.active.addr, record.active.plan.tree) == (walk.old.addr, MANY)
    assert bytes_of(record.active) == code_of(arena, record.active)
    assert record.active.plan.miss_count_addr == walk.old.plan.miss_count_addr
    assert (record.plan, record.n_changes, record.n_relearned) == (PLAN, 1, 1)
    assert (is_off(record), walk.settler.is_any_off) == (False, False)
    # Nothing is taken beside the home.
    assert (arena.free_code_size, arena.n_put) == (free_size, n_put)
    assert walk.settler.take_reasons() == ()


def test_no_room_is_swapped(arena: Arena) -> None:
    walk = Walk(arena, slack_ratio=0.0)
    write(arena, FEW)  # right behind it
    assert walk.change() is True
    assert walk.settler.take_reasons() == (NO_ROOM,)
    record = walk.record
    assert record.active is not None
    assert walk.ahead() == record.active.addr != walk.old.addr
    assert (is_off(record), record.n_relearned) == (False, 1)
    # Before its text has followed, or it has settled, it is swapped again.
    assert walk.change() is True
    assert walk.settler.take_reasons() == (NOT_AT_HOME,)
    assert walk.reclaimer.awaited == []


@pytest.mark.parametrize("why", [STAYED, SWITCHING])
def test_grace_period_that_does_not_end(arena: Arena, why: str) -> None:
    walk = Walk(arena)
    before = bytes_of(walk.home)
    walk.change()
    if why is SWITCHING:
        walk.reclaimer.is_switching = True
    walk.step(0.001 if why is SWITCHING else OFF_PATIENCE_S)
    record = walk.record
    # The new tree is at work, in a block of its own; the old one is whole for who is inside.
    assert walk.settler.take_changed() == (record,)
    assert walk.settler.take_reasons() == (why,)
    assert record.active is not None
    assert record.active is not record.home is walk.old
    assert walk.ahead() == record.active.addr
    assert bytes_of(walk.old)[8:] == before[8:]
    assert (record.plan, record.n_changes, record.n_relearned) == (PLAN, 1, 1)
    assert not walk.settler.is_any_off
    # Not in vain again.
    record.home = record.active
    assert walk.change() is True
    assert walk.settler.take_reasons() == (why,)


@pytest.mark.parametrize("is_written", [False, True])
def test_end_of_the_watch(arena: Arena, is_written: bool) -> None:
    walk = Walk(arena)
    before = bytes_of(walk.home)
    walk.change()
    if is_written:
        walk.reclaimer.end()
        walk.step(0.001)
    assert walk.settler.end()
    record = walk.record
    assert record.home is record.active is not None
    assert walk.ahead() is None
    assert not is_off(record)
    assert record.plan is (PLAN if is_written else OLD_PLAN)
    assert walk.settler.take_changed() == ((record,) if is_written else ())
    if not is_written:
        assert bytes_of(walk.old) == before
    assert not walk.settler.end()
    walk.step()
    assert walk.reclaimer.awaited == []
    walk.reclaimer.end()
    walk.step()
    assert bytes_of(record.active) == code_of(arena, record.active)


def test_what_was_seen_before_it_was_put_back_counts_no_more(arena: Arena) -> None:
    walk = Walk(arena)
    walk.change()
    walk.reclaimer.end()  # nobody is inside
    walk.settler.end()  # but from here on anybody may be
    body = bytes_of(walk.home)[8:]
    walk.change()
    assert len(walk.reclaimer.awaited) == 1
    assert walk.step() == 0
    assert walk.step() == 0
    assert bytes_of(walk.old)[8:] == body
    walk.reclaimer.end()
    walk.step(0.001)
    assert walk.step() == 1


def test_refused_meanwhile(arena: Arena) -> None:
    walk = Walk(arena)
    before = bytes_of(walk.home)
    walk.change()
    walk.record.refuse(Refusal.FLAGS_LIVE)
    walk.reclaimer.end()
    for _ in range(3):
        assert walk.step() == 0
    assert bytes_of(walk.old)[8:] == before[8:]
    assert walk.ahead() == THUNK.addr
    assert walk.settler.take_changed() == ()
    assert not walk.settler.is_any_off


def test_module_unmapped_meanwhile(arena: Arena) -> None:
    walk = Walk(arena)
    before = bytes_of(walk.home)
    walk.change()
    arena.retire_block(walk.old.addr)  # as the sweep does, once its site is gone
    walk.settler.forget(Addr(SITE.addr - 16), Addr(SITE.addr + 16))
    walk.reclaimer.end()
    assert walk.step() == 0
    assert bytes_of(walk.old)[8:] == before[8:]
    assert not walk.settler.is_any_off


def test_killed_at_every_store(arena: Arena) -> None:
    """Whoever looks then finds an arena that is whole, and a site that leads to its thunk."""
    walk = Walk(arena)
    looks: list[bytes] = []
    view = memoryview(arena._memory.mapped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena._memory, "mapped", Watched(view, looks))
        patch.setattr(arena._memory, "_words", Watched(view.cast("Q"), looks))
        walk.change()
        n_off = len(looks)
        walk.reclaimer.end()
        walk.step(0.001)
        n_written = len(looks)
        walk.step()
    assert n_off < n_written < len(looks)
    n_remarks = 0
    for number, data in enumerate(looks):
        faults, remarks = judge(data, walk.record)
        assert faults == []
        n_remarks += "was being rewritten" in " ".join(remarks)
        off = walk.home.addr - arena.addr
        is_jump = data[off : off + 1] == b"\xe9"
        assert is_jump == (n_off - 1 <= number < n_written)
    assert 0 < n_remarks < n_written - n_off
    view.release()


def test_states_in_the_block_table(arena: Arena) -> None:
    walk = Walk(arena)
    walk.change()
    states = {block.state for block in arena.blocks if block.addr == walk.old.addr}
    assert states == {BlockState.LIVE}  # and whole, but for its head
    redirect(walk.home, THUNK.addr)
    walk.reclaimer.end()
    walk.step(0.001)
    walk.step(SEEN_S)
    (block,) = [block for block in arena.blocks if block.addr == walk.old.addr]
    assert (block.state, block.head) == (BlockState.LIVE, walk.home.head)
