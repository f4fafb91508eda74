# SPDX-License-Identifier: Apache-2.0
"""What is drained in the middle of a window is neither lost for it nor counted twice."""

from __future__ import annotations

from dataclasses import replace

from optpoline.controller.counting_blocks import first_block
from optpoline.controller.exact_counts import describe_operation, settle_drained
from optpoline.controller.exclusion import Way
from optpoline.controller.executor import OperationEvent
from optpoline.controller.growing import grow_full
from optpoline.controller.learning import begin_window, end_windows
from optpoline.controller.records import SiteRecord
from optpoline.controller.window_counts import window_counts
from optpoline.learn.counting import NO_COUNTS, SiteCounts, cells_of, read_counts
from optpoline.model import Addr, Count
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block
from tests.unit.controller.test_learning import TARGETS, Guards, arena, linked_record

__all__ = ["arena"]  # a fixture


def count(block: Block, hits: dict[Addr, int], *, cpu: int = 0, n_unknown: int = 0) -> None:
    """Count in a CPU's row as threads there would: known targets, then slots."""
    store, load, rows = block.arena.store_u64, block.arena.load_u64, block.arena.rows
    known = dict(block.plan.hit_count_addrs)
    for target, n in hits.items():
        cell = known.get(target)
        for slot in block.plan.open_slots if cell is None else ():
            if load(rows.cell_of_cpu(slot.target_addr, cpu)) in (0, target):
                store(rows.cell_of_cpu(slot.target_addr, cpu), target)
                cell = slot.count_addr
                break
        assert cell is not None
        at = rows.cell_of_cpu(cell, cpu)
        store(at, load(at) + n)
    assert block.plan.miss_count_addr is not None
    at = rows.cell_of_cpu(block.plan.miss_count_addr, cpu)
    store(at, load(at) + n_unknown)


def drain(record: SiteRecord) -> None:
    """Take all that a site's blocks hold, as nobody counts meanwhile."""
    for block in record.tables.values():
        taken = read_counts(block.plan, block.arena.columns)
        first, n_cells = cells_of(block.plan)
        for row in range(1 + block.arena.rows.n_cpus):
            for number in range(n_cells):
                addr = Addr(first + 8 * number + (row << block.arena.rows.row_shift))
                block.arena.store_u64(addr, 0)
        settle_drained(record, block, taken)


def counts_of(hits: dict[Addr, int], n_unknown: int = 0) -> SiteCounts:
    """Return counts, hottest first."""
    ordered = sorted(hits.items(), key=lambda item: (-item[1], item[0]))
    return SiteCounts(
        counts=tuple(Count(target=target, hit_count=n) for target, n in ordered),
        n_unknown=n_unknown,
    )


def test_drained_in_the_middle(arena: Arena) -> None:
    record = linked_record(arena)
    block = first_block(record)
    count(block, {TARGETS[0]: 700, TARGETS[1]: 10}, n_unknown=4)
    begin_window([record], 1.0)
    count(block, {TARGETS[0]: 30, TARGETS[1]: 20}, n_unknown=6)
    drain(record)
    assert window_counts(record) == counts_of({TARGETS[0]: 30, TARGETS[1]: 20}, 6)
    # Its slots are free again, and another target is first.
    count(block, {TARGETS[2]: 5, TARGETS[0]: 1}, cpu=1)
    assert window_counts(record) == counts_of({TARGETS[0]: 31, TARGETS[1]: 20, TARGETS[2]: 5}, 6)
    end_windows([record], 2.0)
    assert record.counted == counts_of({TARGETS[0]: 31, TARGETS[1]: 20, TARGETS[2]: 5}, 6)
    assert record.undrained == counts_of({TARGETS[0]: 730, TARGETS[1]: 30}, 10)
    assert record.drained == NO_COUNTS


def test_all_drained_at_the_end(arena: Arena) -> None:
    record = linked_record(arena)
    block = first_block(record)
    begin_window([record], 1.0)
    count(block, {TARGETS[0]: 30})
    drain(record)
    end_windows([record], 2.0)
    assert record.counted == counts_of({TARGETS[0]: 30})


def test_earlier_blocks_are_drained_too(arena: Arena) -> None:
    record = linked_record(arena)
    first = first_block(record)
    begin_window([record], 1.0)
    count(first, {TARGETS[0]: 300, TARGETS[1]: 200}, n_unknown=100)
    drain(record)
    assert grow_full([record], Guards()) == 0  # it has met no other since
    count(first, {TARGETS[0]: 300, TARGETS[1]: 200}, n_unknown=100)
    assert grow_full([record], Guards()) == 1
    assert record.counting is not None
    count(record.counting, {TARGETS[3]: 50})
    count(first, {TARGETS[1]: 1})
    drain(record)
    count(first, {TARGETS[1]: 2})
    expected = {TARGETS[0]: 600, TARGETS[1]: 403, TARGETS[3]: 50}
    assert window_counts(record) == counts_of(expected, 200)
    assert record.undrained.total == sum(expected.values()) + 200 - 2


def test_only_a_part_could_be_taken(arena: Arena) -> None:
    record = linked_record(arena)
    block = first_block(record)
    count(block, {TARGETS[0]: 100}, cpu=0)
    count(block, {TARGETS[0]: 50}, cpu=1)
    begin_window([record], 1.0)
    # CPU 1 is not ours.
    block.arena.store_u64(block.arena.rows.cell_of_cpu(block.plan.open_slots[0].count_addr, 0), 0)
    settle_drained(record, block, counts_of({TARGETS[0]: 100}))
    assert window_counts(record) == NO_COUNTS
    count(block, {TARGETS[0]: 7}, cpu=1)
    assert window_counts(record) == counts_of({TARGETS[0]: 7})


def test_used_blocks_are_emptied_for_a_window(arena: Arena) -> None:
    used, fresh = linked_record(arena), linked_record(arena, 1)
    block = first_block(used)
    count(block, {TARGETS[0]: 9})
    asked: list[SiteRecord] = []

    def empty(records: list[SiteRecord]) -> bool:
        asked.extend(records)
        for record in records:
            drain(record)
        return True

    begin_window([used, fresh], 1.0, lambda records: empty([*records]))
    assert asked == [used]
    assert used.counts_before == NO_COUNTS
    assert used.undrained == counts_of({TARGETS[0]: 9})
    assert window_counts(used) == NO_COUNTS


def test_what_cannot_be_emptied_is_remembered(arena: Arena) -> None:
    record = linked_record(arena)
    count(first_block(record), {TARGETS[0]: 9})
    begin_window([record], 1.0, lambda _: False)
    assert record.counts_before == counts_of({TARGETS[0]: 9})
    assert window_counts(record) == NO_COUNTS


def test_words_for_a_drain() -> None:
    event = OperationEvent(
        time_ns=1, duration_ns=120_000, cpu=3, way=Way.SECTION, why_not=None, n_drained=7
    )
    assert describe_operation(event) == "took 7 counts from the row of CPU 3 in 0.12 ms, section"
    assert "took 1 count from" in describe_operation(replace(event, n_drained=1))
