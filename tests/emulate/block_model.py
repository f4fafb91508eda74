# SPDX-License-Identifier: Apache-2.0
"""What a block plan means, said in Python: where to go and what to count."""

from __future__ import annotations

from collections.abc import MutableMapping

from optpoline.model import SLOT_CLAIMED, Addr, BlockPlan, Guard, Miss, Split, TreeNode

__all__ = ["claim_own", "find_target", "run_plan"]

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


def run_plan(plan: BlockPlan, operand: int, cells: MutableMapping[int, int], cpu: int = 0) -> Addr:
    """Return where a block goes next; count in ``cells`` (address to u64).

    Args:
        plan: What the block does.
        operand: The target.
        cells: Counter memory.
        cpu: Number of the CPU; one that has no row for a thread that does not know.
    """
    target = find_target(plan.tree, operand)
    rows = plan.rows
    if target is not None:
        _note_hit(plan, target, cells, cpu)
        return plan.miss_addr if target in plan.thunk_targets else target
    if rows is None:
        if plan.miss_count_addr is not None:
            _increment(cells, plan.miss_count_addr)
    elif rows.rseq is not None and plan.is_below_stack_free and cpu < rows.n_cpus:
        claim_own(plan, operand, cells, cpu)
    else:
        _claim_shared(plan, operand, cells)
    return plan.miss_addr


def _note_hit(plan: BlockPlan, target: Addr, cells: MutableMapping[int, int], cpu: int) -> None:
    """Count or trace a hit."""
    traced = {} if plan.trace is None else dict(plan.trace.ids)
    counted = dict(plan.hit_count_addrs)
    if plan.trace is not None and target in traced:
        number = cells[plan.trace.head_addr] % plan.trace.n_entries
        _increment(cells, plan.trace.head_addr)
        at = plan.trace.entries_addr + 4 * number
        cell, shift = at & ~7, 8 * (at & 7)
        kept = cells[cell] & ~(0xFFFF_FFFF << shift)
        cells[cell] = kept | traced[target] << shift
    elif plan.rows is not None and target in counted:
        cell = counted[target]
        _increment(cells, plan.rows.cell_of_cpu(cell, cpu) if cpu < plan.rows.n_cpus else cell)


def claim_own(
    plan: BlockPlan,
    operand: int,
    cells: MutableMapping[int, int],
    cpu: int,
    *,
    is_counted: bool = True,
) -> None:
    """Find or claim a slot in a CPU's row; count unless disturbed right before that."""
    assert plan.rows is not None
    assert plan.miss_count_addr is not None
    pairs = [(slot.target_addr, slot.count_addr) for slot in plan.open_slots]
    pairs = [
        (plan.rows.cell_of_cpu(t, cpu), plan.rows.cell_of_cpu(c, cpu))
        for t, c in (*pairs, (Addr(plan.miss_count_addr - 8), plan.miss_count_addr))
    ]
    free = (pair for pair in pairs[:-1] if cells[pair[0]] in (operand, 0))
    target_addr, count_addr = next(free, pairs[-1])
    cells[target_addr] = operand
    if is_counted:
        _increment(cells, count_addr)


def _claim_shared(plan: BlockPlan, operand: int, cells: MutableMapping[int, int]) -> None:
    """Find or claim a slot in the shared row; count."""
    assert plan.miss_count_addr is not None
    for slot in plan.open_slots:
        is_free = cells[slot.target_addr] == 0 and not cells[slot.count_addr] & SLOT_CLAIMED
        if is_free and operand:
            cells[slot.count_addr] |= SLOT_CLAIMED
            cells[slot.target_addr] = operand
        if cells[slot.target_addr] == operand:
            _increment(cells, slot.count_addr)
            return
    cells[plan.miss_count_addr - 8] = operand
    _increment(cells, plan.miss_count_addr)


def _increment(cells: MutableMapping[int, int], addr: int) -> None:
    """Add one to a cell, as 64 bits do."""
    cells[addr] = (cells.get(addr, 0) + 1) % _U64
