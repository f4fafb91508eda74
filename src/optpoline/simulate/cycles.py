# SPDX-License-Identifier: Apache-2.0
"""What a branch tree costs, slice by slice, with the cost model of the policies.

The same sums as ``promote.tree.tree_cost``, for all slices at once: weights are
arrays over slices and count branches, so the results are cycles. It is done slice by
slice because what is mispredicted depends on the mixture of the moment: a site
whose targets take turns every second predicts well, although each has half of
its branches.
"""

from __future__ import annotations

from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from optpoline.model import Addr, Guard, Miss, Split, TreeNode, tree_targets
from optpoline.promote.cost import CostModel

__all__ = ["hits_of_slices", "tree_cycles"]

Weights = NDArray[np.float64]


def hits_of_slices(tree: TreeNode, rows: Weights, targets: NDArray[np.int64]) -> Weights:
    """Return how many branches of each slice take a guard.

    Args:
        tree: The tree.
        rows: How often each target is taken in each slice: f64[n_slices, n_targets].
        targets: Their addresses.
    """
    guarded = np.isin(targets, np.fromiter(tree_targets(tree), np.int64))
    hits: Weights = rows[:, guarded].sum(axis=1)
    return hits


def tree_cycles(
    tree: TreeNode, rows: Weights, targets: NDArray[np.int64], model: CostModel
) -> Weights:
    """Return the cycles that the branches of each slice take, misses with their thunk.

    Args:
        tree: The tree; ``Miss()`` is a site on its thunk.
        rows: How often each target is taken in each slice: f64[n_slices, n_targets].
        targets: Their addresses.
        model: Cycles of everything.
    """
    columns = {Addr(int(target)): i for i, target in enumerate(targets)}
    missing = rows.sum(axis=1) - hits_of_slices(tree, rows, targets)
    return _Costing(rows, columns, model).subtree(tree, missing)[0]


class _Costing:
    """One tree being costed."""

    def __init__(self, rows: Weights, columns: dict[Addr, int], model: CostModel) -> None:
        """Keep what every node needs."""
        self._rows = rows
        self._columns = columns
        self._model = model
        self._nothing = np.zeros(len(rows))

    def subtree(self, node: TreeNode, missing: Weights) -> tuple[Weights, Weights]:
        """Return (cycles, branches that came in) of a subtree, by slice."""
        model = self._model
        match node:
            case Miss():
                return missing * model.retpoline_cycles, missing
            case Guard(target, below, otherwise, falls_below):
                column = self._columns.get(target)
                hit = self._nothing if column is None else self._rows[:, column]
                cycles, weight = self.subtree(otherwise, missing)
                if below is not None:
                    below_cycles, below_weight = self.subtree(below, self._nothing)
                    cycles = cycles + below_cycles + (below_weight + weight) * model.branch_cycles
                    cycles += self._mispredicts(below_weight, weight)
                    cycles += model.taken_cycles * (weight if falls_below else below_weight)
                    weight = weight + below_weight
                cycles = cycles + (hit + weight) * model.compare_cycles
                return cycles + self._mispredicts(hit, weight), hit + weight
            case Split(_, below, above, falls_below):
                below_cycles, below_weight = self.subtree(below, self._nothing)
                cycles, weight = self.subtree(above, missing)
                both = below_weight + weight
                cycles = cycles + below_cycles + both * model.compare_cycles
                cycles += model.taken_cycles * (weight if falls_below else below_weight)
                return cycles + self._mispredicts(below_weight, weight), both
            case _:
                assert_never(node)

    def _mispredicts(self, one: Weights, other: Weights) -> Weights:
        """Return the cycles that a branch going two ways loses to misprediction."""
        lost: Weights = np.minimum(one, other)
        return lost * (self._model.mispredict_ratio * self._model.mispredict_cycles)
