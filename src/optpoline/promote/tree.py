# SPDX-License-Identifier: Apache-2.0
"""Build the branch tree with the least expected cost for counted targets.

A prefix of plain guards takes the hottest targets; the rest is an optimal
binary search tree over addresses, found by dynamic programming as in Knuth,
"Optimum binary search trees" (Acta Informatica 1, 1971), with two kinds of
inner node: one that also tests for equality (``Guard``: cmp, je, jb) and one
that only splits (``Split``: cmp, jb). How long the prefix is follows from the
same cost model: each length is tried and the cheapest whole is kept.

Costs are cycles per branch; weights are shares of the site's branches.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optpoline.model import Addr, Count, Guard, Miss, Split, TreeNode, tree_targets
from optpoline.promote.cost import CostModel

__all__ = ["PlannedTree", "balance_tree", "plan_tree", "quick_cost", "stake_cycles", "tree_cost"]

MAX_PREFIX = 2
"""Longest chain of guards tried before the binary tree. The feasibility study found
two best; here two recovered 0.5 points more of Lua's overhead than six or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTree:
    """A tree and what the model expects of it.

    Attributes:
        tree: The branch tree.
        targets: The guarded targets, hottest first.
        hit_ratio: Share of branches that take a guard, 0..1.
        cycles: Expected cycles per branch, misses with their thunk included.
    """

    tree: TreeNode
    targets: tuple[Addr, ...]
    hit_ratio: float
    cycles: float


def plan_tree(counts: Sequence[Count], n_misses: int, model: CostModel) -> PlannedTree:
    """Return the cheapest tree for what was counted.

    Args:
        counts: Targets and how often each was taken; order does not matter,
            and a target named twice was taken that often in all.
        n_misses: Branches whose target is not among them.
        model: The cost model.
    """
    kept, total = _worth_a_guard(counts, n_misses, model)
    if not kept:
        return PlannedTree(tree=Miss(), targets=(), hit_ratio=0.0, cycles=model.retpoline_cycles)
    weights = {c.target: c.hit_count / total for c in kept}
    # Up to MAX_PREFIX targets there is nothing to choose: guards, hottest first.
    shortest = len(kept) if len(kept) <= MAX_PREFIX else 0
    trees = [
        _with_prefix(kept, n_prefix, weights, model)
        for n_prefix in range(shortest, min(MAX_PREFIX, len(kept)) + 1)
    ]
    costs = [tree_cost(tree, weights, model) for tree in trees]
    cycles = min(costs)
    return PlannedTree(
        tree=trees[costs.index(cycles)],
        targets=tuple(c.target for c in kept),
        hit_ratio=sum(weights.values()),
        cycles=cycles,
    )


def quick_cost(counts: Sequence[Count], n_misses: int, model: CostModel) -> float:
    """Return about what ``plan_tree`` would cost, hardly ever less, in no time.

    The cost of a balanced tree behind the same guards: for who only asks whether
    planning is worth it. Planning 80 targets takes 24 ms, this 1 ms.

    Args:
        counts: Targets and how often each was taken.
        n_misses: Branches whose target is not among them.
        model: The cost model.
    """
    kept, total = _worth_a_guard(counts, n_misses, model)
    if not kept:
        return model.retpoline_cycles
    weights = {c.target: c.hit_count / total for c in kept}
    shortest = len(kept) if len(kept) <= MAX_PREFIX else 0
    costs: list[float] = []
    for n_prefix in range(shortest, min(MAX_PREFIX, len(kept)) + 1):
        tree = balance_tree(kept[n_prefix:])
        for count in reversed(kept[:n_prefix]):
            tree = Guard(count.target, None, tree)
        costs.append(tree_cost(tree, weights, model))
    return min(costs)


def _worth_a_guard(
    counts: Sequence[Count], n_misses: int, model: CostModel
) -> tuple[list[Count], int]:
    """Return the targets worth a guard, each once and hottest first, and all branches."""
    hits: dict[Addr, int] = {}
    for count in counts:
        hits[count.target] = hits.get(count.target, 0) + count.hit_count
    total = sum(hits.values()) + n_misses
    ranked = [Count(target=target, hit_count=n) for target, n in hits.items()]
    ranked.sort(key=lambda count: (-count.hit_count, count.target))
    floor = model.min_gain_cycles / model.retpoline_cycles * total
    return [c for c in ranked[: model.max_targets] if c.hit_count > floor], total


def stake_cycles(tree: TreeNode, model: CostModel) -> float:
    """Return what a tree may cost more per branch than the best, its misses apart.

    Should the weights among its targets change, a branch takes some other way
    through it, the average one say, where one guard would do. Misses are seen
    without looking, so nothing is at stake in a tree of one guard.

    Args:
        tree: The tree.
        model: The cost model.
    """
    ways = list(_ways(tree, 0.0, model))
    return max(0.0, sum(ways) / len(ways) - model.compare_cycles) if ways else 0.0


def _ways(node: TreeNode, cycles: float, model: CostModel) -> Iterator[float]:
    """Yield the cycles to each target of a subtree that is entered after ``cycles``."""
    match node:
        case Miss():
            return
        case Guard(_, below, otherwise):
            cycles += model.compare_cycles
            yield cycles
            if below is not None:
                cycles += model.branch_cycles
                yield from _ways(below, cycles, model)
            yield from _ways(otherwise, cycles, model)
        case Split(_, below, above):
            cycles += model.compare_cycles
            yield from _ways(below, cycles, model)
            yield from _ways(above, cycles, model)


def balance_tree(counts: Sequence[Count]) -> TreeNode:
    """Return a search tree that is nearly the cheapest, in no time.

    For blocks that count for a moment: each node halves the weight below it (K. Mehlhorn,
    "Nearly optimal binary search trees", Acta Informatica 5, 1975), where ``plan_tree``
    takes milliseconds to be exact.

    Args:
        counts: Targets, each once, and how often each was taken.
    """
    ordered = sorted(counts, key=lambda count: count.target)
    # One more than was counted, so that targets never taken lie balanced as well.
    sums = list(itertools.accumulate((count.hit_count + 1 for count in ordered), initial=0))
    return _balance([count.target for count in ordered], sums, 0, len(ordered))


def _balance(targets: Sequence[Addr], sums: Sequence[int], i: int, j: int) -> TreeNode:
    """Return a balanced tree over targets i..j-1; ``sums`` are sums of weights from 0 on."""
    if i == j:
        return Miss()
    middle = bisect.bisect_right(sums, (sums[i] + sums[j]) // 2, i, j) - 1
    root = min(max(middle, i), j - 1)
    below = _balance(targets, sums, i, root)
    above = _balance(targets, sums, root + 1, j)
    if isinstance(below, Miss):
        return Guard(targets[root], None, above)
    if isinstance(above, Miss):
        return Guard(targets[root], None, below)
    return Guard(targets[root], below, above, sums[root] - sums[i] > sums[j] - sums[root + 1])


def _with_prefix(
    kept: Sequence[Count], n_prefix: int, weights: dict[Addr, float], model: CostModel
) -> TreeNode:
    """Return guards for the hottest, then the optimal tree of the rest."""
    rest = sorted(c.target for c in kept[n_prefix:])
    tree = _optimal_tree(rest, weights, model)
    for count in reversed(kept[:n_prefix]):
        tree = Guard(count.target, None, tree)
    return tree


def tree_cost(tree: TreeNode, weights: dict[Addr, float], model: CostModel) -> float:
    """Return the expected cycles per branch of a tree.

    Branches to a target that the tree has no guard for are misses, whether
    ``weights`` names it or not: they are assumed to walk the longest way, which
    is what a target far from all others does.

    Args:
        tree: The tree.
        weights: Share of all branches by target; what is left to 1 are misses.
        model: The cost model.
    """
    hit_ratio = sum(weights.get(target, 0.0) for target in set(tree_targets(tree)))
    return _subtree_cost(tree, weights, model, max(0.0, 1.0 - hit_ratio))[0]


def _subtree_cost(
    node: TreeNode, weights: dict[Addr, float], model: CostModel, missing: float
) -> tuple[float, float]:
    """Return (cycles, weight that came in) of a subtree; ``missing`` walks through it."""
    match node:
        case Miss():
            return missing * model.retpoline_cycles, missing
        case Guard(target, below, otherwise, falls_below):
            hit = weights.get(target, 0.0)
            cycles, weight = _subtree_cost(otherwise, weights, model, missing)
            if below is not None:
                below_cycles, below_weight = _subtree_cost(below, weights, model, 0.0)
                cycles += below_cycles + (below_weight + weight) * model.branch_cycles
                cycles += _mispredicts(below_weight, weight, model)
                cycles += model.taken_cycles * (weight if falls_below else below_weight)
                weight += below_weight
            cycles += (hit + weight) * model.compare_cycles + _mispredicts(hit, weight, model)
            return cycles, hit + weight
        case Split(_, below, above, falls_below):
            below_cycles, below_weight = _subtree_cost(below, weights, model, 0.0)
            cycles, weight = _subtree_cost(above, weights, model, missing)
            both = below_weight + weight
            cycles += below_cycles + both * model.compare_cycles
            cycles += model.taken_cycles * (weight if falls_below else below_weight)
            return cycles + _mispredicts(below_weight, weight, model), both


def _mispredicts(one: float, other: float, model: CostModel) -> float:
    """Return the cycles that a branch going two ways loses to misprediction."""
    return min(one, other) * model.mispredict_ratio * model.mispredict_cycles


def _optimal_tree(
    targets: Sequence[Addr], weights: dict[Addr, float], model: CostModel
) -> TreeNode:
    """Return the cheapest search tree over targets in address order.

    Dynamic programming over ranges, one numpy step per range length: about
    10 ms for 128 targets.
    """
    n = len(targets)
    if n == 0:
        return Miss()
    w = np.array([weights[target] for target in targets])
    prefix = np.concatenate(([0.0], np.cumsum(w)))
    # cost[i, j] is the cost of targets i..j-1; choice codes the root, see _best_roots.
    cost = np.zeros((n + 1, n + 1))
    choice = np.zeros((n + 1, n + 1), dtype=np.int64)
    for length in range(1, n + 1):
        first = np.arange(n - length + 1)
        last = first + length
        cost[first, last], choice[first, last] = _best_roots(length, w, prefix, cost, model)
    return _rebuild(targets, prefix, choice, 0, n)


def _best_roots(
    length: int,
    w: NDArray[np.float64],
    prefix: NDArray[np.float64],
    cost: NDArray[np.float64],
    model: CostModel,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return (cost, root) of the best tree for each range of ``length`` targets.

    The root is r for a guard of target r, or n + r for a split below target r.
    Rows are ranges by their first target, columns are the possible roots.
    """
    n = len(w)
    lose = model.mispredict_ratio * model.mispredict_cycles
    # The lighter side is the one that takes a branch, and the rarer outcome is mispredicted.
    lighter = lose + model.taken_cycles
    first = np.arange(n - length + 1)[:, None]
    last = first + length
    total = prefix[last] - prefix[first]
    roots = first + np.arange(length)[None, :]
    left = prefix[roots] - prefix[first]
    right = prefix[last] - prefix[roots + 1]
    guard = cost[first, roots] + cost[roots + 1, last] + total * model.compare_cycles
    guard += lose * np.minimum(w[roots], left + right)
    both = (roots > first) & (roots < last - 1)
    guard += both * ((left + right) * model.branch_cycles + lighter * np.minimum(left, right))
    split = cost[first, roots] + cost[roots, last] + total * model.compare_cycles
    split += lighter * np.minimum(left, right + w[roots])
    # A split below the first target splits nothing.
    split[:, 0] = np.inf
    costs = np.concatenate((guard, split), axis=1)
    best = np.argmin(costs, axis=1)
    rows = np.arange(len(best))
    column = best % length
    return costs[rows, best], first[:, 0] + column + np.where(best >= length, n, 0)


def _rebuild(
    targets: Sequence[Addr],
    prefix: NDArray[np.float64],
    choice: NDArray[np.int64],
    i: int,
    j: int,
) -> TreeNode:
    """Return the tree that ``choice`` describes for targets i..j-1."""
    if i == j:
        return Miss()
    root = int(choice[i, j])
    n = len(targets)
    split = root - n
    last_below, first_above = (split, split) if root >= n else (root, root + 1)
    below = _rebuild(targets, prefix, choice, i, last_below)
    above = _rebuild(targets, prefix, choice, first_above, j)
    weight_below = prefix[last_below] - prefix[i]
    falls_below = bool(weight_below > prefix[j] - prefix[first_above])
    if root >= n:
        return Split(targets[split], below, above, falls_below)
    # A side without targets needs no branch of its own: what goes there misses anyway.
    if isinstance(below, Miss):
        return Guard(targets[root], None, above)
    if isinstance(above, Miss):
        return Guard(targets[root], None, below)
    return Guard(targets[root], below, above, falls_below)
