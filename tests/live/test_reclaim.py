# SPDX-License-Identifier: Apache-2.0
"""Memory of replaced blocks is used again, and nobody notices: threads, children, sleepers."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import optpoline
from optpoline.controller.summary import DetachOutcome
from optpoline.patch.layout import BlockState
from optpoline.x86.blocks import POISON
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.fickle import EAGER
from tests.live.witness import Witness, arena_mappings

RETPOLINE = ("-mindirect-branch=thunk", "-mindirect-branch-register", "-fcf-protection=none")
_TIMEOUT_S = 60.0

CONFIG = replace(EAGER, relink_after_s=0.1, reclaim_after_size=512, reclaim_every_s=0.02)
"""Wants every byte back."""


def _churn_until_reused(session: optpoline.Session, target: LiveTarget, n_blocks: int) -> None:
    """Change what is hot until so many blocks lie where others were."""
    deadline = time.monotonic() + _TIMEOUT_S
    for phase in itertools.cycle(range(5)):
        target.ask(str(phase))
        session.watch(0.15)
        if session.summary().reclaim.blocks_reused >= n_blocks:
            return
        assert time.monotonic() < deadline, session.summary().reclaim


def test_blocks_are_reused_after_grace_periods(start_target: StartTarget) -> None:
    target = start_target("promote", "2", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid, config=CONFIG) as session:
        session.learn(0.2)
        session.promote()
        _churn_until_reused(session, target, 5)
        reclaim = session.summary().reclaim
        assert reclaim.grace_periods > 0
        assert reclaim.blocks_retired >= reclaim.blocks_reclaimed >= 1
        _check_free_memory(session)
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def _check_free_memory(session: optpoline.Session) -> None:
    """Check that what no block has is poison, up to where there was ever one."""
    for arena in session.target.arenas:
        taken: set[int] = set()
        for block in arena.blocks:
            assert block.state in (BlockState.LIVE, BlockState.RETIRED)
            own = set(range(block.addr, block.end))
            assert not own & taken
            taken |= own
        code = arena.read(arena.code_start, arena.used_code_end - arena.code_start)
        free = {byte for off, byte in enumerate(code) if arena.code_start + off not in taken}
        assert free <= {POISON}


def test_what_a_child_leads_to_is_kept(start_target: StartTarget) -> None:
    target = start_target("life", "spin", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    # Only a child that is followed is stopped for a look; one that runs without end and
    # is not holds everything up.
    with optpoline.attach(target.pid, config=replace(CONFIG, follow_fork=True)) as session:
        session.learn(0.2)
        session.promote()
        child = int(target.ask("fork").split()[1])
        # The text of the child leads to blocks that the parent's leads to no more.
        homes = {record.home.addr for record in session.records if record.home is not None}
        assert homes
        deadline = time.monotonic() + _TIMEOUT_S
        while session.summary().reclaim.blocks_reclaimed < 1:
            session.learn(0.05)
            session.promote()
            session.watch(0.1)
            assert time.monotonic() < deadline, session.summary().reclaim
        live = {
            block.addr
            for arena in session.target.arenas
            for block in arena.blocks
            if block.state is BlockState.LIVE
        }
        assert homes <= live
        assert target.ask("join").startswith("status 0 wrong 0 rounds"), child
        session.detach()
    before.check_text(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_followed_children_are_restored(start_target: StartTarget) -> None:
    target = start_target("life", "spin", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    config = optpoline.Config(follow_fork=True)
    with optpoline.attach(target.pid, config=config) as session:
        session.learn(0.2)
        session.promote()
        child = int(target.ask("fork").split()[1])
        assert before.changed_bytes(child)
        result = session.detach()
    assert result.outcome is DetachOutcome.CLEAN
    before.check_text(child)
    assert arena_mappings(child) == []
    assert target.ask("join").startswith("status 0 wrong 0 rounds")
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")
