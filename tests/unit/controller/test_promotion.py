# SPDX-License-Identifier: Apache-2.0
"""First promotions: what is linked and told, and that what was decided by once is not again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import pytest

from optpoline.controller.config import Config
from optpoline.controller.first_window import FirstWindow
from optpoline.controller.linker import Linker, Move
from optpoline.controller.not_promoted import explain_not_promoted
from optpoline.controller.promotion import demote, promote_first
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.controller.tables import Tables
from optpoline.controller.target import Target
from optpoline.learn.counting import SiteCounts
from optpoline.model import Addr, Count, OperandLoad, Table, ThunkFlavour
from optpoline.patch.arena import Arena
from optpoline.promote.cost import CostModel
from optpoline.promote.policies.adaptive import AdaptivePolicy
from optpoline.promote.policy import Action, Decision
from tests.unit.controller.lone_arena import make_arena, make_record, make_site

HANDLERS = Table(name="handlers", type="int, int")
A, B = Addr(0x4F10_0000), Addr(0x4F10_0040)
MANY = 100_000
PID = 1
"""Nobody asks for it."""


class Links(Linker):
    """Leads sites where they shall, but for some, without a program."""

    def __init__(self, *stuck: SiteRecord) -> None:
        """Leave some sites where they are."""
        self._stuck = {record.site.addr for record in stuck}
        self.batches: list[list[Addr]] = []

    def link(self, moves: Sequence[Move], *, may_delay: bool = False) -> int:
        """Note the batch; return how many lead where they should."""
        self.batches.append([move.record.site.addr for move in moves])
        free = [move for move in moves if move.record.site.addr not in self._stuck]
        for move in free:
            move.record.home = move.block
        return len(free)


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Return an arena."""
    arena = make_arena(n_sites=8)
    yield arena
    arena.close()


def record_of(arena: Arena, number: int, table: Table | None = None) -> SiteRecord:
    """Return the record of a site on its thunk."""
    return make_record(arena, replace(make_site(number), table=table))


def counts_of(target: Addr) -> SiteCounts:
    """Return many counts of one target."""
    return SiteCounts(counts=(Count(target=target, hit_count=MANY),), n_unknown=0)


def counted(record: SiteRecord, target: Addr) -> SiteRecord:
    """Have a site's first window of a second count many branches to one target."""
    record.counts = record.counted = counts_of(target)
    record.window_s, record.rate_hz, record.is_news = 1.0, float(MANY), True
    return record


def promote(linker: Linker, records: Sequence[SiteRecord], tables: Tables | None = None) -> int:
    """Decide on sites."""
    return promote_first(
        records,
        policy=AdaptivePolicy(model=CostModel()),
        linker=linker,
        may_guard=lambda _, __: True,
        guard_kin=lambda record: record.site.kind,
        now_s=100.0,
        tables=tables,
    )


def test_what_moved_is_told(arena: Arena) -> None:
    """Who has a block, but could not be led there, is not promoted yet."""
    hot, left = (counted(record_of(arena, i, HANDLERS), A) for i in (0, 1))
    cold = record_of(arena, 2)
    idle, left_idle = (record_of(arena, i, HANDLERS) for i in (3, 4))
    tables = Tables()
    records = [hot, left, cold, idle, left_idle]
    tables.use(records)
    links = Links(left, left_idle)
    assert promote(links, records, tables) == 2
    assert [record.home is not None for record in records] == [True, False, False, True, False]
    # Who was decided on by the table comes in a second batch, learned or not.
    assert links.batches == [
        [hot.site.addr, left.site.addr, cold.site.addr],
        [idle.site.addr, left_idle.site.addr],
    ]
    assert explain_not_promoted(PID, [left, left_idle]).startswith(
        "2 sites can be changed only while all threads stand"
    )


def test_a_site_whose_operand_is_out_of_reach_is_left(arena: Arena) -> None:
    """Of a plain branch what it loads must be near the arena; the others go on."""
    site = make_site(0)
    far = replace(
        site,
        is_plain=True,
        table=HANDLERS,
        thunk=replace(site.thunk, addr=Addr(0), flavour=ThunkFlavour.PLAIN),
        # mov disp32(%rip), %rax
        load=OperandLoad(
            code=bytes.fromhex("48 8b 05 00 00 00 00"), data_addr=Addr(arena.addr + (1 << 33))
        ),
    )
    records = [make_record(arena, far), make_record(arena, make_site(1))]
    links = Links()
    window = FirstWindow(
        Config(),
        cast(Target, None),
        links,
        sleep=lambda _: None,
        after_look=lambda: None,
        empty=lambda _: True,
    )
    assert window.link(records) == records[1:]
    for record in records:
        record.home = None
        counted(record, A)
    assert promote(links, records) == 1
    assert [record.home is not None for record in records] == [False, True]


def test_a_window_that_counted_nothing_says_nothing(arena: Arena) -> None:
    """Old counts neither bring a demoted site back, nor take the place of later ones."""
    site, idle = record_of(arena, 0, HANDLERS), record_of(arena, 1, HANDLERS)
    tables = Tables()
    tables.use([site, idle])
    assert promote(Links(), [counted(site, A)], tables) == 1
    tables.note(site, counts_of(B))  # what a later window counted
    demote(site, Decision(action=Action.DEMOTE), 200.0)
    assert promote(Links(), [site, idle], tables) == 1
    assert (site.state, site.home) == (SiteState.BASELINE, None)
    assert idle.plan is not None
    assert idle.plan.targets == (B,)
    # It can be promoted again by what is new.
    assert promote(Links(), [counted(site, A)], tables) == 1
    assert site.home is site.active is not None
