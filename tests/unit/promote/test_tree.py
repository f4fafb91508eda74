# SPDX-License-Identifier: Apache-2.0
"""Branch trees: they find every target, and no cheaper one exists."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optpoline.model import Addr, Count, Guard, Miss, Split, TreeNode, tree_targets
from optpoline.promote import tree as tree_module
from optpoline.promote.cost import CostModel
from optpoline.promote.tree import MAX_PREFIX, balance_tree, plan_tree, tree_cost
from tests.emulate.block_model import find_target

Floats = NDArray[np.float64]

EXACT = CostModel(
    compare_cycles=1.0,
    branch_cycles=0.6,
    taken_cycles=1.0,
    retpoline_cycles=20.0,
    mispredict_cycles=16.0,
    mispredict_ratio=0.1,
    min_gain_cycles=0.0,
)
"""Numbers of its own: what is tested here does not follow the tuning of the defaults."""

models = st.builds(
    CostModel,
    compare_cycles=st.floats(0.1, 4.0),
    branch_cycles=st.floats(0.0, 3.0),
    taken_cycles=st.floats(0.0, 4.0),
    retpoline_cycles=st.floats(5.0, 100.0),
    mispredict_cycles=st.floats(0.0, 40.0),
    mispredict_ratio=st.floats(0.0, 1.0),
    min_gain_cycles=st.just(0.0),
)
weights_of = st.dictionaries(
    st.integers(1, 200).map(lambda n: Addr(16 * n)), st.integers(1, 1 << 40), min_size=1
)


def to_counts(hits: dict[Addr, int]) -> list[Count]:
    """Return counts from a mapping."""
    return [Count(target=target, hit_count=n) for target, n in hits.items()]


Ways = Callable[[tuple[Addr, ...], tuple[Addr, ...]], tuple[bool, ...]]
"""From the targets below and above a node to the ``falls_below`` to be tried."""


def either_way(below: tuple[Addr, ...], above: tuple[Addr, ...]) -> tuple[bool, ...]:
    """Try both ways."""
    return (False, True)


def lighter_branches(weights: dict[Addr, float]) -> Ways:
    """Let the lighter side be the one that takes a branch."""

    def ways(below: tuple[Addr, ...], above: tuple[Addr, ...]) -> tuple[bool, ...]:
        return (sum(weights[t] for t in below) > sum(weights[t] for t in above),)

    return ways


def all_search_trees(targets: tuple[Addr, ...], ways: Ways) -> Iterator[TreeNode]:
    """Yield every search tree over targets in address order."""
    if not targets:
        yield Miss()
        return
    for i, target in enumerate(targets):
        rest = targets[i + 1 :]
        for below in all_search_trees(targets[:i], ways):
            for above in all_search_trees(rest, ways):
                if isinstance(below, Miss):
                    yield Guard(target, None, above)
                elif isinstance(above, Miss):
                    yield Guard(target, None, below)
                else:
                    for falls_below in ways(targets[:i], rest):
                        yield Guard(target, below, above, falls_below)
        if i > 0:
            for below in all_search_trees(targets[:i], ways):
                for above in all_search_trees(targets[i:], ways):
                    for falls_below in ways(targets[:i], targets[i:]):
                        yield Split(target, below, above, falls_below)


def all_trees(targets: tuple[Addr, ...], ways: Ways) -> Iterator[TreeNode]:
    """Yield every tree at all: guards in a row may come anywhere, in any order."""
    if not targets:
        yield Miss()
        return
    for i, target in enumerate(targets):
        for rest in all_trees(targets[:i] + targets[i + 1 :], ways):
            yield Guard(target, None, rest)
        if 0 < i < len(targets) - 1:
            for below in all_trees(targets[:i], ways):
                for above in all_trees(targets[i + 1 :], ways):
                    for falls_below in ways(targets[:i], targets[i + 1 :]):
                        yield Guard(target, below, above, falls_below)
        if i > 0:
            for below in all_trees(targets[:i], ways):
                for above in all_trees(targets[i:], ways):
                    for falls_below in ways(targets[:i], targets[i:]):
                        yield Split(target, below, above, falls_below)


def optimal_tree_and_cost(
    hits: dict[Addr, int], model: CostModel, monkeypatch: pytest.MonkeyPatch
) -> tuple[TreeNode, float, dict[Addr, float]]:
    """Return the dynamic program's tree, the cost it claims, and the weights."""
    total = sum(hits.values())
    weights = {target: n / total for target, n in hits.items()}
    claimed: list[float] = []
    original = tree_module._best_roots

    def spy(
        length: int, w: Floats, prefix: Floats, cost: Floats, model: CostModel
    ) -> tuple[Floats, NDArray[np.int64]]:
        costs, roots = original(length, w, prefix, cost, model)
        if length == len(w):
            claimed.append(float(costs[0]))
        return costs, roots

    with monkeypatch.context() as patch:
        patch.setattr(tree_module, "_best_roots", spy)
        tree = tree_module._optimal_tree(sorted(hits), weights, model)
    return tree, claimed[0], weights


@settings(max_examples=150, deadline=None)
@given(hits=weights_of, model=models)
def test_dynamic_program_and_tree_cost_agree(hits: dict[Addr, int], model: CostModel) -> None:
    tree, claimed, weights = optimal_tree_and_cost(hits, model, pytest.MonkeyPatch())
    assert tree_cost(tree, weights, model) == pytest.approx(claimed, rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    hits=st.dictionaries(
        st.integers(1, 99).map(lambda n: Addr(16 * n)), st.integers(1, 1000), max_size=6, min_size=1
    ),
    model=models,
)
def test_no_search_tree_is_cheaper(hits: dict[Addr, int], model: CostModel) -> None:
    tree, claimed, weights = optimal_tree_and_cost(hits, model, pytest.MonkeyPatch())
    # Nothing but its own two sides depends on which way a node falls: see the next test.
    ways = either_way if len(hits) <= 4 else lighter_branches(weights)
    trees = all_search_trees(tuple(sorted(hits)), ways)
    best = min(tree_cost(other, weights, model) for other in trees)
    assert claimed == pytest.approx(best, rel=1e-9)
    assert tree_cost(tree, weights, model) == pytest.approx(best, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    hits=st.dictionaries(
        st.integers(1, 99).map(lambda n: Addr(16 * n)), st.integers(1, 1000), max_size=5, min_size=1
    ),
    n_misses=st.integers(0, 1000),
)
def test_hardly_any_tree_at_all_is_cheaper(hits: dict[Addr, int], n_misses: int) -> None:
    # The plan is a prefix of the hottest and a search tree; a guard in a row may
    # also stand deeper, and misses take part in no choice but that of the prefix.
    plan = plan_tree(to_counts(hits), n_misses, EXACT)
    total = sum(hits.values()) + n_misses
    weights = {target: n / total for target, n in hits.items()}
    ways = either_way if len(hits) <= 3 else lighter_branches(weights)
    trees = all_trees(tuple(sorted(hits)), ways)
    best = min(tree_cost(other, weights, EXACT) for other in trees)
    assert best <= plan.cycles + 1e-9
    # At most, misses pass all other guards for nothing.
    passed = n_misses / total * (len(hits) - 1) * EXACT.compare_cycles
    assert plan.cycles - best <= 0.25 + passed


@settings(max_examples=150, deadline=None)
@given(hits=weights_of, n_misses=st.integers(0, 1 << 40), model=models, data=st.data())
def test_each_target_is_found_and_nothing_else(
    hits: dict[Addr, int], n_misses: int, model: CostModel, data: st.DataObject
) -> None:
    plan = plan_tree(to_counts(hits), n_misses, model)
    assert sorted(tree_targets(plan.tree)) == sorted(plan.targets)
    assert len(set(plan.targets)) == len(plan.targets)
    for target in plan.targets:
        assert find_target(plan.tree, target) == target
        for other in (target - 1, target + 1, target | 1 << 63, target ^ 1 << 32):
            assert find_target(plan.tree, other) is None
    for target in set(hits) - set(plan.targets):
        assert find_target(plan.tree, target) is None
    operand = data.draw(st.integers(0, (1 << 64) - 1))
    assert find_target(plan.tree, operand) == (operand if operand in plan.targets else None)


@settings(max_examples=100, deadline=None)
@given(hits=weights_of, n_misses=st.integers(0, 1 << 40))
def test_plan_says_what_its_tree_is_worth(hits: dict[Addr, int], n_misses: int) -> None:
    model = CostModel()
    plan = plan_tree(to_counts(hits), n_misses, model)
    total = sum(hits.values()) + n_misses
    guarded = {target: hits[target] / total for target in plan.targets}
    assert plan.hit_ratio == pytest.approx(sum(guarded.values()))
    assert 0.0 <= plan.hit_ratio <= 1.0 + 1e-9
    assert plan.cycles == pytest.approx(tree_cost(plan.tree, guarded, model))
    assert [hits[t] for t in plan.targets] == sorted((hits[t] for t in plan.targets), reverse=True)


@given(hits=weights_of, n_misses=st.integers(0, 100), seed=st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_order_of_counts_does_not_matter(
    hits: dict[Addr, int], n_misses: int, seed: random.Random
) -> None:
    counts = to_counts(hits)
    shuffled = counts.copy()
    seed.shuffle(shuffled)
    assert plan_tree(counts, n_misses, EXACT) == plan_tree(shuffled, n_misses, EXACT)


def test_nothing_counted() -> None:
    plan = plan_tree([], 0, EXACT)
    assert plan.tree == Miss()
    assert (plan.targets, plan.hit_ratio) == ((), 0.0)
    assert plan.cycles == EXACT.retpoline_cycles


def test_nothing_but_misses() -> None:
    plan = plan_tree([], 1000, EXACT)
    assert (plan.tree, plan.targets) == (Miss(), ())
    assert plan.cycles == pytest.approx(EXACT.retpoline_cycles)


def test_counts_of_zero_are_no_targets() -> None:
    plan = plan_tree([Count(target=Addr(8), hit_count=0)], 5, EXACT)
    assert plan.targets == ()
    assert plan_tree([Count(target=Addr(8), hit_count=0)], 0, EXACT).targets == ()


def test_a_target_named_twice_counts_twice_and_is_guarded_once() -> None:
    counts = [
        Count(target=Addr(8), hit_count=30),
        Count(target=Addr(16), hit_count=40),
        Count(target=Addr(8), hit_count=30),
    ]
    plan = plan_tree(counts, 0, EXACT)
    assert plan == plan_tree([Count(target=Addr(8), hit_count=60), counts[1]], 0, EXACT)
    assert plan.targets == (8, 16)
    assert plan.hit_ratio == pytest.approx(1.0)


@pytest.mark.parametrize("ratio", [1, 2, 10, 1000, 10**6, 10**12, 10**18])
def test_weights_far_apart(ratio: int) -> None:
    hits = {Addr(16 * i): ratio if i == 7 else 1 for i in range(1, 20)}
    plan = plan_tree(to_counts(hits), 0, EXACT)
    assert sorted(plan.targets) == sorted(hits)
    if ratio >= 1000:
        # The one hot target is compared first.
        assert isinstance(plan.tree, Guard)
        assert plan.tree.target == 16 * 7
        assert plan.cycles < 1.2
    cold = plan_tree(to_counts(hits), 0, replace(EXACT, min_gain_cycles=0.005))
    # Those that would gain less than min_gain_cycles are left to the thunk.
    assert set(cold.targets) == (set(hits) if ratio <= 1000 else {Addr(16 * 7)})


def test_hot_targets_come_before_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "MAX_PREFIX", 6)
    hits = {Addr(16 * i): 1 for i in range(1, 65)} | {Addr(16 * 5): 400, Addr(16 * 60): 200}
    plan = plan_tree(to_counts(hits), 0, EXACT)
    assert isinstance(plan.tree, Guard)
    assert (plan.tree.target, plan.tree.below) == (16 * 5, None)
    second = plan.tree.otherwise
    assert isinstance(second, Guard)
    assert (second.target, second.below) == (16 * 60, None)
    assert isinstance(second.otherwise, Split)


def depth(node: TreeNode) -> int:
    """Return the longest chain of compares in a tree."""
    match node:
        case Miss():
            return 0
        case Guard(_, below, otherwise, _):
            return 1 + max(0 if below is None else depth(below), depth(otherwise))
        case Split(_, below, above, _):
            return 1 + max(depth(below), depth(above))


def halves(targets: tuple[Addr, ...]) -> TreeNode:
    """Return a tree that splits in the middle down to one guard in each leaf."""
    if len(targets) == 1:
        return Guard(targets[0], None, Miss())
    middle = len(targets) // 2
    return Split(targets[middle], halves(targets[:middle]), halves(targets[middle:]))


def test_equal_targets_make_a_balanced_tree() -> None:
    hits = {Addr(16 * i): 100 for i in range(1, 129)}
    plan = plan_tree(to_counts(hits), 0, EXACT)
    # Uneven splits predict better and branch less than even ones, so it is not the least depth.
    assert depth(plan.tree) <= 16
    weights = dict.fromkeys(hits, 1 / 128)
    assert plan.cycles < tree_cost(halves(tuple(hits)), weights, EXACT)
    # With nothing but compares to pay, depth is all that counts; guards on the way
    # may make one leaf a level deeper at the same cost.
    even = replace(EXACT, taken_cycles=0.0, mispredict_ratio=0.0, branch_cycles=1.0)
    assert depth(plan_tree(to_counts(hits), 0, even).tree) <= 9


def test_max_targets_keeps_the_hottest_and_counts_the_rest_as_misses() -> None:
    hits = {Addr(16 * i): 1000 - i for i in range(1, 201)}
    model = replace(EXACT, max_targets=50)
    plan = plan_tree(to_counts(hits), 0, model)
    assert plan.targets == tuple(Addr(16 * i) for i in range(1, 51))
    kept = sum(1000 - i for i in range(1, 51))
    assert plan.hit_ratio == pytest.approx(kept / sum(hits.values()))
    assert plan.cycles > (1 - plan.hit_ratio) * model.retpoline_cycles


def test_targets_that_gain_too_little_are_left_out() -> None:
    model = replace(EXACT, min_gain_cycles=0.1)  # half a percent
    hits = {Addr(16): 9900, Addr(32): 51, Addr(48): 49}
    assert plan_tree(to_counts(hits), 0, model).targets == (16, 32)


@pytest.mark.parametrize("n", range(1, MAX_PREFIX + 3))
def test_prefix_is_as_long_as_is_cheapest(n: int) -> None:
    # Each target has four times the weight of the next: a chain is right.
    hits = {Addr(16 * (i * 37 % 101 + 1)): 4 ** (MAX_PREFIX + 3 - i) for i in range(n)}
    plan = plan_tree(to_counts(hits), 0, EXACT)
    node, chain = plan.tree, 0
    while isinstance(node, Guard) and node.below is None:
        chain += 1
        node = node.otherwise
    assert chain >= min(n, MAX_PREFIX)


def test_a_branch_to_an_unguarded_target_is_a_miss_for_the_cost() -> None:
    tree = Guard(Addr(16), None, Miss())
    unknown = tree_cost(tree, {}, EXACT)
    assert unknown >= EXACT.retpoline_cycles
    # Known by name or not: no guard leads to it.
    assert tree_cost(tree, {Addr(32): 1.0}, EXACT) == pytest.approx(unknown)
    half = tree_cost(tree, {Addr(16): 0.5, Addr(32): 0.5}, EXACT)
    assert half == pytest.approx(tree_cost(tree, {Addr(16): 0.5}, EXACT))
    assert half > EXACT.retpoline_cycles / 2


def test_tree_cost_by_hand() -> None:
    model = CostModel(
        compare_cycles=1.0,
        branch_cycles=0.5,
        taken_cycles=3.0,
        retpoline_cycles=20.0,
        mispredict_cycles=10.0,
        mispredict_ratio=0.2,
    )
    a, b, c = Addr(16), Addr(32), Addr(48)
    weights = {a: 0.2, b: 0.5, c: 0.2}
    tree = Guard(b, Guard(a, None, Miss()), Guard(c, None, Miss()))
    # a: 0.2 compare. c: 0.3 compares, 0.1 miss, min(0.2, 0.1) mispredicts.
    inner = 0.2 + 0.3 + 0.1 * 20 + 0.1 * 2
    # b: all compare, half go on and branch, min(0.2, 0.3) and min(0.5, 0.5) mispredict.
    outer = 1.0 + 0.5 * 0.5 + 0.2 * 2 + 0.5 * 2
    both = inner + outer
    # Taken: 0.2 of a if the rest falls through, else 0.2 of c and 0.1 misses.
    assert tree_cost(tree, weights, model) == pytest.approx(both + 0.2 * 3)
    tree = replace(tree, falls_below=True)
    assert tree_cost(tree, weights, model) == pytest.approx(both + 0.3 * 3)
    split = Split(c, Guard(a, None, Guard(b, None, Miss())), Guard(c, None, Miss()))
    below = 0.2 + 0.5 + 0.5 + 0.2 * 2
    above = 0.3 + 0.1 * 20 + 0.1 * 2
    both = below + above + 1.0 + 0.3 * 2
    assert tree_cost(split, weights, model) == pytest.approx(both + 0.7 * 3)
    split = replace(split, falls_below=True)
    assert tree_cost(split, weights, model) == pytest.approx(both + 0.3 * 3)
    # A guard without a way of its own below has nothing to take.
    chain = Guard(b, None, Miss())
    assert tree_cost(chain, {b: 1.0}, model) == pytest.approx(1.0)
    assert tree_cost(replace(chain, falls_below=True), {b: 1.0}, model) == pytest.approx(1.0)


def turn_at(node: TreeNode, path: tuple[bool, ...]) -> TreeNode:
    """Return a tree with the node at a path (True for below) turned."""
    if not path:
        assert not isinstance(node, Miss)
        return replace(node, falls_below=not node.falls_below)
    match node:
        case Split(key, below, above, falls_below):
            if path[0]:
                return Split(key, turn_at(below, path[1:]), above, falls_below)
            return Split(key, below, turn_at(above, path[1:]), falls_below)
        case Guard(target, below, otherwise, falls_below):
            if path[0]:
                assert below is not None
                return Guard(target, turn_at(below, path[1:]), otherwise, falls_below)
            return Guard(target, below, turn_at(otherwise, path[1:]), falls_below)
        case Miss():
            raise AssertionError("the path leads nowhere")


def two_way_nodes(
    node: TreeNode, path: tuple[bool, ...] = ()
) -> Iterator[tuple[tuple[bool, ...], TreeNode, TreeNode, bool]]:
    """Yield (path, below, above, falls_below) of each node that branches two ways."""
    match node:
        case Split(_, below, above, falls_below):
            yield path, below, above, falls_below
            yield from two_way_nodes(below, (*path, True))
            yield from two_way_nodes(above, (*path, False))
        case Guard(_, below, otherwise, falls_below):
            if below is not None:
                yield path, below, otherwise, falls_below
                yield from two_way_nodes(below, (*path, True))
            yield from two_way_nodes(otherwise, (*path, False))
        case Miss():
            pass


@settings(max_examples=100, deadline=None)
@given(hits=weights_of, model=models)
def test_the_heavier_side_falls_through(hits: dict[Addr, int], model: CostModel) -> None:
    plan = plan_tree(to_counts(hits), 0, model)
    weights = {target: n / sum(hits.values()) for target, n in hits.items()}
    cycles = tree_cost(plan.tree, weights, model)
    for path, below, above, falls_below in two_way_nodes(plan.tree):
        left = sum(weights[target] for target in tree_targets(below))
        right = sum(weights[target] for target in tree_targets(above))
        if left != pytest.approx(right, rel=1e-6, abs=1e-12):
            assert falls_below == (left > right)
        # Turning one node changes what its own two sides pay, and nothing else.
        other = tree_cost(turn_at(plan.tree, path), weights, model)
        assert other - cycles == pytest.approx(model.taken_cycles * abs(left - right), abs=1e-6)


def test_planning_the_largest_site_is_quick() -> None:
    rng = np.random.default_rng(1)
    hits = {Addr(16 * i): int(rng.integers(1, 1 << 20)) for i in range(1, 257)}
    start_ns = time.process_time_ns()
    plan_tree(to_counts(hits), 0, EXACT)
    assert time.process_time_ns() - start_ns < 2_000_000_000


@cache
def catalan_like(n: int) -> int:
    """Return how many search trees over n targets there are."""
    if n == 0:
        return 1
    guards = sum(catalan_like(i) * catalan_like(n - 1 - i) for i in range(n))
    return guards + sum(catalan_like(i) * catalan_like(n - i) for i in range(1, n))


def test_brute_force_sees_every_tree() -> None:
    for n in range(6):
        targets = tuple(Addr(16 * (i + 1)) for i in range(n))
        weights = dict.fromkeys(targets, 1.0)
        trees = list(all_search_trees(targets, lighter_branches(weights)))
        assert len(trees) == catalan_like(n)
        both = list(all_search_trees(targets, either_way))
        assert len(both) == sum(2 ** len(list(two_way_nodes(tree))) for tree in trees)
        assert set(trees) <= set(both)


@given(
    st.lists(st.tuples(st.integers(1, 1 << 40), st.integers(0, 10**6)), unique_by=lambda c: c[0])
)
def test_balanced_tree_finds_each_target_and_is_not_deep(pairs: list[tuple[int, int]]) -> None:
    counts = [Count(target=Addr(target), hit_count=n) for target, n in pairs]
    tree = balance_tree(counts)
    assert sorted(tree_targets(tree)) == sorted(target for target, _ in pairs)
    for target, _ in pairs:
        assert find_target(tree, target) == target
    weights = {count.target: count.hit_count + 1 for count in counts}
    total = sum(weights.values())
    for target, weight in weights.items():
        # Two levels halve the weight, whatever it is (Mehlhorn 1975).
        assert depth_of(tree, target) <= 2 * math.log2(total / weight) + 3


def depth_of(tree: TreeNode, target: int) -> int:
    """Return how many guards are passed on the way to a target, its own included."""
    depth = 1
    while isinstance(tree, Guard) and tree.target != target:
        tree = tree.below if tree.below is not None and target < tree.target else tree.otherwise
        depth += 1
    return depth
