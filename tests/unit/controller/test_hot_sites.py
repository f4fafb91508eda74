# SPDX-License-Identifier: Apache-2.0
"""Which sites are learned, and when: the hottest first, and not again and again in vain."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

import pytest

from optpoline.controller.hot_sites import (
    FIRST_REST_S,
    LAST_REST_S,
    MAX_UNNAMED_SITES,
    HotSites,
)
from optpoline.controller.records import SiteRecord
from optpoline.controller.rediscovery import (
    AFTER_FINDS_S,
    AFTER_MANY_FINDS_S,
    AFTER_NOTHING_S,
    CALM_LOOK_EVERY_S,
    CALM_LOOKS,
    FORGET_S,
    LOOK_EVERY_S,
    MANY_FINDS,
    MIN_SAMPLES,
    Rediscovery,
)
from optpoline.controller.site_map import Evidence, Weights
from optpoline.controller.summary import SiteState
from optpoline.controller.target import Target
from optpoline.model import Addr, SiteKind
from tests.unit.controller.test_site_map import RAX, make_record


@dataclass
class NoTarget:
    """A target without modules: nothing is looked up in it."""

    modules: dict[str, object] = field(default_factory=dict)


class ToldHotSites(HotSites):
    """Sees what it is told to see."""

    def __init__(self, records: list[SiteRecord]) -> None:
        """Begin with nothing to see."""
        super().__init__(cast(Target, NoTarget()))
        self.use(records)
        self.evidence = Evidence()
        self.n_looks = 0

    def look(self, seconds: float, frequency_hz: int) -> Evidence:
        """Return what it was told."""
        self.n_looks += 1
        return self.evidence


def no_misses_hz() -> float:
    """Return that no promoted jump site misses."""
    return 0.0


def weigh(**weights: float) -> Weights:
    """Return weights by the number of a site: s3=2.0 is that of the third."""
    named = {Addr(0x1000 + 16 * int(name[1:])): weight for name, weight in weights.items()}
    return defaultdict(float, named)


@pytest.fixture
def records() -> list[SiteRecord]:
    return [make_record(0x1000 + 16 * number, SiteKind.CALL) for number in range(10)]


def test_the_hottest_come_first(records: list[SiteRecord]) -> None:
    hot = ToldHotSites(records)
    records[2].state = SiteState.PROMOTED
    records[3].state = SiteState.REFUSED
    found = hot.eligible(weigh(s1=1, s2=9, s3=9, s4=3, s5=2), 0.0)
    assert found == [records[4], records[5], records[1]]


def test_who_was_learned_in_vain_rests_ever_longer(records: list[SiteRecord]) -> None:
    hot = ToldHotSites(records)
    now_s, rest_s = 100.0, FIRST_REST_S
    for _ in range(12):
        hot.learned(records[:1], now_s)
        assert hot.eligible(weigh(s0=1, s1=1), now_s + rest_s - 0.01) == [records[1]]
        now_s += rest_s
        assert records[0] in hot.eligible(weigh(s0=1), now_s)
        rest_s = min(LAST_REST_S, 2 * rest_s)
    assert rest_s == LAST_REST_S
    records[0].state = SiteState.PROMOTED
    hot.learned(records[:1], now_s)
    records[0].state = SiteState.BASELINE  # demoted
    assert hot.eligible(weigh(s0=1), now_s) == [records[0]]


def test_jumps_that_nothing_names_have_one_turn_each() -> None:
    jumps = [make_record(0x1000 + 16 * n, SiteKind.JUMP) for n in range(MAX_UNNAMED_SITES + 9)]
    hot = ToldHotSites(jumps)
    rare = Evidence(n_samples=1000, unnamed=defaultdict(float, {RAX.start: 29.0}))
    assert hot.take_unnamed(rare) == []
    often = Evidence(n_samples=1000, unnamed=defaultdict(float, {RAX.start: 31.0}))
    assert hot.take_unnamed(often) == jumps[:MAX_UNNAMED_SITES]
    assert hot.take_unnamed(often) == jumps[MAX_UNNAMED_SITES:]
    assert hot.take_unnamed(often) == []


def test_a_large_share_brings_what_is_nearby_too(records: list[SiteRecord]) -> None:
    hot = ToldHotSites(records)
    rediscovery = Rediscovery(hot, no_misses_hz, 0.0)
    assert rediscovery.find(AFTER_NOTHING_S - 0.01) == []
    assert hot.n_looks == 0
    hot.evidence = Evidence(n_samples=100, branching=weigh(s1=2, s2=3), nearby=weigh(s3=90))
    assert rediscovery.find(AFTER_NOTHING_S) == [records[2], records[1], records[3]]


def test_what_is_met_rarely_is_remembered_for_a_while(records: list[SiteRecord]) -> None:
    hot = ToldHotSites(records)
    rediscovery = Rediscovery(hot, no_misses_hz, 0.0)
    hot.evidence = Evidence(n_samples=100, branching=weigh(s1=0.3), nearby=weigh(s3=90))
    now_s = AFTER_NOTHING_S
    assert rediscovery.find(now_s) == []
    assert rediscovery.find(now_s + LOOK_EVERY_S) == [records[1]]
    rediscovery.learned(records[1:2], now_s + LOOK_EVERY_S)
    now_s += 600.0
    assert rediscovery.find(now_s) == []
    assert rediscovery.find(now_s + FORGET_S) == []


@pytest.mark.parametrize(
    ("n_promoted", "pause_s"),
    [
        (0, AFTER_NOTHING_S),
        (1, AFTER_FINDS_S),
        (MANY_FINDS - 1, AFTER_FINDS_S),
        (MANY_FINDS, AFTER_MANY_FINDS_S),
    ],
)
def test_the_more_was_found_the_sooner_comes_the_next_look(n_promoted: int, pause_s: float) -> None:
    records = [make_record(0x1000 + 16 * n, SiteKind.CALL) for n in range(MANY_FINDS + 1)]
    for record in records[:n_promoted]:
        record.state = SiteState.PROMOTED
    hot = ToldHotSites(records)
    rediscovery = Rediscovery(hot, no_misses_hz, 0.0)
    now_s = 10.0
    rediscovery.learned(records, now_s)
    rediscovery.find(now_s + pause_s - 0.01)
    assert hot.n_looks == 0
    rediscovery.find(now_s + pause_s)
    assert hot.n_looks == 1


def test_looks_are_rarer_where_nothing_is_found(records: list[SiteRecord]) -> None:
    hot = ToldHotSites(records)
    rediscovery = Rediscovery(hot, no_misses_hz, 0.0)
    looks_s: list[float] = []
    for now_s in range(100):
        n_before = hot.n_looks
        rediscovery.find(float(now_s))
        if hot.n_looks > n_before:
            looks_s.append(now_s)
    pauses_s = [later - earlier for earlier, later in pairwise(looks_s)]
    assert pauses_s[:CALM_LOOKS] == [LOOK_EVERY_S] * CALM_LOOKS
    assert pauses_s[CALM_LOOKS : 2 * CALM_LOOKS] == [2 * LOOK_EVERY_S] * CALM_LOOKS
    assert set(pauses_s[3 * CALM_LOOKS :]) == {CALM_LOOK_EVERY_S}
    rediscovery.learned([], 100.0)
    before = hot.n_looks
    rediscovery.find(100.0 + AFTER_NOTHING_S)
    rediscovery.find(100.0 + AFTER_NOTHING_S + LOOK_EVERY_S)
    assert hot.n_looks == before + 2


def test_an_idle_program_says_nothing(records: list[SiteRecord]) -> None:
    hot = ToldHotSites(records)
    hot.evidence = Evidence(n_samples=MIN_SAMPLES - 1, branching=weigh(s1=MIN_SAMPLES - 1))
    assert Rediscovery(hot, no_misses_hz, 0.0).find(AFTER_NOTHING_S) == []


def test_misses_of_promoted_jumps_are_known(records: list[SiteRecord]) -> None:
    hot = ToldHotSites(records)
    hot.evidence = Evidence(n_samples=100, branching=weigh(s1=0.2, s2=20))
    hot.learned(records[2:3], AFTER_NOTHING_S)
    hot.evidence.branching.update(weigh(s4=0.2, s5=0.2, s6=0.2, s7=0.2, s8=0.2, s9=4))
    assert Rediscovery(hot, lambda: 1e8, 0.0).find(AFTER_NOTHING_S) == [records[9]]
    assert len(Rediscovery(hot, no_misses_hz, 0.0).find(AFTER_NOTHING_S)) == 7
