# SPDX-License-Identifier: Apache-2.0
"""Sites of one table of dynamic calls share what they learn."""

from __future__ import annotations

import time

import pytest

import optpoline
from optpoline.controller.audit import audit
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import BranchSource, SiteState, SiteSummary
from tests.live.conftest import TARGETS, LiveTarget, StartTarget
from tests.live.witness import RETPOLINE, Witness

pytestmark = pytest.mark.live

LEARN_S = 0.1
HOT_S = 0.4
"""Long enough for a sampled site to be linked, and to count."""
INCLUDE = TARGETS.parents[1] / "src" / "optpoline" / "share" / "include"
TIMEOUT_S = 30.0


@pytest.fixture
def target(start_target: StartTarget) -> LiveTarget:
    """Start a program with a hot and a cold site of one table, and a site of another one."""
    return start_target("shared", flags=(*RETPOLINE, f"-I{INCLUDE}"))


def sites_of(session: optpoline.Session) -> dict[str, SiteSummary]:
    """Return the sites by their functions."""
    sites = session.summary().sites
    return {(site.function or "").split("+")[0]: site for site in sites if site.table}


def record_of(session: optpoline.Session, function: str) -> SiteRecord:
    """Return the record of a function's site."""
    (record,) = (r for r in session.records if r.site.function == function)
    return record


def n_missed(record: SiteRecord) -> int:
    """Return how many branches of a promoted site found no guard."""
    assert record.active is not None
    assert record.active.plan.miss_count_addr is not None
    return record.arena.load_u64(record.active.plan.miss_count_addr)


def promote_all(session: optpoline.Session, learn_s: float) -> None:
    """Learn until the two sites that run have done so, on however busy a machine."""
    n_promoted = 0
    while n_promoted < 3:
        session.learn(learn_s)
        n_promoted += session.promote()
    assert n_promoted == 3


def check_cold_hits(target: LiveTarget, session: optpoline.Session) -> None:
    """Have the cold site run for the first time: it hits from its first branch on."""
    sites = sites_of(session)
    assert {name: site.table for name, site in sites.items()} == {
        "hot": "handlers",
        "cold": "handlers",
        "lone": "others",
    }
    assert {name: site.source for name, site in sites.items()} == {
        "hot": BranchSource.SITE,
        "cold": BranchSource.TABLE,
        "lone": BranchSource.SITE,
    }
    cold = sites["cold"]
    assert (cold.state, cold.rate_hz or 0.0, cold.hit_rate) == (SiteState.PROMOTED, 0.0, None)
    assert [t.function for t in cold.targets if t.promoted] == ["f0", "f1"]
    target.ask("cold")
    record = record_of(session, "cold")
    assert n_missed(record) == 0
    assert record.n_relearned == 0


def test_cold_site_has_its_tables_branches(target: LiveTarget) -> None:
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        promote_all(session, LEARN_S)
        check_cold_hits(target, session)
        session.watch(0.1)
        cold = record_of(session, "cold")
        assert (cold.state, cold.n_relearned) == (SiteState.PROMOTED, 0)
        # What it does by itself is learned at once, and is what counts from then on.
        target.ask("strange")
        end_s = time.monotonic() + TIMEOUT_S
        while cold.source is BranchSource.TABLE:
            assert time.monotonic() < end_s
            session.watch(0.05)
        site = sites_of(session)["cold"]
        assert site.source is BranchSource.SITE
        assert site.targets[0].function == "f2"
        assert site.targets[0].promoted
        assert audit(target.pid).is_sound
    before.check(target.pid)
    assert target.finish() == "wrong 0\n"


def test_site_that_was_not_even_learned(
    target: LiveTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a program of thousands of sites, where only those are learned that samples meet.
    monkeypatch.setattr("optpoline.controller.first_learning.ALL_AT_ONCE_SITES", 0)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        promote_all(session, HOT_S)
        assert record_of(session, "cold").learner is None
        check_cold_hits(target, session)
        assert audit(target.pid).is_sound
    before.check(target.pid)
    assert target.finish() == "wrong 0\n"
