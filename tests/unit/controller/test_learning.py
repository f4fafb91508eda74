# SPDX-License-Identifier: Apache-2.0
"""Learning windows over an arena that the test counts in as the program would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from optpoline.controller.counting_blocks import first_block
from optpoline.controller.growing import grow_full
from optpoline.controller.learning import (
    begin_sample,
    begin_window,
    end_sample,
    end_window,
    end_windows,
)
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.controller.window_counts import (
    MIN_WINDOW_COUNT,
    is_last_block_telling,
    is_telling_soon,
    telling_counts,
    window_counts,
)
from optpoline.learn.counting import FIRST_OPEN_SLOTS, NO_COUNTS, SiteCounts
from optpoline.model import (
    SLOT_CLAIMED,
    Addr,
    Count,
    Guard,
    Miss,
    Refusal,
    SiteKind,
    tree_targets,
)
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block, redirection_of
from optpoline.promote.tree import PlannedTree
from tests.unit.controller.lone_arena import N_CPUS, THUNK, make_arena, make_record, make_site

TARGETS = [Addr(0x4F00_2000 + 16 * i) for i in range(20)]
FAR = Addr(0x7F00_0000_0000)


@dataclass
class Guards:
    """Which targets may be guarded."""

    unsafe: set[Addr] = field(default_factory=set)
    asked: list[Addr] = field(default_factory=list)

    def __call__(self, record: SiteRecord, target: Addr) -> bool:
        """Tell, and note why not, as ``Target.may_guard``."""
        self.asked.append(target)
        if target >= FAR:
            record.far_targets.add(target)
            return False
        if target in self.unsafe:
            record.unsafe_targets.add(target)
            record.refuse(Refusal.FLAGS_LIVE)
            return False
        return True


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Return an arena with no program on the other side."""
    made = make_arena()
    yield made
    made.close()


def linked_record(arena: Arena, number: int = 0, kind: SiteKind = SiteKind.CALL) -> SiteRecord:
    """Return the record of a site that is linked to its first counting block."""
    record = make_record(arena, make_site(number, kind), SiteState.LEARNING)
    record.home = first_block(record)
    return record


def count(block: Block, target: Addr, row: int, n: int = 1) -> None:
    """Count as a thread in the block that uses a row."""
    arena, plan = block.arena, block.plan
    shift = row << arena.rows.row_shift

    def add(cell: int) -> None:
        addr = Addr(cell + shift)
        arena.store_u64(addr, arena.load_u64(addr) + n)

    for known, cell in plan.hit_count_addrs:
        if known == target:
            return add(cell)
    for slot in plan.open_slots:
        held = Addr(slot.target_addr + shift)
        if arena.load_u64(held) in (0, target):
            if not arena.load_u64(held) and row == 0:
                arena.store_u64(slot.count_addr, SLOT_CLAIMED)
            arena.store_u64(held, target)
            return add(slot.count_addr)
    assert plan.miss_count_addr is not None
    arena.store_u64(Addr(plan.miss_count_addr - 8 + shift), target)
    return add(plan.miss_count_addr)


def current(record: SiteRecord) -> Block:
    """Return the block that a site counts in."""
    assert record.counting is not None
    return record.counting


def refusal_of(record: SiteRecord) -> Refusal | None:
    """Return why a site was refused."""
    return record.refusal


def by_target(counts: SiteCounts) -> dict[Addr, int]:
    """Return hits by target."""
    return {one.target: one.hit_count for one in counts.counts}


def test_first_block_of_a_call_and_of_a_jump(arena: Arena) -> None:
    for kind in SiteKind:
        plan = first_block(linked_record(arena, kind=kind)).plan
        assert plan.rows == arena.rows
        assert len(plan.open_slots) == FIRST_OPEN_SLOTS
        # Below a jump's stack pointer is its function's red zone.
        assert plan.is_below_stack_free == (kind is SiteKind.CALL)


def test_all_blocks_of_a_window_are_counted(arena: Arena) -> None:
    record = linked_record(arena)
    begin_window([record], 1.0)
    first = current(record)
    for target in TARGETS[:8]:
        for row in range(1 + N_CPUS):
            count(first, target, row, 100)
    assert grow_full([record], Guards()) == 1
    second = current(record)
    assert second is not first
    assert redirection_of(arena, first.addr) == second.addr
    assert set(tree_targets(second.plan.tree)) == set(TARGETS[:2])
    for target in TARGETS[:8]:
        count(second, target, 1, 1000)
    count(first, TARGETS[7], 2, 5)  # a thread that was inside all the time
    counted = window_counts(record)
    assert counted.total == 8 * 300 + 8 * 1000 + 5
    assert by_target(counted)[TARGETS[0]] == 1300
    # Shares are what the second block says, which names all.
    counts, seconds = telling_counts(record, record.counting_start_s + 2.0)
    assert seconds == pytest.approx(2.0)
    assert by_target(counts) == dict.fromkeys(TARGETS[:8], 1000)
    end_window(record, record.counting_start_s + 2.0)
    assert record.counted == counted
    assert record.news == record.counts == counts
    assert (record.counting, record.counts_before, record.earlier) == (None, None, [])
    assert record.rate_hz == pytest.approx(counted.total / (record.counting_start_s + 1.0))


def test_all_blocks_tell_shares_while_the_last_has_counted_little(arena: Arena) -> None:
    record = linked_record(arena)
    begin_window([record], 1.0)
    for target in TARGETS[:4]:
        count(current(record), target, 1, 500)
    assert grow_full([record], Guards()) == 1
    count(current(record), TARGETS[0], 1, MIN_WINDOW_COUNT - 1)
    counts, seconds = telling_counts(record, 3.0)
    assert counts == window_counts(record)
    assert counts.total == 2000 + MIN_WINDOW_COUNT - 1
    assert seconds == pytest.approx(2.0)
    count(current(record), TARGETS[0], 1, 1)
    assert telling_counts(record, 1e9)[0].total == MIN_WINDOW_COUNT


def test_what_was_counted_before_is_no_part_of_a_window(arena: Arena) -> None:
    record = linked_record(arena)
    for number in range(3):
        record.home = first_block(record)
        begin_window([record], 1.0)
        for target in TARGETS[:3]:
            count(current(record), target, number, 50 + number)
        grow_full([record], Guards())
        count(current(record), TARGETS[3], 2, 7)
        end_window(record, 2.0)
        assert record.counted is not None
        assert record.counted.total == 3 * (50 + number) + 7


def test_what_a_new_block_counted_before_its_window_was_noted_is_part_of_it(arena: Arena) -> None:
    records = [linked_record(arena, number) for number in range(2)]
    blocks = [first_block(record) for record in records]
    for block in blocks:
        count(block, TARGETS[0], 1, 20)
    begin_window(records, 1.0, new={blocks[0].addr})
    count(blocks[0], TARGETS[0], 1, 3)
    count(blocks[1], TARGETS[0], 1, 3)
    assert [window_counts(record).total for record in records] == [23, 3]


def test_ending_many_windows_is_ending_each(arena: Arena) -> None:
    records = [linked_record(arena, number) for number in range(12)]
    begin_window(records, 1.0)
    for record in records[3:6]:
        for target in TARGETS[:4]:
            count(current(record), target, 1, 100)
    count(current(records[7]), TARGETS[0], 0)
    assert grow_full(records, Guards()) == 3
    expected = [window_counts(record) for record in records]
    records[8].counts = SiteCounts(counts=(Count(target=TARGETS[0], hit_count=3),), n_unknown=0)
    end_windows(records, 2.0)
    assert [record.counted for record in records] == expected
    assert [c.total for c in expected] == [*(0, 0, 0), *(400,) * 3, 0, 1, *(0,) * 4]
    for number, record in enumerate(records):
        assert record.counting is None
        assert record.counts is not None
        assert record.is_news == (expected[number].total > 0)
        # A window that saw nothing keeps what is known.
        assert record.counts.total == (3 if number == 8 else expected[number].total)
    # Blocks that have counted once are no longer fresh.
    again = [replace(record) for record in records]
    begin_window(again, 3.0)
    assert [record.counts_before for record in again][:3] == [NO_COUNTS] * 3
    assert [window_counts(record).total for record in again] == [0] * 12


def test_only_sites_with_unknown_targets_grow(arena: Arena) -> None:
    records = [linked_record(arena, number) for number in range(50)]
    begin_window(records, 1.0)
    for record in records:
        for target in TARGETS[:2]:
            count(current(record), target, 2, 1000)
    for target in TARGETS[:5]:
        count(current(records[31]), target, 0, 1000)
    assert grow_full(records, Guards()) == 1
    assert [record.n_grown for record in records] == [int(i == 31) for i in range(50)]
    assert grow_full(records, Guards()) == 0


def test_far_target_is_counted_but_led_to_the_thunk(arena: Arena) -> None:
    record = linked_record(arena)
    begin_window([record], 1.0)
    for target in (FAR, TARGETS[0], TARGETS[1]):
        count(current(record), target, 1, 1000)
    assert grow_full([record], Guards()) == 1
    plan = current(record).plan
    assert set(tree_targets(plan.tree)) == {FAR, TARGETS[0]}
    assert plan.thunk_targets == {FAR}
    assert {target for target, _ in plan.hit_count_addrs} == {FAR, TARGETS[0]}
    # It keeps the way to the slots free: no need to grow again.
    count(current(record), FAR, 1, 100_000)
    assert grow_full([record], Guards()) == 0
    assert by_target(window_counts(record))[FAR] == 101_000


@pytest.mark.parametrize("row", range(1 + N_CPUS))
@pytest.mark.parametrize("n_before", [0, FIRST_OPEN_SLOTS])
def test_jump_to_what_reads_flags_is_refused_at_once(arena: Arena, row: int, n_before: int) -> None:
    """Whichever row the target is in, and if it found no slot as well."""
    record = linked_record(arena, kind=SiteKind.JUMP)
    begin_window([record], 1.0)
    guards = Guards(unsafe={TARGETS[9]})
    for target in TARGETS[:n_before]:
        count(current(record), target, row)
    assert grow_full([record], guards) == 0
    assert refusal_of(record) is None
    block = current(record)
    count(block, TARGETS[9], row)
    assert grow_full([record], guards) == 0
    assert record.state is SiteState.REFUSED
    assert refusal_of(record) is Refusal.FLAGS_LIVE
    assert redirection_of(arena, block.addr) == THUNK.addr


def test_jump_with_nothing_new_is_not_looked_at_again(arena: Arena) -> None:
    record = linked_record(arena, kind=SiteKind.JUMP)
    begin_window([record], 1.0)
    guards = Guards()
    count(current(record), TARGETS[0], 1)
    grow_full([record], guards)
    assert guards.asked == [TARGETS[0]]
    count(current(record), TARGETS[0], 1, 30)
    grow_full([record], guards)
    assert guards.asked == [TARGETS[0]]
    count(current(record), TARGETS[1], 2)
    grow_full([record], guards)
    assert TARGETS[1] in guards.asked


def test_calls_are_not_looked_at_before_they_grow(arena: Arena) -> None:
    record = linked_record(arena)
    begin_window([record], 1.0)
    guards = Guards(unsafe={TARGETS[0]})
    count(current(record), TARGETS[0], 1)
    assert grow_full([record], guards) == 0
    assert guards.asked == []


def test_sample_of_a_promoted_site(arena: Arena) -> None:
    record = linked_record(arena)
    record.active = record.home
    tree = Guard(TARGETS[0], None, Miss())
    record.plan = PlannedTree(tree=tree, targets=(TARGETS[0],), hit_ratio=1.0, cycles=1.0)
    block = begin_sample(record, None, 1.0)
    assert block is not None
    count(block, TARGETS[0], 1, 10)
    count(block, TARGETS[1], 2, 5)
    end_sample(record, 2.0)
    assert record.sampled == record.counted
    assert record.sampled is not None
    assert by_target(record.sampled) == {TARGETS[0]: 10, TARGETS[1]: 5}
    # The same block again, for the next part of the window.
    assert begin_sample(record, block, 3.0) is block
    count(block, TARGETS[0], 0, 1)
    end_sample(record, 4.0)
    assert record.counted is not None
    assert record.counted.total == 1
    assert record.sampled is not None
    assert record.sampled.total == 16


def test_refusal_forgets_the_window(arena: Arena) -> None:
    record = linked_record(arena)
    begin_window([record], 1.0)
    for target in TARGETS[:4]:
        count(current(record), target, 1, 500)
    grow_full([record], Guards())
    record.refuse(Refusal.FOREIGN_BYTES)
    assert window_counts(record) == NO_COUNTS
    assert grow_full([record], Guards()) == 0


def test_what_early_blocks_missed_is_of_what_later_ones_found(arena: Arena) -> None:
    record = linked_record(arena)
    begin_window([record], 1.0)
    for target in TARGETS[:4]:
        count(current(record), target, 1, 500)  # two slots: half of it is unknown
    assert grow_full([record], Guards()) == 1
    for target, n in zip(TARGETS[:4], (10, 10, 8, 12), strict=True):
        count(current(record), target, 1, n)
    assert not is_last_block_telling(record)
    counts, _ = telling_counts(record, 3.0)
    hits = {c.target: c.hit_count for c in counts.counts}
    assert hits == dict(zip(TARGETS[:4], (510, 510, 408, 612), strict=True))
    assert counts.n_unknown == 0
    # What is exact stays so.
    assert window_counts(record).n_unknown == 1000
    assert counts.total == window_counts(record).total == 2040


def test_a_window_goes_on_for_who_needs_little_more(arena: Arena) -> None:
    record = linked_record(arena)
    begin_window([record], 1.0)
    for target in TARGETS[:4]:
        count(current(record), target, 1, 250)
    assert not is_telling_soon(record, 2.0, 9.0)  # no block came late
    assert grow_full([record], Guards()) == 1
    assert is_telling_soon(record, 2.0, 0.257)  # 1000 a second
    assert not is_telling_soon(record, 2.0, 0.255)
    count(current(record), TARGETS[0], 1, MIN_WINDOW_COUNT)
    assert not is_telling_soon(record, 2.0, 9.0)
    assert is_last_block_telling(record)


def test_a_policy_bounds_the_slots(arena: Arena) -> None:
    record = linked_record(arena)
    record.learner = None
    record.home = first_block(record, 4)
    assert len(record.home.plan.open_slots) == 4
    begin_window([record], 1.0)
    for target in TARGETS[:6]:
        count(current(record), target, 1, 500)
    assert grow_full([record], Guards(), 4) == 0
    counts, _ = telling_counts(record, 2.0)
    assert [c.target for c in counts.counts] == sorted(TARGETS[:4])
    assert counts.n_unknown == 1000
    assert grow_full([record], Guards()) == 1
