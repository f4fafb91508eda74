# SPDX-License-Identifier: Apache-2.0
"""What is kept of a site between decisions, and what no policy may ever do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optpoline.learn.counting import SiteCounts
from optpoline.model import Addr, Count, SiteKind, tree_targets
from optpoline.promote.cost import CostModel
from optpoline.promote.policies import POLICY_NAMES, policy_named
from optpoline.promote.policy import CALM_S, Action, Decision, SiteHistory
from optpoline.promote.tree import plan_tree

A, B = Addr(0x1000), Addr(0x2000)
PLAN = plan_tree((Count(target=A, hit_count=900), Count(target=B, hit_count=100)), 0, CostModel())
OTHER = plan_tree((Count(target=B, hit_count=100),), 0, CostModel())


def counts(hits: dict[int, int], n_unknown: int = 0) -> SiteCounts:
    """Return counts from a mapping, hottest first."""
    ranked = sorted(hits.items(), key=lambda item: (-item[1], item[0]))
    return SiteCounts(
        counts=tuple(Count(target=Addr(target), hit_count=n) for target, n in ranked if n),
        n_unknown=n_unknown,
    )


# --- history


def test_first_promotion_is_no_change() -> None:
    after = SiteHistory().after(Decision(action=Action.PROMOTE, plan=PLAN), 7.0)
    assert (after.current, after.n_changes, after.changed_s) == (PLAN, 0, 7.0)


def test_changes_add_up_and_time_starts_anew() -> None:
    history = SiteHistory(current=PLAN, n_confirmed=1, n_changes=2, changed_s=1.0)
    after = history.after(Decision(action=Action.PROMOTE, plan=OTHER), 5.0)
    assert (after.current, after.n_changes, after.n_confirmed) == (OTHER, 3, 0)
    assert after.view(counts({A: 1}), window_s=0.02, now_s=9.0).since_change_s == 4.0


def test_confirmations_in_a_row() -> None:
    history = SiteHistory(current=PLAN)
    confirm, keep = Decision(action=Action.CONFIRM), Decision(action=Action.KEEP)
    assert history.after(confirm, 1.0).after(confirm, 2.0).n_confirmed == 2
    assert history.after(confirm, 1.0).after(keep, 2.0).n_confirmed == 0


@pytest.mark.parametrize("action", [Action.HOLD, Action.CONFIRM])
def test_what_is_not_calm_lives_nothing_down(action: Action) -> None:
    keep, restless = Decision(action=Action.KEEP), Decision(action=action)
    history = SiteHistory(current=PLAN, n_changes=3)
    for step in range(1, 20):
        history = history.after(restless if step % 2 else keep, step * CALM_S * 0.9)
    assert history.n_changes == 3


def test_calm_lives_down_one_change_at_a_time() -> None:
    keep = Decision(action=Action.KEEP)
    history = SiteHistory(current=PLAN, n_changes=3)
    assert history.after(keep, 0.9 * CALM_S).n_changes == 3
    assert history.after(keep, 1.5 * CALM_S).n_changes == 2
    assert history.after(keep, 1.5 * CALM_S).after(keep, 2.5 * CALM_S).n_changes == 1
    assert history.after(keep, 100 * CALM_S).n_changes == 0


def test_demotion_forgets_the_tree() -> None:
    history = SiteHistory(current=PLAN, profile=counts({A: 1}), n_changes=3)
    after = history.after(Decision(action=Action.DEMOTE), 1.0)
    assert (after.current, after.profile, after.n_changes) == (None, None, 3)


# --- all policies

WINDOWS = st.lists(
    st.tuples(
        st.dictionaries(st.integers(1, 12), st.integers(0, 30_000), max_size=12),
        st.integers(0, 5_000),
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(windows=WINDOWS, kind=st.sampled_from(SiteKind), hotter_ratio=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_every_decision_makes_sense(
    name: str, windows: list[tuple[dict[int, int], int]], kind: SiteKind, hotter_ratio: float
) -> None:
    policy = policy_named(name)
    history = SiteHistory()
    for number, (hits, n_unknown) in enumerate(windows):
        window = counts({0x1000 + 64 * target: n for target, n in hits.items()}, n_unknown)
        view = history.view(
            window, window_s=0.02, now_s=float(number), kind=kind, hotter_ratio=hotter_ratio
        )
        decision = policy.decide(view)
        assert decision == policy.decide(view)
        assert policy.is_surprising(view) == policy.is_surprising(view)
        match decision.action:
            case Action.PROMOTE:
                assert decision.plan is not None
                targets = decision.plan.targets
                # Nobody guards a target twice, or none, or one that was never seen.
                assert 0 < len(targets) == len(set(targets))
                assert sorted(tree_targets(decision.plan.tree)) == sorted(targets)
                known = {c.target for c in window.counts}
                known |= {c.target for c in view.profile.counts} if view.profile else set()
                assert set(targets) <= known
            case Action.KEEP:
                assert decision.hold_s == 0.0
            case Action.CONFIRM | Action.HOLD | Action.DEMOTE:
                assert view.current is not None
        history = history.after(decision, float(number))


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_obvious_site_is_promoted_by_all(name: str) -> None:
    view = SiteHistory().view(counts({A: 1_000_000}), window_s=1.0, now_s=0.0)
    decision = policy_named(name).decide(view)
    assert decision.action is Action.PROMOTE
    assert decision.plan is not None
    assert decision.plan.targets == (A,)
    assert decision.plan.hit_ratio == 1.0


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_site_that_was_not_seen_is_left_alone_by_all(name: str) -> None:
    policy = policy_named(name)
    for current in (None, PLAN):
        history = SiteHistory(current=current)
        view = history.view(counts({}), window_s=1.0, now_s=0.0)
        assert policy.decide(view).action is Action.KEEP
        assert not policy.is_surprising(view)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_nobody_guards_more_than_the_source_allows(name: str) -> None:
    policy = policy_named(name)
    history = SiteHistory()
    # Two that change places: what is kept of both must not make a tree of both.
    for number in range(12):
        hits = {int(A): 900_000, int(B): 100_000}
        if number % 4 >= 2:
            hits = {int(A): 100_000, int(B): 900_000}
        view = history.view(counts(hits), window_s=1.0, now_s=float(number), max_guards=1)
        decision = policy.decide(view)
        history = history.after(decision, float(number))
        if decision.action is Action.PROMOTE:
            assert decision.plan is not None
            assert len(decision.plan.targets) == 1


def test_what_no_tree_of_so_few_guards_can_serve_is_no_surprise() -> None:
    policy = policy_named("adaptive")
    history = SiteHistory(current=OTHER)
    halves = counts({A: 5_000, B: 5_000})
    flipped = counts({A: 9_000, B: 1_000})

    def is_surprising(window: SiteCounts, max_guards: int) -> bool:
        view = history.view(window, window_s=1.0, now_s=9.0, max_guards=max_guards)
        return policy.is_surprising(view)

    assert is_surprising(halves, 0)
    assert not is_surprising(halves, 1)
    assert is_surprising(flipped, 1)
