# SPDX-License-Identifier: Apache-2.0
"""Programs that change their mind: promoted anew without a stop, demoted, found again."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

import optpoline
from optpoline.controller.summary import DetachOutcome, SiteState, SiteSummary
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.witness import RETPOLINE, Witness

pytestmark = pytest.mark.live

TIMEOUT_S = 15.0

HOT = {0: {"f0"}, 1: {"f1", "f2"}, 2: {"f3", "f4", "f5", "f6"}, 4: {"f7"}}
"""Hot functions of phases of the target."""

CONFIG = optpoline.Config(learn_s=0.1, sample_every_s=0.2, relink_after_s=3600.0)


def _watch_until(session: optpoline.Session, condition: Callable[[], bool]) -> float:
    """Watch until something holds; return how long that took."""
    begin_s = time.monotonic()
    while not condition():
        assert time.monotonic() - begin_s < TIMEOUT_S
        session.watch(0.05)
    return time.monotonic() - begin_s


def _site(session: optpoline.Session, kind: str, function: str) -> SiteSummary:
    """Return the one site of a kind in a function."""
    (site,) = (
        site
        for site in session.summary().sites
        if site.kind == kind and (site.function or "").split("+")[0] == function
    )
    return site


def _guarded(site: SiteSummary) -> set[str]:
    """Return the functions a site has guards for and that it took when last sampled."""
    return {t.function or "?" for t in site.targets if t.promoted and t.share > 0}


def _watch_until_guarded(
    session: optpoline.Session, kind: str, function: str, hot: set[str]
) -> None:
    """Watch until a site has guards for what is hot now."""
    _watch_until(session, lambda: _guarded(_site(session, kind, function)) >= hot)


def _misses(session: optpoline.Session) -> int:
    """Return how many branches took no guard in the blocks that are in force."""
    total = 0
    for record in session.records:
        if record.active is not None and record.active.plan.miss_count_addr is not None:
            total += record.arena.load_u64(record.active.plan.miss_count_addr)
    return total


def _rounds(target: LiveTarget, phase: int) -> int:
    """Set a phase; return how many rounds of 4,096 have been made."""
    return int(target.ask(str(phase)).split()[1])


def test_flipped_without_a_stop(start_target: StartTarget) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid, config=CONFIG) as session:
        session.learn()
        session.promote()
        assert _guarded(_site(session, "call", "work")) == {"f0"}
        n_stops = session.summary().stops
        for phase in (1, 4, 2, 0, 4):
            target.ask(str(phase))
            for kind, function in (("call", "work"), ("jump", "tail")):
                _watch_until_guarded(session, kind, function, HOT[phase])
            # What it does now, it does through guards.
            session.watch(0.3)
            n_misses, n_rounds = _misses(session), _rounds(target, phase)
            session.watch(0.2)
            assert _rounds(target, phase) - n_rounds > 5
            assert _misses(session) - n_misses < (_rounds(target, phase) - n_rounds) * 4096 * 0.02
        summary = session.summary()
        assert summary.stops == n_stops
        assert summary.relearned >= 5
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_text_follows_in_one_stop(start_target: StartTarget) -> None:
    target = start_target("promote", "2", flags=RETPOLINE)
    before = Witness.of(target.pid)
    config = optpoline.Config(learn_s=0.1, sample_every_s=0.2, relink_after_s=0.5)
    with optpoline.attach(target.pid, config=config) as session:
        session.learn()
        session.promote()
        n_stops = session.summary().stops
        promoted = before.changed_bytes(target.pid)
        target.ask("4")
        _watch_until(session, lambda: _guarded(_site(session, "call", "work")) >= {"f7"})
        _watch_until(session, lambda: all(r.home is r.active for r in session.records))
        # Sites that changed one after the other may take one stop each.
        assert n_stops < session.summary().stops <= n_stops + 4
        assert before.changed_bytes(target.pid) != promoted
        n_stops = session.summary().stops
        session.watch(1.0)
        assert session.summary().stops == n_stops
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_flipping_all_the_time(start_target: StartTarget) -> None:
    target = start_target("promote", "2", flags=RETPOLINE)
    before = Witness.of(target.pid)
    config = optpoline.Config(
        learn_s=0.05, sample_every_s=0.05, poll_s=0.02, sample_s=0.005, relink_after_s=0.1
    )
    with optpoline.attach(target.pid, config=config) as session:
        session.learn()
        session.promote()
        end_s = time.monotonic() + 4.0
        phase = 0
        while time.monotonic() < end_s:
            phase += 1
            target.ask(str(phase))
            session.watch(0.03 * (phase % 7))
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_demoted_when_nothing_dominates_and_found_again(start_target: StartTarget) -> None:
    target = start_target("many", flags=RETPOLINE)
    before = Witness.of(target.pid)
    config = optpoline.Config(learn_s=0.1, sample_every_s=0.2, relink_after_s=0.2)

    def state() -> SiteState:
        return _site(session, "call", "work").state

    with optpoline.attach(target.pid, config=config) as session:
        session.learn()
        assert session.promote() == 1
        target.ask("1024")
        _watch_until(session, lambda: state() is not SiteState.PROMOTED)
        # Its text follows: a site on its thunk costs nothing more.
        _watch_until(session, lambda: before.changed_bytes(target.pid) == {})
        target.ask("1")
        _watch_until(session, lambda: state() is SiteState.PROMOTED)
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_nothing_dominates_from_the_start(start_target: StartTarget) -> None:
    target = start_target("many", flags=RETPOLINE)
    target.ask("1024")
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(0.3)
        session.promote()
        session.watch(0.3)
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")
