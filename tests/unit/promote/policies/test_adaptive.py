# SPDX-License-Identifier: Apache-2.0
"""When sites are promoted, changed and demoted; and that they do not flip-flop."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from optpoline.learn.counting import PROFILE_TOTAL, SiteCounts, blend
from optpoline.model import Addr, Count, Guard
from optpoline.promote.cost import CostModel
from optpoline.promote.policies.adaptive import AdaptivePolicy
from optpoline.promote.policy import CALM_S, Action, Decision, SiteHistory, SiteView
from optpoline.promote.tree import PlannedTree, plan_tree, tree_cost

MODEL = CostModel(
    compare_cycles=1.0,
    branch_cycles=0.6,
    taken_cycles=1.0,
    retpoline_cycles=20.0,
    mispredict_cycles=16.0,
    mispredict_ratio=0.1,
    min_gain_cycles=0.005,
)
"""Numbers of its own: what is tested here does not follow the tuning of the defaults."""
POLICY = AdaptivePolicy(model=MODEL)
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


def view_of(
    current: PlannedTree | None,
    window: SiteCounts,
    *,
    profile: SiteCounts | None = None,
    n: int = 0,
    window_s: float = 1.0,
) -> SiteView:
    """Return what the policy sees of a site that has been calm for an hour."""
    return SiteView(
        current=current,
        profile=profile,
        window=window,
        window_s=window_s,
        n_confirmed=n,
        since_change_s=3600.0,
    )


def decide_first(counts: SiteCounts, window_s: float) -> Decision:
    """Decide about a site on its thunk."""
    return POLICY.decide(view_of(None, counts, window_s=window_s))


def is_surprising(current: PlannedTree, window: SiteCounts) -> bool:
    """Ask whether a window alone shows that a tree is wrong."""
    return POLICY.is_surprising(view_of(current, window))


def decide(
    current: PlannedTree,
    hits: dict[Addr, int],
    n_unknown: int = 0,
    *,
    profile: SiteCounts | None = None,
    n: int = 0,
) -> Decision:
    """Decide about a promoted site after a window."""
    return POLICY.decide(view_of(current, to_counts(hits, n_unknown), profile=profile, n=n))


def profile_of(hits: dict[Addr, int], n_unknown: int = 0) -> SiteCounts:
    """Return the profile of a site that has had nothing but such windows."""
    return blend(None, to_counts(hits, n_unknown), 1.0)


# --- first decisions


def test_hot_site_is_promoted_with_the_plan_of_its_counts() -> None:
    hits = {A: 900_000, B: 100_000}
    decision = decide_first(to_counts(hits), 1.0)
    assert decision == Decision(
        action=Action.PROMOTE, plan=plan_for(hits), profile=profile_of(hits)
    )
    assert decision.profile is not None
    assert decision.profile.total == PROFILE_TOTAL


def test_rate_decides_not_count() -> None:
    # One target: a guard saves all of the retpoline but its compare.
    needed_hz = MODEL.min_cpu_ratio * MODEL.cpu_hz / (MODEL.retpoline_cycles - MODEL.compare_cycles)
    above, below = math.ceil(needed_hz * 1.01), math.floor(needed_hz * 0.99)
    assert decide_first(to_counts({A: above}), 1.0).action is Action.PROMOTE
    assert decide_first(to_counts({A: below}), 1.0).action is Action.KEEP
    assert decide_first(to_counts({A: below}), 0.5).action is Action.PROMOTE
    assert decide_first(to_counts({A: above}), 2.0).action is Action.KEEP


@pytest.mark.parametrize("window_s", [0.0, 1.0])
def test_site_that_was_not_seen_is_kept(window_s: float) -> None:
    assert decide_first(to_counts({}), window_s) == Decision(action=Action.KEEP)


def test_window_of_no_length_promotes_nothing() -> None:
    assert decide_first(to_counts({A: 1 << 40}), 0.0).action is Action.KEEP


def test_site_without_a_dominant_target_is_kept() -> None:
    hits = {Addr(0x1000 + 16 * i): 1 for i in range(20)}
    assert decide_first(to_counts(hits, 1 << 30), 1.0).action is Action.KEEP
    assert decide_first(to_counts({}, 1 << 30), 1.0).action is Action.KEEP


def test_many_even_targets_are_worth_a_tree() -> None:
    hits = {Addr(0x1000 + 16 * i): 100_000 for i in range(80)}
    decision = decide_first(to_counts(hits), 1.0)
    assert decision.action is Action.PROMOTE
    assert decision.plan is not None
    assert len(decision.plan.targets) == 80


# --- decisions about promoted sites


def test_short_window_says_nothing() -> None:
    current, profile = plan_for({A: 1000}), profile_of({A: 1000})
    few = {B: POLICY.min_count - 1}
    assert decide(current, few, profile=profile) == Decision(action=Action.KEEP, profile=profile)
    assert decide(current, few) == Decision(action=Action.KEEP)
    assert not is_surprising(current, to_counts(few))
    enough = {B: POLICY.min_count}
    assert decide(current, enough, profile=profile).action is Action.PROMOTE
    assert is_surprising(current, to_counts(enough))


def test_same_shares_keep() -> None:
    current = plan_for({A: 800, B: 200})
    for profile in (None, profile_of({A: 800, B: 200})):
        for n in (0, 1, 5):
            decision = decide(current, {A: 8000, B: 2000}, profile=profile, n=n)
            assert decision == Decision(action=Action.KEEP, profile=profile_of({A: 800, B: 200}))


@pytest.mark.parametrize("profile", [None, profile_of({A: 1000})], ids=["unknown", "known"])
def test_flip_to_a_target_without_guard_is_acted_on_at_once(profile: SiteCounts | None) -> None:
    current = plan_for({A: 1000})
    decision = decide(current, {B: 1000}, profile=profile)
    assert decision.action is Action.PROMOTE
    assert decision.plan is not None
    assert B in decision.plan.targets
    # What was known is not forgotten by one window.
    assert (A in decision.plan.targets) == (profile is not None)
    assert decision.profile is not None
    assert decision.profile.shares()[B] >= POLICY.followed_ratio - 1e-6


def test_new_target_beside_the_old_one() -> None:
    decision = decide(plan_for({A: 1000}), {A: 700, B: 300}, profile=profile_of({A: 1000}))
    assert decision.action is Action.PROMOTE
    assert decision.plan is not None
    assert decision.plan.targets == (A, B)


def test_rare_new_target_is_no_surprise_and_waits_for_the_profile() -> None:
    # One branch in ten: two cycles a branch, below a clear gain.
    site = Promoted.having(plan_for({A: 1000}), profile_of({A: 1000}))
    assert not is_surprising(site.plan, to_counts({A: 900, B: 100}))
    first = decide(site.plan, {A: 900, B: 100}, profile=site.profile)
    assert first.action in (Action.KEEP, Action.CONFIRM)
    for _ in range(10):
        site.window(to_counts({A: 900, B: 100}))
    assert site.plan.targets == (A, B)
    assert site.n_changes == 1


def test_surprise_is_what_unguarded_targets_cost() -> None:
    current = plan_for({A: 500, B: 500})
    # The order of guards is never a surprise, however wrong.
    assert not is_surprising(current, to_counts({A: 10_000}))
    assert not is_surprising(current, to_counts({B: 10_000}))
    n = math.ceil(10_000 * POLICY.clear_gain_cycles / MODEL.retpoline_cycles)
    assert is_surprising(current, to_counts({A: 9_990 - n, C: n + 10}))
    assert not is_surprising(current, to_counts({A: 10_010 - n, C: n - 10}))
    # Nor does it matter whether they are known by name.
    assert is_surprising(current, to_counts({A: 9_990 - n}, n + 10))
    assert is_surprising(current, to_counts({A: 9_990 - n, C: n // 2}, n + 10 - n // 2))


def test_order_flip_is_a_narrow_gain_that_must_be_confirmed() -> None:
    current = plan_for({A: 950, B: 50})
    assert isinstance(current.tree, Guard)
    assert current.tree.target == A
    flipped = profile_of({A: 50, B: 950})
    first = decide(current, {A: 50, B: 950}, profile=flipped)
    assert first.action is Action.CONFIRM
    second = decide(current, {A: 50, B: 950}, profile=first.profile, n=1)
    assert second.action is Action.PROMOTE
    assert second.plan is not None
    assert second.plan.targets == (B, A)


def test_wrong_order_is_never_acted_on_at_once_however_dear() -> None:
    targets = [Addr(0x40_1000 + 0x40 * i) for i in range(64)]
    current = plan_for({t: 1000 if i else 64_000 for i, t in enumerate(targets)})
    assert len(current.targets) == 64
    coldest = to_counts({current.targets[-1]: 1000})
    profile = blend(None, coldest, 1.0)
    first = POLICY.decide(view_of(current, coldest, profile=profile, n=0))
    assert first.action is Action.CONFIRM
    second = POLICY.decide(view_of(current, coldest, profile=profile, n=1))
    assert second.action is Action.PROMOTE
    assert second.plan is not None
    assert tree_cost(current.tree, coldest.shares(), MODEL) - second.plan.cycles > 3.0


def test_order_flip_is_followed_after_two_windows_that_agree() -> None:
    site = Promoted.having(plan_for({A: 950, B: 50}), profile_of({A: 950, B: 50}))
    actions = [site.window(to_counts({A: 50, B: 950})) for _ in range(10)]
    assert actions == [Action.CONFIRM, Action.PROMOTE, *[Action.KEEP] * 8]
    assert site.plan.targets == (B, A)


def test_one_odd_window_of_guarded_targets_changes_nothing() -> None:
    for odd in ({A: 1000}, {B: 1000}, {A: 100, B: 900}):
        site = Promoted.having(plan_for({A: 600, B: 400}), profile_of({A: 600, B: 400}))
        for hits in (odd, *({A: 600, B: 400},) * 20):
            site.window(to_counts(hits))
        assert (site.n_changes, site.demoted) == (0, False)


def test_dying_targets_are_not_worth_a_change() -> None:
    site = Promoted.having(plan_for({A: 500, B: 400, C: 100}), profile_of({A: 500, B: 400, C: 100}))
    for _ in range(50):
        site.window(to_counts({A: 556, B: 444}))
    assert site.n_changes == 0


def test_demoted_when_nothing_dominates() -> None:
    current = plan_for({A: 1000})
    assert decide(current, {}, 1000).action is Action.DEMOTE
    spread = {Addr(0x10_0000 + 16 * i): 1 for i in range(100)}
    assert decide(current, spread, 1_000_000).action is Action.DEMOTE


def test_demoted_once_the_profile_has_forgotten_the_targets() -> None:
    site = Promoted.having(plan_for({A: 1000}), profile_of({A: 1000}))
    was_demoted: list[bool] = []
    for _ in range(20):
        site.window(to_counts({}, 1000))
        was_demoted.append(site.demoted)
    assert (was_demoted[0], was_demoted[-1]) == (False, True)


def test_not_demoted_while_either_tree_gains() -> None:
    current = plan_for({A: 1000})
    assert decide(current, {A: 500}, 500).action is Action.KEEP
    assert decide(current, {B: 500}, 500).action is Action.PROMOTE


def test_action_without_plan_and_with() -> None:
    for hits, n_unknown in (({A: 1000}, 0), ({B: 1000}, 0), ({}, 1000), ({A: 100, B: 900}, 0)):
        for profile in (None, profile_of({A: 1000, B: 10})):
            decision = decide(plan_for({A: 1000, B: 10}), hits, n_unknown, profile=profile)
            assert (decision.plan is not None) == (decision.action is Action.PROMOTE)
            assert decision.profile is not None


def test_promoted_plan_is_never_dearer_than_the_present_one() -> None:
    rng = np.random.default_rng(3)
    targets = [Addr(0x1000 + 16 * i) for i in range(12)]
    n_plans = 0
    for _ in range(100):
        before, after = (rng.dirichlet(np.full(12, 0.3)) * 10_000 for _ in range(2))
        known = {t: int(n) for t, n in zip(targets, before, strict=True)}
        current = plan_for(known)
        counts = to_counts({t: int(n) for t, n in zip(targets, after, strict=True)}, 50)
        for profile in (None, profile_of(known)):
            decision = POLICY.decide(view_of(current, counts, profile=profile, n=5))
            assert decision.profile is not None
            if decision.plan is not None:
                n_plans += 1
                # By what is known, which is what the plan is made from.
                now = tree_cost(current.tree, decision.profile.shares(), MODEL)
                assert now - decision.plan.cycles >= POLICY.narrow_gain_cycles
    assert n_plans > 50


# --- a site over many windows


@dataclass(slots=True)
class Promoted:
    """A promoted site under a policy, as the controller handles it."""

    history: SiteHistory
    now_s: float = 0.0
    every_s: float = 0.25
    n_changes: int = 0
    demoted: bool = False
    policy: AdaptivePolicy = POLICY

    @classmethod
    def having(cls, plan: PlannedTree, profile: SiteCounts | None = None) -> Promoted:
        """Return a site that has a tree."""
        return cls(SiteHistory(current=plan, profile=profile))

    @classmethod
    def from_first(cls, counts: SiteCounts, *, every_s: float = 0.25) -> Promoted:
        """Promote a site by its first window."""
        decision = decide_first(counts, 0.001)
        assert decision.plan is not None
        return cls(SiteHistory().after(decision, 0.0), every_s=every_s)

    @property
    def plan(self) -> PlannedTree:
        """The tree it has."""
        assert self.history.current is not None
        return self.history.current

    @property
    def profile(self) -> SiteCounts | None:
        """What is known of it."""
        return self.history.profile

    def window(self, counts: SiteCounts) -> Action:
        """Take one window's counts."""
        if self.demoted:
            return Action.DEMOTE
        self.now_s += self.every_s
        view = self.history.view(counts, window_s=0.02, now_s=self.now_s)
        decision = self.policy.decide(view)
        assert decision == self.policy.decide(view)
        self.history = self.history.after(decision, self.now_s)
        self.n_changes += decision.action is Action.PROMOTE
        self.demoted = decision.action is Action.DEMOTE
        return decision.action


def draw(rng: np.random.Generator, shares: list[float], n: int) -> SiteCounts:
    """Return a window of ``n`` branches with binomial noise; what is left to 1 is unknown."""
    *hits, unknown = rng.multinomial(n, [*shares, max(0.0, 1.0 - sum(shares))])
    targets = (Addr(0x40_1000 + 0x40 * i) for i in range(len(shares)))
    return to_counts({t: int(k) for t, k in zip(targets, hits, strict=True)}, int(unknown))


def zipf(n: int) -> list[float]:
    """Return shares that fall with the rank."""
    harmonic = sum(1 / rank for rank in range(1, n + 1))
    return [1 / rank / harmonic for rank in range(1, n + 1)]


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
    "zipf of 5": zipf(5),
    "zipf of 20": zipf(20),
}


@pytest.mark.parametrize("n", [256, 1000, 100_000])
@pytest.mark.parametrize("shares", STEADY.values(), ids=STEADY)
def test_noise_does_not_change_a_tree(shares: list[float], n: int) -> None:
    rng = np.random.default_rng(len(shares) * n)
    site = Promoted.from_first(draw(rng, shares, n))
    for _ in range(200):
        site.window(draw(rng, shares, n))
    assert site.n_changes <= 1
    assert not site.demoted
    # And the tree that it has settled on is nearly the best for the true shares.
    true = {Addr(0x40_1000 + 0x40 * i): share for i, share in enumerate(shares)}
    ideal = plan_for({t: int(1e6 * s) for t, s in true.items()}, int(1e6 * (1 - sum(shares))))
    slack = max(POLICY.narrow_gain_cycles, POLICY.narrow_gain_ratio * ideal.cycles)
    assert tree_cost(site.plan.tree, true, MODEL) < ideal.cycles + 2 * slack


@pytest.mark.parametrize("name", ["two", "three"])
@pytest.mark.parametrize("n", [256, 2500, 10_000])
def test_even_targets_stay_through_a_thousand_windows(name: str, n: int) -> None:
    shares = STEADY[name]
    rng = np.random.default_rng(n)
    site = Promoted.from_first(draw(rng, shares, n))
    for _ in range(1000):
        site.window(draw(rng, shares, n))
    assert site.n_changes <= 1
    assert len(site.plan.targets) == len(shares)


def phases(rng: np.random.Generator, period: int, n_windows: int) -> list[SiteCounts]:
    """Return windows that show A only or B only, in turn."""
    shares = ([1.0, 0.0], [0.0, 1.0])
    return [draw(rng, shares[i // period % 2], 1000) for i in range(n_windows)]


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_site_that_never_settles_is_changed_ever_more_rarely(period: int) -> None:
    windows = phases(np.random.default_rng(period), period, 2400)
    site = Promoted.from_first(windows[0])
    changes: list[float] = []
    for counts in windows[1:]:
        if site.window(counts) is Action.PROMOTE:
            changes.append(site.now_s)
        assert not site.demoted
    assert set(site.plan.targets) == {A, B}
    # Twice as long each time: 600 s hold nine such waits at most.
    assert len(changes) <= POLICY.n_free_changes + 10
    for n_before, (earlier, later) in enumerate(itertools.pairwise(changes), start=1):
        assert later - earlier >= POLICY.hold_s(n_before)
    assert sum(s > 300 for s in changes) <= 1


@pytest.mark.parametrize("period_s", [4.0, 5.0, 10.0])
def test_long_phases_are_followed_for_ever(period_s: float) -> None:
    period = round(period_s / 0.25)
    windows = phases(np.random.default_rng(period), period, 60 * period)
    site = Promoted.from_first(windows[0])
    n_fit = 0
    for i, counts in enumerate(windows[1:], start=1):
        site.window(counts)
        n_fit += site.plan.targets[0] == (A, B)[i // period % 2]
    # All but the two windows that each change takes.
    assert n_fit >= len(windows) * (1 - 2.5 / period)
    assert site.n_changes == 59


def test_change_is_lived_down_by_calm() -> None:
    site = Promoted.from_first(to_counts({A: 1000}))
    site.window(to_counts({B: 1000}))
    assert site.history.n_changes == 1
    site.every_s = CALM_S / 4
    for _ in range(3):
        site.window(to_counts({B: 1000}))
        assert site.history.n_changes == 1
    site.window(to_counts({B: 1000}))
    assert site.history.n_changes == 0


def test_ever_new_targets_are_held_back_but_remembered() -> None:
    site = Promoted.from_first(to_counts({A: 1000}))
    actions = [site.window(to_counts({Addr(0x1000 + 64 * i): 1000})) for i in range(120)]
    assert actions[: POLICY.n_free_changes] == [Action.PROMOTE] * POLICY.n_free_changes
    assert 3 <= actions.count(Action.PROMOTE) - POLICY.n_free_changes <= 5
    assert Action.HOLD in actions


def decide_restless(
    hits: dict[Addr, int], *, since_change_s: float, rate_hz: float
) -> tuple[PlannedTree, Decision]:
    """Decide about a site that A or B took once, C never, and that has changed 20 times."""
    current = plan_for({A: 900, B: 100})
    window = to_counts(hits)
    view = SiteView(
        current=current,
        profile=window,
        window=window,
        window_s=window.total / rate_hz,
        n_changes=20,
        since_change_s=since_change_s,
    )
    return current, POLICY.decide(view)


def test_misses_wait_no_longer_than_until_they_would_have_paid_for_a_change() -> None:
    rate_hz = 1e6
    schedule = POLICY.schedule
    current, held = decide_restless({C: 10_000}, since_change_s=0.5, rate_hz=rate_hz)
    lost = tree_cost(current.tree, {C: 1.0}, MODEL) - plan_for({C: 1}).cycles
    pays_s = schedule.change_cost_s / (lost * rate_hz / MODEL.cpu_hz)
    assert 0.5 < pays_s < POLICY.hold_s(20)
    assert held.action is Action.HOLD
    assert held.hold_s == pytest.approx(pays_s - 0.5)
    _, after = decide_restless({C: 10_000}, since_change_s=pays_s * 1.01, rate_hz=rate_hz)
    assert after.action is Action.PROMOTE


def test_changes_of_a_hot_site_that_misses_are_bounded_all_the_same() -> None:
    least_s = POLICY.schedule.change_cost_s / POLICY.schedule.overhead_ratio
    _, held = decide_restless({C: 10_000}, since_change_s=0.0, rate_hz=3e8)
    assert held.hold_s == pytest.approx(least_s)


def test_other_weights_wait_many_times_as_long_and_windows_go_on() -> None:
    rate_hz = 3e8
    current, held = decide_restless({B: 10_000}, since_change_s=1.0, rate_hz=rate_hz)
    assert (held.action, held.hold_s) == (Action.HOLD, 0.0)
    gain = tree_cost(current.tree, {B: 1.0}, MODEL) - plan_for({B: 1}).cycles
    schedule = POLICY.schedule
    gain_ratio = min(gain * rate_hz / MODEL.cpu_hz, schedule.overhead_ratio)
    pays_s = POLICY.hold_paybacks * schedule.change_cost_s / gain_ratio
    assert pays_s < POLICY.hold_s(20)
    for since_change_s, action in ((0.99, Action.HOLD), (1.01, Action.CONFIRM)):
        _, decision = decide_restless(
            {B: 10_000}, since_change_s=since_change_s * pays_s, rate_hz=rate_hz
        )
        assert decision.action is action


def test_hot_site_with_ever_new_targets_has_guards_for_all_of_them_at_last() -> None:
    targets = [Addr(0x1000 + 64 * i) for i in range(16)]
    site = Promoted.from_first(to_counts({targets[0]: 1_000_000}), every_s=0.75)
    # 50 million a second, each target for a second and a half, round and round.
    for i in range(2 * 16 * 6):
        site.window(to_counts({targets[i // 2 % 16]: 1_000_000}))
    assert set(site.plan.targets) == set(targets)
    # One change for each target, and a few of weights since.
    assert 15 <= site.n_changes <= 15 + 10


@pytest.mark.parametrize("period", [1, 2, 3, 4, 5, 7, 10, 20, 50])
def test_phases_of_any_length_end_in_no_retpolines_and_few_changes(period: int) -> None:
    windows = phases(np.random.default_rng(period), period, 400)
    site = Promoted.from_first(windows[0])
    # The second phase is the last one that comes as a surprise.
    for i, counts in enumerate(windows[1:], start=1):
        assert is_surprising(site.plan, counts) == (i == period)
        site.window(counts)
        assert site.n_changes <= i // period + 1
    assert set(site.plan.targets) == {A, B}
    assert not site.demoted


def test_half_and_half_within_each_window_settles_after_one_change() -> None:
    rng = np.random.default_rng(7)
    site = Promoted.from_first(to_counts({A: 1000}))
    for _ in range(100):
        site.window(draw(rng, [0.5, 0.5], 2000))
    assert site.n_changes == 1
    assert set(site.plan.targets) == {A, B}


@pytest.mark.parametrize("n_windows", [50, 100, 400])
def test_slow_drift_is_followed(n_windows: int) -> None:
    rng = np.random.default_rng(11)
    site = Promoted.from_first(to_counts({A: 1000}))
    for i in range(n_windows + 1):
        site.window(draw(rng, [1.0 - i / n_windows, i / n_windows], 5000))
    assert 1 <= site.n_changes <= 4
    for _ in range(20):
        site.window(draw(rng, [0.0, 1.0], 5000))
    assert isinstance(site.plan.tree, Guard)
    assert site.plan.tree.target == B
    assert site.n_changes <= 5


def test_drift_through_many_targets_is_followed() -> None:
    # The hot target moves on to the next one, eight times.
    rng = np.random.default_rng(13)
    site = Promoted.from_first(to_counts({A: 1000}))
    for step in range(8):
        for i in range(30):
            shares = [0.0] * 9
            shares[step], shares[step + 1] = 1.0 - i / 30, i / 30
            site.window(draw(rng, shares, 5000))
    last = Addr(A + 0x40 * 8)
    for _ in range(20):
        site.window(to_counts({last: 1000}))
    weights = {last: 1.0}
    assert tree_cost(site.plan.tree, weights, MODEL) < plan_for({last: 1}).cycles + 1.0
    assert site.n_changes <= 8 * 4
    assert not site.demoted


def test_replay_gives_the_same_decisions() -> None:
    windows = phases(np.random.default_rng(17), 6, 60)
    one, other = (Promoted.from_first(windows[0]) for _ in range(2))
    assert [one.window(c) for c in windows[1:]] == [other.window(c) for c in windows[1:]]
    assert one == other


def test_thresholds_are_ordered() -> None:
    policy = AdaptivePolicy()
    assert [policy.hold_s(n) for n in range(7)] == [0, 0, 0, 0, 1, 2, 4]
    assert policy.hold_s(10_000) == policy.hold_max_s
    assert policy.narrow_gain_cycles < policy.clear_gain_cycles < policy.model.retpoline_cycles
    assert 0.0 < policy.calm_ratio < policy.followed_ratio < 1.0
    assert AdaptivePolicy(model=CostModel(retpoline_cycles=40)).model.retpoline_cycles == 40


def test_a_plain_branch_is_worth_fewer_guards() -> None:
    hits = {Addr(0x1000 * n): 1_000_000 for n in range(1, 9)}
    view = view_of(None, to_counts(hits))
    retpoline, plain = POLICY.decide(view), POLICY.decide(replace(view, is_plain=True))
    assert retpoline.plan is not None
    assert plain.plan is not None
    assert plain.plan.cycles < MODEL.plain_cycles < MODEL.retpoline_cycles
    # Half of the branches miss: with a retpoline that is a surprise sooner.
    current, half = plan_for({A: 1000}), to_counts({A: 7_500, B: 2_500})
    assert POLICY.is_surprising(view_of(current, half))
    assert not POLICY.is_surprising(replace(view_of(current, half), is_plain=True))
