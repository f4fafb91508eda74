# SPDX-License-Identifier: Apache-2.0
"""When sites are promoted, changed and demoted; and that they do not flip-flop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from optpoline.learn.counting import SiteCounts
from optpoline.model import Addr, Count, Guard
from optpoline.promote.cost import CostModel
from optpoline.promote.policy import Action, CostPolicy, Decision
from optpoline.promote.tree import PlannedTree, plan_tree, tree_cost

POLICY = CostPolicy()
MODEL = POLICY.model
A, B, C, D = (Addr(0x40_1000 + 0x40 * i) for i in range(4))


def to_counts(hits: dict[Addr, int], n_unknown: int = 0) -> SiteCounts:
    """Return counts from a mapping, hottest first."""
    ranked = sorted(hits.items(), key=lambda item: (-item[1], item[0]))
    return SiteCounts(
        counts=tuple(Count(target=target, hit_count=n) for target, n in ranked if n),
        n_unknown=n_unknown,
    )


def plan_for(hits: dict[Addr, int], n_unknown: int = 0) -> PlannedTree:
    """Return the plan that the policy's model makes of counts."""
    return plan_tree(to_counts(hits).counts, n_unknown, MODEL)


def decide(current: PlannedTree, hits: dict[Addr, int], n_unknown: int = 0, n: int = 0) -> Decision:
    """Decide about a promoted site after a window of one second."""
    return POLICY.decide_again(current, to_counts(hits, n_unknown), 1.0, n)


# --- first decisions


def test_hot_site_is_promoted_with_the_plan_of_its_counts() -> None:
    hits = {A: 900_000, B: 100_000}
    decision = POLICY.decide_first(to_counts(hits), 1.0)
    assert decision == Decision(action=Action.PROMOTE, plan=plan_for(hits))


def test_rate_decides_not_count() -> None:
    # One target: a guard saves 19 of 20 cycles; 0.02 % of 3 GHz is 600,000 cycles.
    needed_hz = MODEL.min_cpu_ratio * MODEL.cpu_hz / (MODEL.retpoline_cycles - MODEL.compare_cycles)
    above, below = int(needed_hz * 1.01), int(needed_hz * 0.99)
    assert POLICY.decide_first(to_counts({A: above}), 1.0).action is Action.PROMOTE
    assert POLICY.decide_first(to_counts({A: below}), 1.0).action is Action.KEEP
    assert POLICY.decide_first(to_counts({A: below}), 0.5).action is Action.PROMOTE
    assert POLICY.decide_first(to_counts({A: above}), 2.0).action is Action.KEEP


@pytest.mark.parametrize("window_s", [0.0, 1.0])
def test_site_that_was_not_seen_is_kept(window_s: float) -> None:
    assert POLICY.decide_first(to_counts({}), window_s) == Decision(action=Action.KEEP)


def test_window_of_no_length_promotes_nothing() -> None:
    assert POLICY.decide_first(to_counts({A: 1 << 40}), 0.0).action is Action.KEEP


def test_site_without_a_dominant_target_is_kept() -> None:
    hits = {Addr(0x1000 + 16 * i): 1 for i in range(20)}
    assert POLICY.decide_first(to_counts(hits, 1 << 30), 1.0).action is Action.KEEP
    assert POLICY.decide_first(to_counts({}, 1 << 30), 1.0).action is Action.KEEP


def test_many_even_targets_are_worth_a_tree() -> None:
    hits = {Addr(0x1000 + 16 * i): 100_000 for i in range(80)}
    decision = POLICY.decide_first(to_counts(hits), 1.0)
    assert decision.action is Action.PROMOTE
    assert decision.plan is not None
    assert len(decision.plan.targets) == 80


# --- decisions about promoted sites


def test_short_window_says_nothing() -> None:
    current = plan_for({A: 1000})
    assert decide(current, {B: POLICY.min_count - 1}).action is Action.KEEP
    assert decide(current, {B: POLICY.min_count}).action is not Action.KEEP


def test_same_shares_keep() -> None:
    current = plan_for({A: 800, B: 200})
    assert decide(current, {A: 8000, B: 2000}).action is Action.KEEP
    assert decide(current, {A: 8000, B: 2000}, n=5).action is Action.KEEP


def test_flip_to_a_target_without_guard_is_acted_on_at_once() -> None:
    current = plan_for({A: 1000})
    decision = decide(current, {B: 1000})
    assert decision == Decision(action=Action.PROMOTE, plan=plan_for({B: 1000}))


def test_new_target_beside_the_old_one() -> None:
    decision = decide(plan_for({A: 1000}), {A: 700, B: 300})
    assert decision.action is Action.PROMOTE
    assert decision.plan is not None
    assert decision.plan.targets == (A, B)


def test_order_flip_is_a_narrow_gain_that_must_be_confirmed() -> None:
    current = plan_for({A: 950, B: 50})
    assert isinstance(current.tree, Guard)
    assert current.tree.target == A
    first = decide(current, {A: 50, B: 950})
    assert first.action is Action.CONFIRM
    second = decide(current, {A: 50, B: 950}, n=1)
    assert second.action is Action.PROMOTE
    assert second.plan is not None
    assert second.plan.targets == (B, A)


def test_dying_targets_are_not_worth_a_change() -> None:
    current = plan_for({A: 500, B: 400, C: 100})
    assert decide(current, {A: 556, B: 444}).action is Action.KEEP


def test_demoted_when_nothing_dominates() -> None:
    current = plan_for({A: 1000})
    assert decide(current, {}, 1000).action is Action.DEMOTE
    spread = {Addr(0x10_0000 + 16 * i): 1 for i in range(100)}
    assert decide(current, spread, 100_000).action is Action.DEMOTE


def test_not_demoted_while_either_tree_gains() -> None:
    current = plan_for({A: 1000})
    assert decide(current, {A: 500}, 500).action is Action.KEEP
    assert decide(current, {B: 500}, 500).action is Action.PROMOTE


def test_action_without_plan_and_with() -> None:
    for hits, n_unknown in (({A: 1000}, 0), ({B: 1000}, 0), ({}, 1000), ({A: 100, B: 900}, 0)):
        decision = decide(plan_for({A: 1000, B: 10}), hits, n_unknown)
        assert (decision.plan is not None) == (decision.action in (Action.PROMOTE, Action.CONFIRM))


def test_promoted_plan_is_never_dearer_than_the_present_one() -> None:
    rng = np.random.default_rng(3)
    targets = [Addr(0x1000 + 16 * i) for i in range(12)]
    for _ in range(100):
        before, after = (rng.dirichlet(np.full(12, 0.3)) * 10_000 for _ in range(2))
        current = plan_for({t: int(n) for t, n in zip(targets, before, strict=True)})
        counts = to_counts({t: int(n) for t, n in zip(targets, after, strict=True)}, 50)
        decision = POLICY.decide_again(current, counts, 1.0, 5)
        if decision.plan is not None:
            now = tree_cost(current.tree, counts.shares(), MODEL)
            assert now - decision.plan.cycles >= POLICY.narrow_gain_cycles


# --- a site over many windows


@dataclass(slots=True)
class Promoted:
    """A promoted site under a policy, as the controller handles it."""

    plan: PlannedTree
    n_confirmed: int = 0
    n_changes: int = 0
    demoted: bool = False

    def window(self, counts: SiteCounts) -> None:
        """Take one window's counts."""
        decision = POLICY.decide_again(self.plan, counts, 0.05, self.n_confirmed)
        match decision.action:
            case Action.PROMOTE:
                assert decision.plan is not None
                self.plan, self.n_confirmed = decision.plan, 0
                self.n_changes += 1
            case Action.CONFIRM:
                self.n_confirmed += 1
            case Action.KEEP:
                self.n_confirmed = 0
            case Action.DEMOTE:
                self.demoted = True


def draw(rng: np.random.Generator, shares: list[float], n: int) -> SiteCounts:
    """Return a window of ``n`` branches with binomial noise; what is left to 1 is unknown."""
    *hits, unknown = rng.multinomial(n, [*shares, max(0.0, 1.0 - sum(shares))])
    targets = (Addr(0x40_1000 + 0x40 * i) for i in range(len(shares)))
    return to_counts({t: int(k) for t, k in zip(targets, hits, strict=True)}, int(unknown))


STEADY = {
    "two": [0.5, 0.5],
    "three": [0.34, 0.33, 0.33],
    "four": [0.25] * 4,
    "eight": [0.125] * 8,
    "seventeen": [1 / 17] * 17,
    "one": [1.0],
    "one and a little": [0.98, 0.01],
    "two and misses": [0.49, 0.49],
    "falling": [0.6, 0.3, 0.05],
    "halving": [0.5, 0.25, 0.125, 0.0625, 0.0625],
}


@pytest.mark.parametrize("n", [256, 1000, 100_000])
@pytest.mark.parametrize("shares", STEADY.values(), ids=STEADY)
def test_noise_does_not_change_a_tree(shares: list[float], n: int) -> None:
    rng = np.random.default_rng(len(shares) * n)
    first = draw(rng, shares, 10_000)
    site = Promoted(plan_tree(first.counts, first.n_unknown, MODEL))
    for _ in range(100):
        site.window(draw(rng, shares, n))
    assert site.n_changes <= 1
    assert not site.demoted


@pytest.mark.parametrize("period", [1, 2, 7, 50])
def test_alternating_phases_change_the_tree_at_most_once_a_phase(period: int) -> None:
    rng = np.random.default_rng(period)
    site = Promoted(plan_for({A: 1000}))
    for i in range(200):
        site.window(draw(rng, [1.0, 0.0] if i // period % 2 == 0 else [0.0, 1.0], 1000))
    assert not site.demoted
    assert site.n_changes <= 200 // period + 1


def test_half_and_half_within_each_window_settles_after_one_change() -> None:
    rng = np.random.default_rng(7)
    site = Promoted(plan_for({A: 1000}))
    for _ in range(100):
        site.window(draw(rng, [0.5, 0.5], 2000))
    assert site.n_changes == 1
    assert set(site.plan.targets) == {A, B}


def test_slow_drift_is_followed() -> None:
    rng = np.random.default_rng(11)
    site = Promoted(plan_for({A: 1000}))
    for i in range(101):
        site.window(draw(rng, [1.0 - i / 100, i / 100], 5000))
    assert site.plan.targets[0] == B
    assert 1 <= site.n_changes <= 4
    assert isinstance(site.plan.tree, Guard)


def test_thresholds_are_ordered() -> None:
    assert POLICY.narrow_gain_cycles < POLICY.clear_gain_cycles < MODEL.retpoline_cycles
    assert CostPolicy(model=CostModel(retpoline_cycles=40)).model.retpoline_cycles == 40
