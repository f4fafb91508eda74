# SPDX-License-Identifier: Apache-2.0
"""Which sites are promoted first, by whose counts, and what may keep them from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from optpoline.controller.deciding import FirstDecider, fit_counts
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import BranchSource, SiteState
from optpoline.controller.tables import Tables
from optpoline.learn.counting import NO_COUNTS, SiteCounts
from optpoline.learn.pooling import ENOUGH_COUNT
from optpoline.model import Addr, Count, Refusal, SiteKind, Table
from optpoline.patch.arena import Arena
from optpoline.promote.cost import CostModel
from optpoline.promote.policies.adaptive import AdaptivePolicy
from optpoline.promote.policy import Action, Decision, SiteView, WatchSchedule
from optpoline.promote.tree import plan_tree
from tests.unit.controller.lone_arena import make_arena, make_record, make_site

HANDLERS = Table(name="handlers", type="int, int")
MANY, FEW = 1 << 16, 8


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Return an arena."""
    arena = make_arena(n_sites=8)
    yield arena
    arena.close()


@dataclass
class Watched:
    """The adaptive policy, and what it was asked."""

    policy: AdaptivePolicy = field(default_factory=lambda: AdaptivePolicy(model=CostModel()))
    views: list[SiteView] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return its name."""
        return self.policy.name

    @property
    def schedule(self) -> WatchSchedule:
        """Return its schedule."""
        return self.policy.schedule

    def decide(self, view: SiteView) -> Decision:
        """Decide as it does."""
        self.views.append(view)
        return self.policy.decide(view)

    def is_surprising(self, view: SiteView) -> bool:
        """Answer as it does."""
        return self.policy.is_surprising(view)


def target(number: int) -> Addr:
    """Return the address of a function."""
    return Addr(0x4F10_0000 + 64 * number)


def record_of(
    arena: Arena, number: int, *hits: int, table: Table | None = None, n_unknown: int = 0
) -> SiteRecord:
    """Return the record of a site whose first window of a second counted so many hits a target."""
    record = make_record(arena, replace(make_site(number), table=table))
    if hits:
        counts = tuple(Count(target=target(i), hit_count=n) for i, n in enumerate(hits) if n)
        record.counts = SiteCounts(counts=counts, n_unknown=n_unknown)
        record.window_s, record.rate_hz = 1.0, float(record.counts.total)
        record.is_news = True
    return record


@dataclass
class Guards:
    """Which targets may be guarded, and at which sites that was asked."""

    far: tuple[Addr, ...] = ()
    reading: tuple[Addr, ...] = ()
    unsafe: tuple[Addr, ...] = ()
    asked: list[SiteRecord] = field(default_factory=list)

    def __call__(self, record: SiteRecord, addr: Addr) -> bool:
        """Tell, and note why not, as ``Target.may_guard``."""
        self.asked.append(record)
        if addr in self.far:
            record.far_targets.add(addr)
            return False
        if addr in self.reading:
            record.operand_targets.add(addr)
        if record.site.kind is SiteKind.JUMP and addr in self.unsafe:
            record.unsafe_targets.add(addr)
            record.refuse(Refusal.FLAGS_LIVE)
            return False
        return True


def make_decider(
    *records: SiteRecord, policy: Watched | None = None, guards: Guards | None = None
) -> FirstDecider:
    """Return a decider on these sites, whose tables know what they counted."""
    tables = Tables()
    tables.use(records)
    for record in records:
        tables.note(record, record.news or NO_COUNTS)
    return FirstDecider(
        policy or Watched(),
        guards or Guards(),
        lambda record: (record.site.kind, record.site.module),
        tables,
        now_s=100.0,
    )


def guarded(decision: Decision | None) -> set[Addr]:
    """Return what a decision to promote has guards for."""
    assert decision is not None
    assert decision.plan is not None
    return set(decision.plan.targets)


def test_a_hot_site_is_promoted_by_its_own_counts(arena: Arena) -> None:
    """Its targets are guarded, and whose counts it was is noted."""
    record = record_of(arena, 0, MANY, MANY // 2)
    decision = make_decider(record).decide(record, 0.0)
    assert guarded(decision) == {target(0), target(1)}
    assert record.source is BranchSource.SITE


def test_what_a_site_had_before_is_not_what_it_has(arena: Arena) -> None:
    """One that leads to its thunk is told to have no tree, whatever its record still says."""
    record = record_of(arena, 0, MANY)
    assert record.counts is not None
    record.plan = plan_tree(record.counts.counts, 0, CostModel())
    record.profile = record.counts
    policy = Watched()
    decision = make_decider(record, policy=policy).decide(record, 0.0)
    assert decision is not None
    assert decision.action is Action.PROMOTE
    assert [(view.current, view.profile) for view in policy.views] == [(None, None)]


def test_a_site_that_was_not_counted_is_not_decided_on(arena: Arena) -> None:
    """Nor one that counted little, for want of a table; nobody's counts were enough."""
    unknown, rare = record_of(arena, 0), record_of(arena, 1, FEW)
    policy = Watched()
    decider = make_decider(unknown, rare, policy=policy)
    assert decider.decide(unknown, 0.0) is None
    assert not policy.views
    assert decider.decide(rare, 0.0) is None
    assert unknown.source is rare.source is None


def test_a_refused_site_is_not_decided_on(arena: Arena) -> None:
    """Nor one with a target that reads the flags."""
    refused, unsafe = record_of(arena, 0, MANY), record_of(arena, 1, MANY)
    refused.state = SiteState.REFUSED
    unsafe.unsafe_targets.add(target(0))
    policy = Watched()
    decider = make_decider(refused, unsafe, policy=policy)
    assert decider.decide(refused, 0.0) is None
    assert decider.decide(unsafe, 0.0) is None
    assert not policy.views


def test_targets_that_must_not_be_guarded_count_as_unknown(arena: Arena) -> None:
    """The total stays: they are misses of any tree."""
    record = record_of(arena, 0, MANY, MANY // 2, n_unknown=3)
    assert record.counts is not None
    counts = fit_counts(record, record.counts, lambda _, addr: addr != target(1))
    assert [count.target for count in counts.counts] == [target(0)]
    assert counts.n_unknown == 3 + MANY // 2
    assert counts.total == record.counts.total
    decision = make_decider(record, guards=Guards(far=(target(1),))).decide(record, 0.0)
    assert guarded(decision) == {target(0)}


def test_who_counted_little_goes_by_its_table(arena: Arena) -> None:
    """And who counted enough by itself, though the table knows more."""
    busy = record_of(arena, 0, MANY, table=HANDLERS)
    rare = record_of(arena, 1, 0, ENOUGH_COUNT - 1, table=HANDLERS)
    own = record_of(arena, 2, 0, 0, MANY, table=HANDLERS)
    decider = make_decider(busy, rare, own)
    assert target(0) in guarded(decider.decide(rare, 0.0))
    assert rare.source is BranchSource.TABLE
    assert guarded(decider.decide(own, 0.0)) == {target(2)}
    assert own.source is BranchSource.SITE


def test_a_table_is_decided_on_once(arena: Arena) -> None:
    """Its idle sites have one decision, whatever each has been through."""
    busy = record_of(arena, 0, MANY, table=HANDLERS)
    idle = [record_of(arena, number, table=HANDLERS) for number in range(1, 4)]
    idle[1].changed_s, idle[2].n_changes = 50.0, 3
    policy = Watched()
    decider = make_decider(busy, *idle, policy=policy)
    decisions = {id(decider.decide(record, number / 4)) for number, record in enumerate(idle)}
    assert len(decisions) == 1
    assert len(policy.views) == 1
    assert policy.views[0].hotter_ratio == 1.0


def test_what_was_decided_on_before_says_nothing(arena: Arena) -> None:
    """A site whose window counted nothing keeps what it counted once."""
    alone, own = record_of(arena, 0, MANY), record_of(arena, 1, MANY, table=HANDLERS)
    other, busy = (record_of(arena, i, 0, MANY, table=HANDLERS) for i in (2, 3))
    own.source = BranchSource.SITE
    for record in (alone, own, other):
        record.is_news = False
    decider = make_decider(alone, own, other, busy)
    assert decider.decide(alone, 0.0) is None
    assert decider.decide(own, 0.0) is None
    # One that was not judged by itself before is as good as one that was not counted.
    assert guarded(decider.decide(other, 0.0)) == {target(1)}
    assert other.source is BranchSource.TABLE


def test_a_tables_targets_are_looked_at_once_for_each_kin(arena: Arena) -> None:
    """And each site gets to know what was found."""
    busy = record_of(arena, 0, MANY, MANY // 2, MANY // 4, table=HANDLERS)
    idle = [record_of(arena, number, table=HANDLERS) for number in range(1, 5)]
    idle[3].site = replace(idle[3].site, module="/lib/other")
    guards = Guards(far=(target(1),), reading=(target(2),))
    decider = make_decider(busy, *idle, guards=guards)
    for record in idle:
        assert guarded(decider.decide(record, 0.0)) == {target(0), target(2)}
        assert record.far_targets == {target(1)}
        assert record.operand_targets == {target(2)}
    assert [record.site.addr for record in guards.asked] == [
        *(idle[0].site.addr,) * 3,
        *(idle[3].site.addr,) * 3,
    ]


def test_each_site_is_refused_whose_tables_target_reads_the_flags(arena: Arena) -> None:
    """What was found for one of a kin spares the others the look, not the verdict."""
    busy = record_of(arena, 0, MANY, table=HANDLERS)
    idle = [record_of(arena, number, table=HANDLERS) for number in range(1, 4)]
    for record in idle[:2]:
        record.site = replace(record.site, kind=SiteKind.JUMP)
    decider = make_decider(busy, *idle, guards=Guards(unsafe=(target(0),)))
    assert [decider.decide(record, 0.0) is None for record in idle] == [True, True, False]
    assert [record.state for record in idle[:2]] == [SiteState.REFUSED] * 2
    assert [record.unsafe_targets for record in idle[:2]] == [{target(0)}] * 2


def test_idle_sites_take_no_room_from_those_that_run(arena: Arena) -> None:
    """In an arena that is more than half full only a site's own counts get it a block."""
    busy = record_of(arena, 0, MANY, table=HANDLERS)
    idle = record_of(arena, 1, table=HANDLERS)
    decider = make_decider(busy, idle)
    assert decider.decide(idle, 0.0) is not None
    arena._code.take(arena.find_room(arena.code_size // 2 + 64, lambda addr: addr))
    assert decider.decide(idle, 0.0) is None
    assert decider.decide(busy, 0.0) is not None
