# SPDX-License-Identifier: Apache-2.0
"""How live tests promote a program however busy the machine is, and what was promoted."""

from __future__ import annotations

import time

import optpoline
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import DetachOutcome, SiteState
from optpoline.process.leader import find_live_tid
from tests.live.conftest import LiveTarget
from tests.live.witness import Witness

__all__ = ["learn_and_promote", "promote", "promoted_sites", "serve"]

_TIMEOUT_S = 30.0
_WINDOW_S = 0.1


def learn_and_promote(session: optpoline.Session) -> None:
    """Learn until there was something to promote: a window may have met no running thread."""
    deadline = time.monotonic() + _TIMEOUT_S
    session.learn(_WINDOW_S)
    while session.promote() == 0:
        assert time.monotonic() < deadline, session.summary()
        session.learn(_WINDOW_S)


def promote(pid: int) -> optpoline.Session:
    """Attach and promote."""
    session = optpoline.attach(pid)
    try:
        learn_and_promote(session)
    except BaseException:
        session.abandon()
        raise
    return session


def promoted_sites(session: optpoline.Session) -> list[SiteRecord]:
    """Return what a session knows of the sites that are promoted now."""
    return [record for record in session.records if record.state is SiteState.PROMOTED]


def serve(target: LiveTarget) -> None:
    """Promote and let go; nothing may be left."""
    shown = find_live_tid(target.pid)
    before = Witness.of(shown)
    with promote(target.pid) as session:
        session.watch(0.1)
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(shown)
