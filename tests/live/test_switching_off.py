# SPDX-License-Identifier: Apache-2.0
"""Both ways to change a promoted site: swapped, and with its fast path switched off."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import pytest

import optpoline
from optpoline.controller.arguments import CHANGES, Change
from optpoline.controller.audit import audit
from optpoline.controller.reclaim import Reclaimer
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import DetachOutcome
from optpoline.model import tree_targets
from optpoline.patch.block_table import BlockTable
from optpoline.patch.blocks import Block, redirection_of
from optpoline.patch.layout import BlockEntry, BlockState
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.fickle import fickle_config
from tests.live.serving import promoted_sites
from tests.live.witness import RETPOLINE, Witness

pytestmark = pytest.mark.live

TIMEOUT_S = 15.0


def _promote(
    target: LiveTarget, config: optpoline.Config, told: list[str] | None = None
) -> optpoline.Session:
    """Attach to a target and promote what runs; add what the session tells to ``told``."""
    words = [] if told is None else told
    session = optpoline.attach(
        target.pid, config=config, on_event=lambda event: words.append(event.message)
    )
    session.learn()
    assert session.promote()
    return session


def _watch_until(session: optpoline.Session, condition: Callable[[], bool]) -> None:
    """Watch until something holds."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        session.watch(0.02)
        assert time.monotonic() < deadline


def _change_more(session: optpoline.Session, n_changes: int) -> None:
    """Watch until sites were promoted anew so many times."""
    n_before = session.summary().relearned
    _watch_until(session, lambda: session.summary().relearned >= n_before + n_changes)


def _check_blocks(records: list[SiteRecord]) -> None:
    """Check that what is at work is the tree that was decided on, byte for byte."""
    for record in records:
        assert record.off is None
        assert record.plan is not None
        block = record.active
        assert block is not None
        assert set(tree_targets(block.plan.tree)) == set(record.plan.targets)
        code = record.arena.templates.encode(block.plan, block.addr).code
        assert record.arena.read(block.addr, block.size) == code


@pytest.mark.parametrize("change", CHANGES)
def test_right_under_signals(start_target: StartTarget, change: Change) -> None:
    target = start_target("life", "tidy", "2", flags=RETPOLINE)
    before = Witness.of(target.pid)
    told: list[str] = []
    with _promote(target, fickle_config(change), told) as session:
        _change_more(session, 5)
        _check_blocks(promoted_sites(session))
        assert audit(target.pid).is_sound
        again = [message for message in told if "promoted anew" in message]
        n_swapped = sum("swapped" in message for message in again)
        # Now and then what signals leave on a stack forbids it.
        assert n_swapped <= (len(again) // 2 if change == "switch-off" else 0)
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_no_block_is_made(start_target: StartTarget) -> None:
    target = start_target("promote", "2", flags=RETPOLINE)
    before = Witness.of(target.pid)
    told: list[str] = []
    with _promote(target, fickle_config("switch-off"), told) as session:
        target.ask("3")  # more targets than it was promoted with: some find no room at first
        again = ["swapped"]
        deadline = time.monotonic() + TIMEOUT_S
        while any("swapped" in message for message in again):
            assert time.monotonic() < deadline
            _watch_until(session, lambda: all(r.home is r.active for r in promoted_sites(session)))
            homes = {
                record.home.addr for record in promoted_sites(session) if record.home is not None
            }
            text, n_told = before.changed_bytes(target.pid), len(told)
            _change_more(session, 4)
            again = [message for message in told[n_told:] if "promoted anew" in message]
        assert again
        assert homes == {r.home.addr for r in promoted_sites(session) if r.home is not None}
        _check_blocks(promoted_sites(session))
        assert before.changed_bytes(target.pid) == text
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


# --- a thread that is inside the old tree


def _step_until(session: optpoline.Session, condition: Callable[[], bool]) -> None:
    """Take a session's steps one by one, as a watch does, until something holds."""
    deadline = time.monotonic() + TIMEOUT_S
    assert session._watch is not None
    while not condition():
        session._watch.step(time.monotonic())
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _make_due(session: optpoline.Session, due: SiteRecord) -> None:
    """Let a site be looked at now, and no other."""
    now_s = time.monotonic()
    for record in session.records:
        record.next_sample_s = now_s if record is due else now_s + 1000.0
    session._work.upkeep._sampler.settled(session.records, (), now_s)


def _first_due(session: optpoline.Session) -> SiteRecord:
    """Return the hottest site, which is about to be changed, alone."""
    record = max(promoted_sites(session), key=lambda record: record.rate_hz or 0.0)
    _make_due(session, record)
    return record


def _check_changed(session: optpoline.Session, record: SiteRecord, before: Block) -> None:
    """Take steps until a site is switched on, and check that it was changed in its place.

    On a busy machine it may have been changed twice by then, and back.
    """
    _step_until(session, lambda: record.off is None)
    assert session._work.upkeep._settler.take_reasons() == ()
    home = record.home
    assert home is not None
    assert home is record.active
    assert (home.arena, home.addr) == (before.arena, before.addr)
    assert home is not before
    assert record.n_relearned > 0
    _check_blocks([record])


def test_who_is_inside_is_waited_for(start_target: StartTarget) -> None:
    target = start_target("life", "armed", "2", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with _promote(target, fickle_config("switch-off")) as session:
        record = _first_due(session)
        home = record.home
        assert home is not None
        body = home.arena.read(home.addr, home.size)[8:]
        # A signal comes when a thread is there, and its handler waits.
        assert target.ask_to_block(home.addr + 8, home.addr + home.size) == "blocked"
        _step_until(session, lambda: record.off is not None)
        end_s = time.monotonic() + 0.2
        _step_until(session, lambda: time.monotonic() >= end_s)
        # All that time nothing but the head was changed.
        assert record.off is not None
        assert home.arena.read(home.addr, home.size)[8:] == body
        assert redirection_of(home.arena, home.addr) == record.thunk_addr
        assert audit(target.pid).is_sound
        assert target.ask("release") == "released"
        _check_changed(session, record, home)
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check_text(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_forked_while_it_is_off(start_target: StartTarget) -> None:
    target = start_target("life", "spin", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    config = replace(fickle_config("switch-off"), follow_fork=True)
    with _promote(target, config) as session:
        record = _first_due(session)
        home = record.home
        assert home is not None
        _step_until(session, lambda: record.off is not None)
        assert target.ask("fork").startswith("child")
        assert record.off is not None
        _check_changed(session, record, home)
        assert target.ask("join").startswith("status 0 wrong 0 rounds")
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check_text(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


# --- a controller that is killed


def _be_killed(pid: int, when: str) -> NoReturn:
    """Change sites until killed by ourselves; in a child of ours."""

    def die(*_: object) -> None:
        """Die where a grace period begins, with the fast path off."""
        os.kill(os.getpid(), signal.SIGKILL)

    def die_rewriting(table: BlockTable, entry: BlockEntry, state: BlockState) -> None:
        """Die where the bytes behind the head are about to be replaced."""
        set_state(table, entry, state)
        if state is BlockState.REWRITTEN:
            die()

    set_state = BlockTable.set_state
    patch = pytest.MonkeyPatch()
    try:
        with optpoline.attach(pid, config=fickle_config("switch-off")) as session:
            session.learn()
            session.promote()
            if when == "waiting":
                patch.setattr(Reclaimer, "await_left", die)
            else:
                patch.setattr(BlockTable, "set_state", die_rewriting)
            session.watch(TIMEOUT_S)
    finally:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("when", ["waiting", "rewriting"])
def test_killed_while_it_is_off(start_target: StartTarget, when: str) -> None:
    target = start_target("life", "spin", "2", flags=RETPOLINE)
    before = Witness.of(target.pid)
    controller = os.fork()
    if controller == 0:
        _be_killed(target.pid, when)
    _, status = os.waitpid(controller, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    report = audit(target.pid)
    assert report.is_sound
    is_noted = any("was being rewritten" in note for note in report.notes)
    assert is_noted == (when == "rewriting")
    rounds = int(target.ask("rounds").split()[1])
    assert optpoline.read_status(target.pid) is not None
    assert optpoline.restore(target.pid).outcome is DetachOutcome.CLEAN
    assert int(target.ask("rounds").split()[1]) > rounds
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")
