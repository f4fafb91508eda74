# SPDX-License-Identifier: Apache-2.0
"""The rules that others published, at their thresholds, weak spots included."""

from __future__ import annotations

import math

import pytest

from optpoline.learn.counting import SiteCounts
from optpoline.model import Addr, Count, Guard, Miss, SiteKind, TreeNode
from optpoline.promote.policies import policy_named
from optpoline.promote.policies.bolt import BoltPolicy
from optpoline.promote.policies.cree import CreePolicy
from optpoline.promote.policies.jumpswitch import JumpSwitchPolicy
from optpoline.promote.policies.llvm import LlvmPolicy
from optpoline.promote.policy import Action, Decision, Policy, SiteHistory

T = tuple(Addr(0x1000 + 64 * i) for i in range(16))


def counts(*hits: int, n_unknown: int = 0, first: int = 0) -> SiteCounts:
    """Return counts of T[first], T[first+1], ..., hottest first."""
    found = [Count(target=T[first + i], hit_count=n) for i, n in enumerate(hits) if n]
    found.sort(key=lambda count: (-count.hit_count, count.target))
    return SiteCounts(counts=tuple(found), n_unknown=n_unknown)


def first(
    policy: Policy,
    window: SiteCounts,
    *,
    kind: SiteKind = SiteKind.CALL,
    hotter_ratio: float = 0.0,
) -> tuple[Addr, ...]:
    """Return what a policy guards after a first window."""
    view = SiteHistory().view(window, window_s=1.0, now_s=0.0, kind=kind, hotter_ratio=hotter_ratio)
    decision = policy.decide(view)
    assert (decision.action is Action.PROMOTE) == (decision.plan is not None)
    return decision.plan.targets if decision.plan is not None else ()


class Site:
    """A site under a policy, a window a second."""

    def __init__(self, policy: Policy) -> None:
        """Begin on the thunk."""
        self.policy = policy
        self.history = SiteHistory()
        self.now_s = 0.0

    def window(self, window: SiteCounts) -> Decision:
        """Show it a window."""
        self.now_s += 1.0
        decision = self.policy.decide(self.history.view(window, window_s=1.0, now_s=self.now_s))
        self.history = self.history.after(decision, self.now_s)
        return decision

    @property
    def targets(self) -> tuple[Addr, ...]:
        """What is guarded."""
        return self.history.current.targets if self.history.current is not None else ()


def test_chains_are_chains_hottest_first() -> None:
    view = SiteHistory().view(counts(500, 300, 200), window_s=1.0, now_s=0.0)
    decision = LlvmPolicy().decide(view)
    assert decision.plan is not None
    tree: TreeNode = decision.plan.tree
    for target in T[:3]:
        assert isinstance(tree, Guard)
        assert (tree.target, tree.below) == (target, None)
        tree = tree.otherwise
    assert tree == Miss()
    assert decision.plan.hit_ratio == 1.0


# --- llvm


@pytest.mark.parametrize(
    ("window", "n"),
    [
        (counts(100), 1),
        (counts(30, n_unknown=70), 1),  # 30 % of all that is left
        (counts(29, n_unknown=71), 0),
        (counts(70, 9, n_unknown=21), 2),  # 9 of 30
        (counts(70, 8, n_unknown=22), 1),
        (counts(90, 5, 5), 3),  # 5 % of all
        (counts(91, 5, 4), 2),
        (counts(50, 20, 15, 15), 3),  # at most three
        (counts(25, 25, 25, 25), 0),  # nothing stands out
    ],
)
def test_llvm_thresholds(window: SiteCounts, n: int) -> None:
    assert first(LlvmPolicy(), window) == T[:n]


# --- bolt


@pytest.mark.parametrize(
    ("window", "n_call", "n_jump"),
    [
        (counts(50, 50), 2, 2),  # 50 % of all, 100 % of the rest
        (counts(49, 51 - 31, 31), 0, 3),  # 49 % is not half
        (counts(70, 30), 2, 2),
        (counts(71, 29), 1, 2),  # 29 % is too little for a call
        (counts(50, 20, 15, 15), 1, 3),
        (counts(29, 24, 24, 23), 0, 0),
        (counts(94, 6), 1, 2),
        (counts(96, 4), 1, 1),
        # Branches to targets without a name do not count.
        (counts(50, n_unknown=1000), 1, 1),
    ],
)
def test_bolt_thresholds(window: SiteCounts, n_call: int, n_jump: int) -> None:
    hottest = tuple(count.target for count in window.counts)
    assert first(BoltPolicy(), window, kind=SiteKind.CALL) == hottest[:n_call]
    assert first(BoltPolicy(), window, kind=SiteKind.JUMP) == hottest[:n_jump]


def test_bolt_takes_the_sites_that_cover_99_percent() -> None:
    assert first(BoltPolicy(), counts(100), hotter_ratio=0.989) == T[:1]
    assert first(BoltPolicy(), counts(100), hotter_ratio=0.99) == ()


@pytest.mark.parametrize("policy", [LlvmPolicy(), BoltPolicy()], ids=["llvm", "bolt"])
def test_a_compiler_decides_once(policy: Policy) -> None:
    site = Site(policy)
    site.window(counts(100))
    for _ in range(5):
        assert site.window(counts(1000, first=1)).action is Action.KEEP
    assert site.targets == T[:1]
    assert not policy.schedule.is_watching
    assert math.isinf(policy.schedule.miss_rate_floor_hz)


# --- cree


def test_cree_waits_for_more_than_a_thousand_hits() -> None:
    site = Site(CreePolicy())
    assert site.window(counts(500, 500)).action is Action.KEEP
    assert site.window(counts(0, 1)).action is Action.PROMOTE
    assert site.targets == (T[1], T[0])


def test_cree_promotes_the_best_two_of_four() -> None:
    site = Site(CreePolicy())
    site.window(counts(400, 300, 200, 150))
    assert site.targets == T[:2]


def test_cree_wants_a_best_above_250_and_forgets_if_there_is_none() -> None:
    site = Site(CreePolicy(n_candidates=8))
    assert site.window(counts(250, 250, 250, 250, 250)).action is Action.KEEP
    assert site.history.profile is None
    site.window(counts(251, 250, 250, 250))
    assert site.targets == T[:2]


def test_cree_is_first_come_first_served() -> None:
    site = Site(CreePolicy())
    site.window(counts(1, 1, 1, 1))
    # Four rare candidates keep the hot one out ...
    assert site.window(counts(1000, first=4)).action is Action.KEEP
    assert site.history.profile is not None
    assert site.history.profile.n_unknown == 1000
    # ... until more than a thousand branches found no place.
    site.window(counts(1, first=4))
    assert site.history.profile == SiteCounts(counts=(), n_unknown=0)
    site.window(counts(1001, first=4))
    assert site.targets == (T[4],)


def test_cree_keeps_branches_by_their_own_hits() -> None:
    site = Site(CreePolicy())
    site.window(counts(600, 500))
    assert site.targets == T[:2]
    # 2000 hits of T[0] on its branch count against 1200 of a candidate.
    site.window(counts(2000, 100, 1200))
    assert site.targets == (T[0], T[2])


def test_cree_has_no_hysteresis() -> None:
    site = Site(CreePolicy())
    n_changes = 0
    for turn in range(100):
        window = counts(*(1200 + 7 * ((turn + i) % 3) for i in range(3)))
        n_changes += site.window(window).action is Action.PROMOTE
    # Three targets at a third each: two of them in turn.
    assert n_changes > 30


def test_cree_never_stops_counting_and_keeps_four_places() -> None:
    schedule = CreePolicy().schedule
    assert schedule.sample_every_s == schedule.sample_every_max_s
    assert schedule.max_slots == CreePolicy().n_candidates == 4


# --- jumpswitch


def test_jumpswitch_gives_up_a_site_with_more_targets_than_it_holds() -> None:
    policy = JumpSwitchPolicy()
    assert len(first(policy, counts(*[100] * 6))) == 6
    assert first(policy, counts(*[100] * 7)) == ()
    site = Site(policy)
    site.window(counts(*[100] * 6))
    assert site.window(counts(*[100] * 7)).action is Action.DEMOTE
    assert site.targets == ()


def test_jumpswitch_counts_what_found_no_slot_as_one_more_target() -> None:
    assert first(JumpSwitchPolicy(), counts(*[100] * 6, n_unknown=100)) == ()
    assert len(first(JumpSwitchPolicy(), counts(*[100] * 5, n_unknown=100))) == 5
    # Less than one in a hundred is nobody.
    assert len(first(JumpSwitchPolicy(), counts(*[100] * 6, n_unknown=6))) == 6


def test_jumpswitch_changes_only_what_two_epochs_agree_on() -> None:
    site = Site(JumpSwitchPolicy())
    site.window(counts(1000))
    assert site.window(counts(1000, first=1)).action is Action.CONFIRM
    assert site.window(counts(1000)).action is Action.KEEP
    assert site.window(counts(1000, first=1)).action is Action.CONFIRM
    assert site.window(counts(1000, first=1)).action is Action.PROMOTE
    assert site.targets == (T[1],)


def test_jumpswitch_hysteresis() -> None:
    site = Site(JumpSwitchPolicy())
    site.window(counts(1000))
    for _ in range(5):
        assert site.window(counts(910, 90)).action is Action.KEEP
    assert site.window(counts(890, 110)).action is Action.CONFIRM
    # The order of guards is no reason for a change.
    site = Site(JumpSwitchPolicy())
    site.window(counts(900, 100))
    for _ in range(5):
        assert site.window(counts(100, 900)).action is Action.KEEP


def test_thresholds_can_be_set() -> None:
    assert first(policy_named("llvm", {"max_guards": "1"}), counts(50, 50)) == T[:1]
    assert first(policy_named("bolt", {"calls_total_ratio": 0.2}), counts(71, 29)) == T[:2]
    assert first(policy_named("jumpswitch", {"max_guards": 7}), counts(*[9] * 8)) == ()
    assert len(first(policy_named("jumpswitch", {"max_guards": 8}), counts(*[9] * 8))) == 8
    assert first(policy_named("cree", {"n_branches": "3"}), counts(600, 500, 400)) == T[:3]
