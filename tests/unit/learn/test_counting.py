# SPDX-License-Identifier: Apache-2.0
"""Counting blocks: their cells, what is read from them, and when they grow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from optpoline.learn.counting import (
    FIRST_OPEN_SLOTS,
    FORGOTTEN_SHARE,
    MAX_OPEN_SLOTS,
    MIN_COUNT_TO_GROW,
    NO_COUNTS,
    PROFILE_TOTAL,
    SiteCounts,
    add,
    blend,
    cells_of,
    n_cells,
    next_open_slots,
    plan_counting,
    read_counts,
    subtract,
)
from optpoline.model import (
    SLOT_CLAIMED,
    Addr,
    BlockPlan,
    Count,
    CounterRows,
    Guard,
    Miss,
    TreeNode,
)

CELLS_ADDR = Addr(0x7000_0000)
ROWS = CounterRows(shared_addr=CELLS_ADDR, row_shift=19, n_cpus=2, rseq=None)
THUNK_ADDR = Addr(0x40_0000)
addresses = st.integers(1, (1 << 64) - 1).map(Addr)


def chain(targets: list[Addr]) -> TreeNode:
    """Return guards in a row."""
    tree: TreeNode = Miss()
    for target in reversed(targets):
        tree = Guard(target, None, tree)
    return tree


def make_plan(targets: list[Addr], n_open: int) -> BlockPlan:
    """Return a counting plan for known targets."""
    return plan_counting(
        operand="rax",
        thunk_addr=THUNK_ADDR,
        tree=chain(targets),
        n_open=n_open,
        cells_addr=CELLS_ADDR,
        rows=ROWS,
    )


class CountingModel:
    """Counter rows, and what a block does to them."""

    def __init__(self, plan: BlockPlan) -> None:
        """Begin with all cells 0."""
        self.plan = plan
        self.cells: dict[tuple[int, int], int] = {}

    def count(self, target: Addr, row: int) -> None:
        """Count one branch in a row; in row 0 a claimed slot is marked in its count."""
        for known, addr in self.plan.hit_count_addrs:
            if known == target:
                self._add(row, addr)
                return
        for slot in self.plan.open_slots:
            if self.cells.setdefault((row, slot.target_addr), target) == target:
                if row == 0:
                    self.cells.setdefault((0, slot.count_addr), SLOT_CLAIMED)
                self._add(row, slot.count_addr)
                return
        assert self.plan.miss_count_addr is not None
        self.cells[row, self.plan.miss_count_addr - 8] = target
        self._add(row, self.plan.miss_count_addr)

    def _add(self, row: int, addr: int) -> None:
        """Count in a cell."""
        self.cells[row, addr] = self.cells.get((row, addr), 0) + 1

    def columns(self, addr: Addr, n_cells: int) -> NDArray[np.uint64]:
        """Read them as an arena does."""
        rows = range(1 + ROWS.n_cpus)
        return np.array(
            [[self.cells.get((row, addr + 8 * i), 0) for i in range(n_cells)] for row in rows],
            np.uint64,
        ).reshape(len(rows), n_cells)

    def read(self) -> SiteCounts:
        """Read what was counted."""
        return read_counts(self.plan, self.columns)


def all_cells(plan: BlockPlan) -> list[int]:
    """Return the addresses of every cell of a plan."""
    assert plan.miss_count_addr is not None
    cells: list[int] = [plan.miss_count_addr - 8, plan.miss_count_addr]
    cells += [addr for _, addr in plan.hit_count_addrs]
    for slot in plan.open_slots:
        cells += [slot.target_addr, slot.count_addr]
    return cells


@given(st.lists(addresses, unique=True, max_size=40), st.integers(0, 64))
def test_cells_are_aligned_apart_and_inside_what_was_asked_for(
    targets: list[Addr], n_open: int
) -> None:
    plan = make_plan(targets, n_open)
    cells = all_cells(plan)
    assert len(set(cells)) == len(cells) == n_cells(len(targets), n_open)
    assert sorted(cells) == [CELLS_ADDR + 8 * i for i in range(len(cells))]
    assert cells_of(plan) == (CELLS_ADDR, len(cells))
    assert [target for target, _ in plan.hit_count_addrs] == targets
    for slot in plan.open_slots:
        assert slot.count_addr == slot.target_addr + 8


def test_what_counts_nothing_has_no_cells() -> None:
    plan = BlockPlan(operand="rax", tree=Miss(), thunk_addr=THUNK_ADDR)
    with pytest.raises(ValueError, match="no counting block"):
        cells_of(plan)


@given(
    known=st.lists(addresses, unique=True, max_size=6),
    taken=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 2)), max_size=300),
    others=st.lists(addresses, unique=True, min_size=12, max_size=12),
    n_open=st.integers(0, 8),
)
def test_what_was_taken_is_what_is_read(
    known: list[Addr], taken: list[tuple[int, int]], others: list[Addr], n_open: int
) -> None:
    plan = make_plan(known, n_open)
    model = CountingModel(plan)
    universe = [*known, *(other for other in others if other not in known)][:12]
    strangers: list[list[Addr]] = [[], [], []]
    seen: dict[Addr, int] = {}
    n_unknown = 0
    for i, row in taken:
        target = universe[i % len(universe)]
        model.count(target, row)
        if target not in known and target not in strangers[row]:
            strangers[row].append(target)
        # First come, first served, in each row: known ones, then as many as have slots.
        if target in known or target in strangers[row][:n_open]:
            seen[target] = seen.get(target, 0) + 1
        else:
            n_unknown += 1
    counts = model.read()
    assert counts.total == len(taken)
    assert {count.target: count.hit_count for count in counts.counts} == seen
    assert counts.n_unknown == n_unknown
    order = [(-count.hit_count, count.target) for count in counts.counts]
    assert order == sorted(order)


@given(
    first=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), max_size=100),
    second=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), max_size=100),
)
def test_subtract_gives_the_second_window(
    first: list[tuple[int, int]], second: list[tuple[int, int]]
) -> None:
    targets = [Addr(0x1000 * (i + 1)) for i in range(9)]
    model = CountingModel(make_plan(targets[:2], 4))
    for i, row in first:
        model.count(targets[i], row)
    earlier = model.read()
    for i, row in second:
        model.count(targets[i], row)
    window = subtract(model.read(), earlier)
    assert window.total == len(second)
    for count in window.counts:
        assert count.hit_count <= [i for i, _ in second].count(targets.index(count.target))


def test_subtract_leaves_out_what_did_not_move_or_went_back() -> None:
    a, b, c = Addr(16), Addr(32), Addr(48)
    earlier = SiteCounts(
        counts=(Count(target=a, hit_count=10), Count(target=b, hit_count=5)), n_unknown=7
    )
    later = SiteCounts(
        counts=(
            Count(target=a, hit_count=10),
            Count(target=c, hit_count=3),
            Count(target=b, hit_count=2),
        ),
        n_unknown=5,
    )
    assert subtract(later, earlier) == SiteCounts(
        counts=(Count(target=c, hit_count=3),), n_unknown=0
    )


def test_slots_with_one_target_are_added_up() -> None:
    # Each CPU claimed one, and two threads one each in the shared row at the same moment.
    model = CountingModel(make_plan([Addr(0x1000)], 2))
    one, other = model.plan.open_slots
    for row, slot, count in ((0, one, SLOT_CLAIMED | 3), (0, other, SLOT_CLAIMED | 4), (2, one, 5)):
        model.cells[row, slot.target_addr] = 0x2000
        model.cells[row, slot.count_addr] = count
    assert model.read().counts == (Count(target=Addr(0x2000), hit_count=12),)


def test_slot_that_is_being_claimed() -> None:
    model = CountingModel(make_plan([], 2))
    one, other = model.plan.open_slots
    model.cells[0, one.count_addr] = SLOT_CLAIMED  # its target is not stored yet
    model.cells[0, other.target_addr] = 0x2000
    model.cells[0, other.count_addr] = SLOT_CLAIMED  # and not counted yet
    assert model.read() == NO_COUNTS


def test_the_last_target_without_a_slot_is_no_count() -> None:
    model = CountingModel(make_plan([], 0))
    for target in (0x2000, 0x3000):
        model.count(Addr(target), 1)
    assert model.read() == SiteCounts(counts=(), n_unknown=2)


def test_shares_add_up_to_what_is_known() -> None:
    counts = SiteCounts(
        counts=(Count(target=Addr(16), hit_count=6), Count(target=Addr(32), hit_count=2)),
        n_unknown=2,
    )
    assert counts.total == 10
    assert counts.shares() == {16: pytest.approx(0.6), 32: pytest.approx(0.2)}
    assert SiteCounts(counts=(), n_unknown=0).shares() == {}


@pytest.mark.parametrize(
    ("n_known", "n_unknown", "expected"),
    [
        (0, 0, 0),
        (0, MIN_COUNT_TO_GROW - 1, 0),
        (0, MIN_COUNT_TO_GROW, FIRST_OPEN_SLOTS),
        (1, 1000, 3),
        (4, 1000, 12),
        (12, 1000, 36),
        (36, 1000, MAX_OPEN_SLOTS),
        (100, 1000, MAX_OPEN_SLOTS),
    ],
)
def test_slots_triple_until_the_bound(n_known: int, n_unknown: int, expected: int) -> None:
    counts = SiteCounts(
        counts=tuple(Count(target=Addr(16 * (i + 1)), hit_count=10) for i in range(n_known)),
        n_unknown=n_unknown,
    )
    assert next_open_slots(counts) == expected


def test_site_grows_only_above_half_a_percent_unknown() -> None:
    known = (Count(target=Addr(16), hit_count=99_500),)
    assert next_open_slots(SiteCounts(counts=known, n_unknown=499)) == 0
    assert next_open_slots(SiteCounts(counts=known, n_unknown=501)) == 3


def test_a_site_with_80_targets_is_known_after_four_rounds() -> None:
    targets = [Addr(0x1000 + 16 * i) for i in range(80)]
    known: list[Addr] = []
    n_open, rounds = FIRST_OPEN_SLOTS, 0
    while n_open:
        rounds += 1
        model = CountingModel(make_plan(known, n_open))
        for i in range(8000):
            model.count(targets[i % 80], 1)
        counts = model.read()
        known = [count.target for count in counts.counts]
        n_open = next_open_slots(counts)
    assert rounds == 4
    assert sorted(known) == targets


# --- windows together, and profiles

windows = st.builds(
    lambda hits, n_unknown: SiteCounts(
        counts=tuple(
            Count(target=target, hit_count=n)
            for target, n in sorted(hits.items(), key=lambda item: (-item[1], item[0]))
        ),
        n_unknown=n_unknown,
    ),
    st.dictionaries(st.integers(1, 30).map(Addr), st.integers(1, 1 << 40), max_size=20),
    st.integers(0, 1 << 40),
)
ratios = st.floats(0.0, 1.0)


def by_target(counts: SiteCounts) -> dict[Addr, int]:
    """Return hits by target."""
    return {count.target: count.hit_count for count in counts.counts}


def is_ranked(counts: SiteCounts) -> bool:
    """Tell whether targets come once each, hottest first."""
    order = [(-count.hit_count, count.target) for count in counts.counts]
    return order == sorted(order) and len(by_target(counts)) == len(order)


def unknown_ratio(counts: SiteCounts) -> float:
    """Return the share that no name is known for."""
    return counts.n_unknown / counts.total


@given(one=windows, other=windows)
def test_add_counts_both_windows(one: SiteCounts, other: SiteCounts) -> None:
    both = add(one, other)
    a, b = by_target(one), by_target(other)
    assert by_target(both) == {t: a.get(t, 0) + b.get(t, 0) for t in a.keys() | b.keys()}
    assert both.n_unknown == one.n_unknown + other.n_unknown
    assert is_ranked(both)
    assert add(other, one) == both
    assert subtract(both, other) == one
    assert add(one, SiteCounts(counts=(), n_unknown=0)) == one


@given(first=windows, second=windows, ratio=ratios)
def test_blend_stands_for_the_same_number_of_branches(
    first: SiteCounts, second: SiteCounts, ratio: float
) -> None:
    profile: SiteCounts | None = None
    for window in (first, second, first, second, second):
        if not window.total:
            continue
        profile = blend(profile, window, ratio)
        # Each of its numbers is rounded by at most a half.
        assert abs(profile.total - PROFILE_TOTAL) <= (len(window.counts) + 31) / 2 + 1
        assert is_ranked(profile)
        assert all(c.hit_count >= FORGOTTEN_SHARE * PROFILE_TOTAL for c in profile.counts)


@given(profile=windows, window=windows, ratio=ratios)
def test_blend_is_the_weighted_mean_of_shares(
    profile: SiteCounts, window: SiteCounts, ratio: float
) -> None:
    if not profile.total or not window.total:
        return
    blended = blend(profile, window, ratio)
    old, new, shares = profile.shares(), window.shares(), blended.shares()
    expected = {
        target: (1 - ratio) * old.get(target, 0.0) + ratio * new.get(target, 0.0)
        for target in old.keys() | new.keys()
    }
    slack = 50 / PROFILE_TOTAL
    assert shares.keys() <= expected.keys()
    forgotten = 0.0
    for target, share in expected.items():
        if target in shares:
            assert shares[target] == pytest.approx(share, abs=slack)
        else:
            # Those forgotten are few, and go on counting as unknown.
            assert share <= FORGOTTEN_SHARE + slack
            forgotten += share
    unknown = (1 - ratio) * unknown_ratio(profile) + ratio * unknown_ratio(window)
    assert unknown_ratio(blended) == pytest.approx(unknown + forgotten, abs=slack)


@given(window=windows, ratio=ratios)
def test_first_window_is_the_profile(window: SiteCounts, ratio: float) -> None:
    if not window.total:
        return
    nothing = SiteCounts(counts=(), n_unknown=0)
    first = blend(None, window, ratio)
    assert first == blend(nothing, window, ratio)
    for target, share in first.shares().items():
        assert share == pytest.approx(window.shares()[target], abs=50 / PROFILE_TOTAL)


def test_windows_weigh_the_same_whatever_they_counted() -> None:
    profile = blend(None, SiteCounts(counts=(Count(target=Addr(16), hit_count=7),), n_unknown=0), 1)
    for n in (1, 1000, 1 << 50):
        window = SiteCounts(counts=(Count(target=Addr(32), hit_count=n),), n_unknown=0)
        assert blend(profile, window, 0.25).shares() == {16: 0.75, 32: 0.25}


def test_target_that_is_gone_is_forgotten_in_the_end() -> None:
    old = SiteCounts(counts=(Count(target=Addr(16), hit_count=1000),), n_unknown=0)
    new = SiteCounts(counts=(Count(target=Addr(32), hit_count=1000),), n_unknown=0)
    profile = blend(None, old, 1.0)
    shares: list[float] = []
    while Addr(16) in profile.shares() and len(shares) < 200:
        shares.append(profile.shares()[Addr(16)])
        profile = blend(profile, new, 0.2)
    assert shares[:3] == pytest.approx([1.0, 0.8, 0.64])
    assert FORGOTTEN_SHARE <= shares[-1] < 2 * FORGOTTEN_SHARE
    for _ in range(100):
        profile = blend(profile, new, 0.2)
    # What was forgotten fades from the unknown too.
    assert profile.shares() == {32: pytest.approx(1.0, abs=1e-5)}
