# SPDX-License-Identifier: Apache-2.0
"""When promoted sites are looked at again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from optpoline.controller.config import Config
from optpoline.controller.records import SiteRecord
from optpoline.controller.sampling import Sampler
from optpoline.controller.summary import BranchSource, SiteState
from optpoline.controller.tables import Tables
from optpoline.model import BlockPlan, Miss, Table
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import add_block
from tests.unit.controller.lone_arena import THUNK, make_arena, make_record, make_site

HANDLERS = Table(name="handlers", type="int, int")
NOW_S = 100.0


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Return an arena."""
    arena = make_arena(n_sites=64)
    yield arena
    arena.close()


def unseen(arena: Arena, number: int, state: SiteState) -> SiteRecord:
    """Return the record of a site that was decided on by its table."""
    record = make_record(arena, replace(make_site(number), table=HANDLERS), state)
    record.source = BranchSource.TABLE
    if state is SiteState.PROMOTED:
        plan = BlockPlan(
            operand="rax",
            tree=Miss(),
            thunk_addr=THUNK.addr,
            miss_count_addr=arena.add_counters(1),
        )
        record.home = record.active = add_block(arena, plan, site_addr=record.site.addr)
    return record


def test_sites_promoted_by_their_table_share_one_window_among_them(arena: Arena) -> None:
    """Those that were decided on by it, but have no block, take no part in it."""
    states = [*(SiteState.PROMOTED,) * 3, *(SiteState.BASELINE,) * 40, SiteState.REFUSED]
    records = [unseen(arena, number, state) for number, state in enumerate(states)]
    config = Config()
    sampler = Sampler(config, lambda _, __: True, Tables())
    sampler.schedule(records, NOW_S)
    every_s = 3 * config.schedule.sample_every_max_s
    assert [record.sample_every_s for record in records] == [*(every_s,) * 3, *(0.0,) * 41]
