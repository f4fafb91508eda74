# SPDX-License-Identifier: Apache-2.0
"""Many sites learn in turn: what comes between two groups, or fails there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

import optpoline
from optpoline.controller import counting_blocks, first_window
from optpoline.controller.audit import audit
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.errors import StopTimeout
from optpoline.process.memory import RemoteMemory
from tests.live.conftest import StartTarget
from tests.live.failing_stops import fail_at
from tests.live.serving import promoted_sites
from tests.live.witness import RETPOLINE, Witness

pytestmark = pytest.mark.live

LEARN_S = 0.16
"""For groups of 0.04 s."""


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each site be a group."""
    monkeypatch.setattr(first_window, "GROUP_SITES", 1)
    monkeypatch.setattr(first_window, "MIN_LEARN_S", 0.04)


def _after_link(
    session: optpoline.Session, monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[], None]
) -> list[int]:
    """Do something once so many groups were linked; return how many sites led to blocks by then."""
    link = session._work.window._link
    linked: list[int] = []

    def watched(
        prepared: first_window._Prepared, done: Sequence[SiteRecord] = ()
    ) -> list[SiteRecord]:
        found = link(prepared, done)
        linked.append(sum(record.home is not None for record in session.records))
        if len(linked) == number:
            do()
        return found

    monkeypatch.setattr(session._work.window, "_link", watched)
    return linked


def test_another_window_ends_early(
    start_target: StartTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was learned before of sites whose turn did not come again is not lost."""
    target = start_target("promote", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S, in_turn=True)
        stop = threading.Event()
        _after_link(session, monkeypatch, 1, stop.set)
        session.learn(LEARN_S, stop, in_turn=True)
        assert session.promote() == 4
        assert audit(target.pid).is_sound
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_a_short_window_has_few_groups(
    start_target: StartTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    with optpoline.attach(target.pid) as session:
        linked = _after_link(session, monkeypatch, 0, lambda: None)
        session.learn(LEARN_S / 2, in_turn=True)
        assert linked == [2, 2]
    assert target.finish().startswith("wrong 0 rounds")


@pytest.mark.parametrize("number", [2, 3])
def test_a_stop_between_groups_fails(
    start_target: StartTarget, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        fail_at(monkeypatch, number)
        with pytest.raises(StopTimeout):
            session.learn(LEARN_S, in_turn=True)
        assert not [
            r for r in session.records if (r.home is None) and r.state is SiteState.LEARNING
        ]
        assert audit(target.pid).is_sound
        session.learn(LEARN_S, in_turn=True)
        assert session.promote() == 4
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_an_arena_is_used_up_between_groups(
    start_target: StartTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the bigger blocks of earlier ones: what they have learned is not lost for that."""
    target = start_target("promote", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        free = session.target.arenas[0].free_code_size
        linked = _after_link(
            session,
            monkeypatch,
            1,
            lambda: monkeypatch.setattr(counting_blocks, "MIN_FREE_CODE_SIZE", free + 1),
        )
        session.learn(LEARN_S, in_turn=True)
        assert linked == [1, 0, 0, 0]
        assert session.promote() == 1
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_somebody_sleeps_when_they_are_promoted(start_target: StartTarget) -> None:
    """Sites for which he had to be woken have kept a block that leads on."""
    target = start_target("crossing", flags=RETPOLINE)
    before = Witness.of(target.pid)
    config = optpoline.Config(relink_after_s=0.01)
    with optpoline.attach(target.pid, config=config) as session:
        session.learn(0.2, in_turn=True)
        target.ask("sleep")
        n_promoted = session.promote()
        promoted = promoted_sites(session)
        assert len(promoted) == n_promoted == 5
        for record in promoted:
            assert record.home is not None
            head = record.arena.read(record.home.addr, 5)
            assert record.active is not None
            dst = record.home.addr + 5 + int.from_bytes(head[1:], "little", signed=True)
            assert record.home is record.active or dst == record.active.addr
        assert audit(target.pid).is_sound
        # As long as he sleeps their text cannot follow, and no thread is stopped to find that out.
        n_stops = session.target.stops.n_stops
        session.watch(0.3)
        assert session.target.stops.n_stops == n_stops
        assert any(record.home is not record.active for record in promoted)
        assert not any(record.n_relinked for record in promoted)
        target.ask("wake")
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_a_child_of_an_earlier_group(
    start_target: StartTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes where its parent goes, though the parent's text did not lead there in between."""
    target = start_target("life", "spin", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        children: list[int] = []
        _after_link(
            session, monkeypatch, 1, lambda: children.append(int(target.ask("fork").split()[1]))
        )
        session.learn(LEARN_S, in_turn=True)
        session.promote()
        (child,) = children
        with RemoteMemory(child) as memory:
            (led,) = (
                record
                for record in session.records
                if memory.read(record.site.addr, len(record.site.code)) != record.site.code
            )
        assert led.learner is not None
        assert led.active is not None
        head = led.arena.read(led.learner.addr, 5)
        dst = led.learner.addr + 5 + int.from_bytes(head[1:], "little", signed=True)
        assert dst == led.active.addr
    before.check_text(target.pid)
    assert target.ask("join").startswith("status 0 wrong 0 rounds")
    assert target.finish().startswith("wrong 0 rounds")
