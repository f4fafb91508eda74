# SPDX-License-Identifier: Apache-2.0
"""What a block plan means, said in Python: where to go and what to count."""

from __future__ import annotations

from collections.abc import MutableMapping

from optpoline.model import Addr, BlockPlan, Guard, Miss, Split, TreeNode

__all__ = ["find_target", "run_plan"]

_U64 = 1 << 64


def find_target(tree: TreeNode, operand: int) -> Addr | None:
    """Return the guarded target that ``operand`` reaches in a tree, or None."""
    node = tree
    while True:
        match node:
            case Miss():
                return None
            case Guard(target, below, otherwise, _):
                if operand == target:
                    return target
                node = below if below is not None and operand < target else otherwise
            case Split(key, below, above, _):
                node = below if operand < key else above


def run_plan(plan: BlockPlan, operand: int, cells: MutableMapping[int, int]) -> Addr:
    """Return where a block goes next; count in ``cells`` (address to u64)."""
    target = find_target(plan.tree, operand)
    if target is not None:
        for counted, addr in plan.hit_count_addrs:
            if counted == target:
                _increment(cells, addr)
        return target
    for slot in plan.open_slots:
        claimed = cells.get(slot.target_addr, 0)
        if claimed in (operand, 0):
            cells[slot.target_addr] = operand
            _increment(cells, slot.count_addr)
            return plan.thunk_addr
    if plan.miss_count_addr is not None:
        _increment(cells, plan.miss_count_addr)
    return plan.thunk_addr


def _increment(cells: MutableMapping[int, int], addr: int) -> None:
    """Add one to a cell, as 64 bits do."""
    cells[addr] = (cells.get(addr, 0) + 1) % _U64
