# SPDX-License-Identifier: Apache-2.0
"""Plans of the policies that build chains of guards, not the cheapest tree."""

from __future__ import annotations

from collections.abc import Sequence

from optpoline.learn.counting import SiteCounts
from optpoline.model import Addr, Guard, Miss, TreeNode
from optpoline.promote.cost import CostModel
from optpoline.promote.tree import PlannedTree, tree_cost

__all__ = ["plan_chain", "take_hot"]


def plan_chain(targets: Sequence[Addr], counts: SiteCounts, model: CostModel) -> PlannedTree:
    """Return guards for targets in the order given, one after the other.

    Args:
        targets: Each target once.
        counts: What the expected hit ratio and cycles are computed from.
        model: The cost model; it does not influence the chain.
    """
    tree: TreeNode = Miss()
    for target in reversed(targets):
        tree = Guard(target, None, tree)
    shares = counts.shares()
    return PlannedTree(
        tree=tree,
        targets=tuple(targets),
        hit_ratio=sum(shares.get(target, 0.0) for target in targets),
        cycles=tree_cost(tree, shares, model),
    )


def take_hot(
    counts: SiteCounts, *, max_guards: int, remaining_ratio: float, total_ratio: float
) -> tuple[Addr, ...]:
    """Return the hottest targets, up to the first that is not hot enough.

    Args:
        counts: Targets, hottest first, each once.
        max_guards: How many at most.
        remaining_ratio: Least share of the branches that no hotter target takes.
        total_ratio: Least share of all branches.
    """
    total = remaining = counts.total
    hot: list[Addr] = []
    for count in counts.counts[:max_guards]:
        n = count.hit_count
        if n <= 0 or n < remaining_ratio * remaining or n < total_ratio * total:
            break
        hot.append(count.target)
        remaining -= n
    return tuple(hot)
