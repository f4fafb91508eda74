# SPDX-License-Identifier: Apache-2.0
"""A site that is promoted anew again and again: its text stays, and nobody is stopped."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

import optpoline
from optpoline.controller.audit import audit
from optpoline.controller.summary import DetachOutcome, SiteState
from optpoline.patch.blocks import redirection_of
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.fickle import EAGER
from tests.live.witness import RETPOLINE, Witness

pytestmark = pytest.mark.live

TIMEOUT_S = 15.0

CONFIG = replace(EAGER, learn_s=0.1, relink_after_s=0.03)


def _is_settled(session: optpoline.Session) -> bool:
    """Tell whether every site's text leads straight to where its work is done."""
    return all(
        record.home is not None
        and record.home is record.active
        and redirection_of(record.arena, record.home.addr) is None
        for record in session.records
    )


def _change(session: optpoline.Session, target: LiveTarget, phase: int) -> None:
    """Set a phase, and watch until sites were promoted anew and have settled."""
    n_relearned = session.summary().relearned
    target.ask(str(phase))
    deadline = time.monotonic() + TIMEOUT_S
    while session.summary().relearned == n_relearned or not _is_settled(session):
        session.watch(0.02)
        assert time.monotonic() < deadline


def test_text_stays_while_busy_threads_run(start_target: StartTarget) -> None:
    target = start_target("promote", "2", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid, config=CONFIG) as session:
        session.learn()
        assert session.promote() == len(session.records)
        _change(session, target, 2)  # its homes have room for this, and all that is smaller
        text = before.changed_bytes(target.pid)
        n_stops = session.summary().stops
        for phase in (4, 1):
            homes = {record.home.addr for record in session.records if record.home is not None}
            _change(session, target, phase)
            assert homes == {r.home.addr for r in session.records if r.home is not None}
        assert audit(target.pid).is_sound
        assert before.changed_bytes(target.pid) == text
        assert session.summary().stops == n_stops
        assert all(record.state is SiteState.PROMOTED for record in session.records)
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")
