# SPDX-License-Identifier: Apache-2.0
"""Write the counting blocks of sites; what leads to them, and when, is decided elsewhere."""

from __future__ import annotations

from optpoline.controller.records import SiteRecord
from optpoline.errors import ArenaFull
from optpoline.learn.counting import FIRST_OPEN_SLOTS, n_cells, plan_counting
from optpoline.model import Miss, SiteKind, TreeNode, tree_targets
from optpoline.patch.blocks import Block, add_block, point_back

__all__ = ["MIN_FREE_CODE_SIZE", "add_counting_block", "first_block"]

MIN_FREE_CODE_SIZE = 16 << 10
"""Code that counting blocks leave free: room for a last promoted block, and no
counter cells given out for a block that cannot be written. The biggest block
(128 guards and 64 slots) is 8 KiB."""


def add_counting_block(record: SiteRecord, tree: TreeNode, n_open: int) -> Block:
    """Write a counting block for a site; nothing leads to it yet.

    Raises:
        ArenaError: if the arena is used up.
        EncodeRangeError: if a target is out of reach.
    """
    if record.arena.free_code_size < MIN_FREE_CODE_SIZE:
        raise ArenaFull(record.arena.addr, "counting blocks")
    record.make_thunk()
    n_known = sum(1 for _ in tree_targets(tree))
    plan = plan_counting(
        operand=record.site.thunk.operand,
        thunk_addr=record.thunk_addr,
        tree=tree,
        n_open=n_open,
        cells_addr=record.arena.add_counters(n_cells(n_known, n_open)),
        rows=record.arena.rows,
        # A jump leaves the red zone of the function that it is in as it is.
        is_below_stack_free=record.site.kind is SiteKind.CALL,
        thunk_targets=frozenset(tree_targets(tree)) & record.far_targets,
        load=record.site.load,
    )
    block = add_block(record.arena, plan, site_addr=record.site.addr)
    record.tables[block.addr] = block
    return block


def first_block(record: SiteRecord, max_slots: int = 0) -> Block:
    """Return the counting block of a site on its baseline; the same each time.

    Args:
        record: The site.
        max_slots: The policy's (``WatchSchedule``).

    Raises:
        ArenaError: if the arena is used up.
    """
    if record.learner is None:
        record.learner = add_counting_block(record, Miss(), max_slots or FIRST_OPEN_SLOTS)
    else:
        point_back(record.learner)
    return record.learner
